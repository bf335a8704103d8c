"""MINRES on indefinite and singular systems; bad input and certificates are tested beside CG's."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

from curvops.linalg.cg import cg
from curvops.linalg.minres import minres

P = 100


def problem(values: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = values.numel()
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (Q * values) @ Q.T, torch.randn(size, 4, generator=generator, dtype=torch.float64)


def indefinite() -> Tensor:
    return torch.cat((torch.linspace(-2, -0.2, 40), torch.linspace(0.1, 3, P - 40))).double()


def singular() -> Tensor:
    return torch.cat((torch.zeros(20), torch.linspace(-2, -0.2, 30), torch.linspace(0.1, 3, P - 50))).double()


def residual(M: Tensor, X: Tensor, B: Tensor) -> Tensor:
    return torch.linalg.vector_norm(B - M @ X, dim=0) / torch.linalg.vector_norm(B, dim=0)


def test_indefinite_against_dense_solve(dtype: torch.dtype) -> None:
    M, B = problem(indefinite())
    B[:, 2] = 0
    rtol = 1e-11 if dtype == torch.float64 else 1e-5
    X, report = minres(lambda V: M.to(dtype) @ V, B.to(dtype), rtol=rtol)
    assert report.converged
    exact = torch.linalg.solve(M, B)
    assert float((X.double() - exact).norm() / exact.norm()) < 50 * rtol
    assert torch.equal(X[:, 2], torch.zeros(P, dtype=dtype))


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_each_iterate_minimises_the_residual_over_its_krylov_space(steps: int) -> None:
    M, B = problem(indefinite())
    _, report = minres(lambda V: M @ V, B, rtol=1e-13, max_iters=steps)
    for j in range(B.shape[1]):
        K = [B[:, j] / B[:, j].norm()]
        for _ in range(steps - 1):
            w = M @ K[-1]
            for _ in range(2):
                for k in K:
                    w = w - (k @ w) * k
            K.append(w / w.norm())
        V = torch.stack(K, 1)
        y = torch.linalg.lstsq(M @ V, B[:, j]).solution
        best = float((B[:, j] - M @ V @ y).norm() / B[:, j].norm())
        assert float(report.residual[j]) == pytest.approx(best, rel=1e-8)


def test_as_many_products_as_scipy() -> None:
    M, B = problem(indefinite())
    calls = 0

    def product(v):
        nonlocal calls
        calls += 1
        return M.numpy() @ v

    from scipy.sparse.linalg import LinearOperator

    scipy_minres(LinearOperator((P, P), matvec=product, dtype=float), B[:, 0].numpy(), rtol=1e-9)
    _, report = minres(lambda V: M @ V, B[:, :1], rtol=1e-8)
    assert report.converged
    assert report.matvecs <= calls + 5


def test_consistent_singular_gives_the_minimum_norm_solution(dtype: torch.dtype) -> None:
    M, B = problem(singular())
    B = M @ B
    rtol = 1e-11 if dtype == torch.float64 else 1e-5
    X, report = minres(lambda V: M.to(dtype) @ V, B.to(dtype), rtol=rtol)
    assert report.converged
    least = torch.linalg.pinv(M, hermitian=True, rtol=1e-10) @ B
    assert float((X.double() - least).norm() / least.norm()) < 50 * rtol


def test_inconsistent_singular_is_named(dtype: torch.dtype) -> None:
    M, B = problem(singular())
    X, report = minres(lambda V: M.to(dtype) @ V, B.to(dtype), rtol=1e-5)
    assert not report.converged
    assert "not in the range" in report.reason
    assert bool(torch.isfinite(X).all())
    # The residual is near the least possible one, ‖(I − A A⁺) b‖.
    least = residual(M, torch.linalg.pinv(M, hermitian=True, rtol=1e-10) @ B, B)
    assert bool((report.residual.double() < 1.5 * least).all())
    _, report = minres(lambda V: 0 * V, B.to(dtype), rtol=1e-5)
    assert not report.converged
    assert "not in the range" in report.reason


def test_preconditioner_saves_iterations_on_an_indefinite_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(-3, 1, P, dtype=torch.float64)
    values[::3] *= -1
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]
    M = (Q * values) @ Q.T
    # |A|⁻¹ off by up to 20 %: eigenvalues of the preconditioned matrix near ±1.
    inverse = (Q / (values.abs() * torch.linspace(0.9, 1.1, P, dtype=torch.float64))) @ Q.T
    B = torch.randn(P, 3, generator=generator, dtype=torch.float64)
    _, plain = minres(lambda V: M @ V, B, rtol=1e-9)
    X, report = minres(lambda V: M @ V, B, rtol=1e-9, preconditioner=lambda R: inverse @ R)
    assert report.converged
    assert report.iterations < 40 < plain.iterations
    assert float(residual(M, X, B).max()) <= 1e-9


def test_start_and_float32_limits() -> None:
    M, B = problem(indefinite())
    exact = torch.linalg.solve(M, B)
    _, report = minres(lambda V: M @ V, B, rtol=1e-9, x0=exact)
    assert (report.converged, report.matvecs, report.iterations) == (True, 4, 0)
    hard, B = problem(torch.logspace(-4, 0, P, dtype=torch.float64))
    X, report = minres(lambda V: hard.float() @ V, B.float(), rtol=1e-7)
    assert not report.converged
    assert "float32 attains" in report.reason
    torch.testing.assert_close(
        report.residual.double(), residual(hard.float().double(), X.double(), B.float().double()), rtol=0.5, atol=1e-6
    )


def test_positive_definite_like_cg() -> None:
    M, B = problem(torch.linspace(1, 10, P, dtype=torch.float64))
    X, report = minres(lambda V: M @ V, B, rtol=1e-10)
    Y, other = cg(lambda V: M @ V, B, rtol=1e-10)
    assert report.converged
    assert report.iterations <= other.iterations + 2
    assert float((X - Y).norm() / Y.norm()) < 1e-8
    assert math.isfinite(report.seconds)
