"""Lanczos: the recurrence, orthogonality, breakdown, growth, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from spectra import matrix
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.linalg.lanczos import Tridiagonal, extend, lanczos

P = 60


def starts(count: int, number: int = 1, size: int = P) -> Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def dense(tri: Tridiagonal, i: int) -> Tensor:
    b = tri.betas[i, :-1]
    return torch.diag(tri.alphas[i]) + torch.diag(b, 1) + torch.diag(b, -1)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_recurrence_and_orthogonality(dtype: torch.dtype, device: torch.device, scale: float) -> None:
    M = (scale * matrix(torch.logspace(-4, 2, P, dtype=torch.float64))).to(device, dtype)
    V0 = starts(3).to(device, dtype)
    tri = lanczos(lambda V: M @ V, V0, 25)
    tol = 100 * torch.finfo(dtype).eps
    assert tri.matvecs == 75
    assert not tri.exact.any()
    assert tri.basis is not None
    for i in range(3):
        V = tri.basis[i].cpu().double()
        assert V.shape == (25, P)
        assert torch.allclose(V @ V.T, torch.eye(25, dtype=torch.float64), atol=tol, rtol=0)
        product = V @ M.cpu().double()
        T = dense(tri, i)
        left = product - T @ V
        assert float(left[:-1].abs().max()) <= tol * float(T.abs().max())
        assert float(left[-1].norm()) == pytest.approx(float(tri.betas[i, -1]), rel=1e-3)
        assert float((V @ M.cpu().double() @ V.T - T).norm()) <= 20 * float(tri.rounding[i]) + tol * 1e-3 * scale
    assert torch.allclose(tri.norms, V0.double().norm(dim=0).cpu())
    assert bool((tri.rounding < 1e3 * torch.finfo(dtype).eps * 100 * scale).all())


def test_long_runs_stay_orthogonal() -> None:
    M = matrix(1e-6 + torch.logspace(-9, 4, 200, dtype=torch.float64))
    tri = lanczos(lambda V: M @ V, starts(2, size=200), 190)
    assert tri.basis is not None
    for V in tri.basis:
        assert float((V @ V.T - torch.eye(190, dtype=torch.float64)).abs().max()) < 1e-12
    assert float(tri.rounding.max()) < 1e-14 * 1e4 * 10


def test_extending_is_one_longer_run() -> None:
    M = matrix(torch.logspace(-3, 1, P, dtype=torch.float64))
    calls: list[int] = []

    def counted(V: Tensor) -> Tensor:
        calls.append(V.shape[1])
        return M @ V

    whole = lanczos(lambda V: M @ V, starts(4), 30)
    parts = extend(counted, extend(counted, lanczos(counted, starts(4), 8), 1), 21)
    assert sum(calls) == parts.matvecs == whole.matvecs == 120
    assert torch.allclose(parts.alphas, whole.alphas, atol=1e-10)
    assert torch.allclose(parts.betas, whole.betas, atol=1e-10)
    assert parts.basis is not None
    assert parts.basis.shape == (4, 30, P)


def test_full_depth_is_the_matrix() -> None:
    M = matrix(torch.linspace(-1, 3, 20, dtype=torch.float64))
    tri = lanczos(lambda V: M @ V, starts(2, size=20), 50)
    assert tri.steps == 20
    assert tri.exact.all()
    assert torch.equal(tri.depth, torch.tensor([20, 20]))
    for i in range(2):
        assert torch.allclose(torch.linalg.eigvalsh(dense(tri, i)), torch.linalg.eigvalsh(M), atol=1e-12)


def test_each_column_ends_where_its_space_does(dtype: torch.dtype) -> None:
    Q = torch.eye(P, dtype=torch.float64)  # a diagonal matrix: the spaces are invariant without rounding
    values = torch.cat([torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64), torch.linspace(0.1, 1, P - 3)])
    M = ((Q * values) @ Q.T).to(dtype)
    V0 = torch.stack([Q[:, 0], Q[:, 0] + Q[:, 1], Q.sum(1), Q[:, 1] - 2 * Q[:, 0] + Q[:, 2]], dim=1).to(dtype)
    widths: list[int] = []

    def counted(V: Tensor) -> Tensor:
        widths.append(V.shape[1])
        return M @ V

    tri = lanczos(counted, V0, 12)
    assert tri.depth.tolist() == [1, 2, 12, 3]
    assert tri.exact.tolist() == [True, True, False, True]
    assert widths[:4] == [4, 3, 2, 1]
    assert set(widths[3:]) == {1}
    assert tri.matvecs == sum(widths)
    tol = 1e3 * torch.finfo(dtype).eps
    assert torch.allclose(torch.linalg.eigvalsh(dense(tri, 3)[:3, :3]), values[[2, 1, 0]], atol=tol)
    assert not tri.betas[[0, 1, 3], tri.depth[[0, 1, 3]] - 1].any()


def test_identity_and_aliasing_products() -> None:
    V0 = starts(3)
    kept = V0.clone()
    tri = lanczos(lambda V: V, V0, 5)
    assert tri.steps == 1
    assert tri.exact.all()
    assert torch.allclose(tri.alphas, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(V0, kept)


def test_zero_matrix_and_zero_column() -> None:
    tri = lanczos(torch.zeros_like, starts(2), 5)
    assert tri.exact.all()
    assert not tri.alphas.any()
    V0 = starts(2)
    V0[:, 1] = 0
    mixed = lanczos(lambda V: 2 * V, V0, 5)
    assert mixed.depth.tolist() == [1, 0]
    assert mixed.norms[1] == 0


def test_refusals() -> None:
    M = matrix(torch.linspace(1, 2, P, dtype=torch.float64))
    with pytest.raises(ShapeError, match="steps >= 1"):
        lanczos(lambda V: M @ V, starts(1), 0)
    with pytest.raises(ShapeError, match=r"shape \(P, m\)"):
        lanczos(lambda V: M @ V, starts(1)[:, 0], 3)
    with pytest.raises(ShapeError, match="matmat returned"):
        lanczos(lambda V: M[:3] @ V, starts(1), 3)
    with pytest.raises(DataError, match="start vector"):
        lanczos(lambda V: M @ V, starts(1) * float("nan"), 3)
    with pytest.raises(DataError, match="Lanczos step 0 holds NaN"):
        lanczos(lambda V: M @ V * float("nan"), starts(1), 3)
    done = lanczos(lambda V: M @ V, starts(1), 3, basis=False)
    assert done.basis is None
    with pytest.raises(ShapeError, match="did not keep their basis"):
        extend(lambda V: M @ V, done, 1)
    with pytest.raises(ShapeError, match="more_steps >= 1"):
        extend(lambda V: M @ V, lanczos(lambda V: M @ V, starts(1), 3), 0)


def test_asymmetry_is_found(dtype: torch.dtype) -> None:
    M = matrix(torch.linspace(1, 2, P, dtype=torch.float64))
    M = (M + 0.2 * torch.triu(starts(P, 3), 1)).to(dtype)
    with pytest.raises(DataError, match="not symmetric"):
        lanczos(lambda V: M @ V, starts(2).to(dtype), 20)


def test_no_graph_is_built() -> None:
    M = matrix(torch.linspace(1, 2, P, dtype=torch.float64)).requires_grad_()
    tri = lanczos(lambda V: M @ V, starts(2).requires_grad_(), 4)
    assert not tri.alphas.requires_grad
    assert tri.basis is not None
    assert not tri.basis.requires_grad
