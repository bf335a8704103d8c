"""Dense factorisations: values, the limits of the jitter, gradients."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg.dense import cholesky, eigh, logdet_cholesky, slogdet, solve_cholesky

P = 40


def matrix(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(values.numel(), values.numel(), generator=generator, dtype=torch.float64))[0]
    M = (Q * values) @ Q.T
    return (M + M.T) / 2


def test_definite_matrices_get_no_jitter(dtype: torch.dtype) -> None:
    values = torch.linspace(0.1, 4, P, dtype=torch.float64)
    M = matrix(values).to(dtype)
    L, jitter = cholesky(M)
    assert jitter == 0.0
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(L @ L.T, M, rtol=0, atol=20 * u)
    assert torch.equal(L, L.tril())
    assert float(logdet_cholesky(L)) == pytest.approx(float(values.log().sum()), rel=200 * u)
    B = torch.ones(P, 2, dtype=dtype)
    X = solve_cholesky(L, B)
    assert float((M @ X - B).norm() / B.norm()) < 200 * u
    torch.testing.assert_close(solve_cholesky(L, B[:, 0]), X[:, 0])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_semidefinite_matrices_get_a_jitter_of_rounding_size(dtype: torch.dtype, scale: float) -> None:
    u = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(3)
    # J Jᵀ of rank 5: semidefinite but for rounding, which is what Gram matrices are.
    J = math.sqrt(scale) * torch.randn(P, 5, generator=generator, dtype=torch.float64).to(dtype)
    M = J @ J.T
    norm = float(torch.linalg.matrix_norm(M.double(), 2))
    L, jitter = cholesky(M)
    assert 0 <= jitter <= 50 * math.sqrt(P) * u * norm
    assert float((L @ L.T - M).norm()) <= 2 * math.sqrt(P) * jitter + 50 * u * norm


@pytest.mark.parametrize("relative", [1e-3, 1.0])
def test_an_indefinite_matrix_is_not_repaired(dtype: torch.dtype, relative: float) -> None:
    values = torch.linspace(0.1, 4, P, dtype=torch.float64)
    values[0] = -4 * relative
    with pytest.raises(NotPositiveDefiniteError, match=r"smallest eigenvalue is \S+,") as raised:
        cholesky(matrix(values).to(dtype))
    found = re.search(r"smallest eigenvalue is (\S+),", str(raised.value))
    assert found is not None
    assert abs(float(found[1]) + 4 * relative) <= P * torch.finfo(dtype).eps * 4 + 5e-4 * relative  # four digits


def test_the_ladder_ends_at_rounding() -> None:
    u = torch.finfo(torch.float64).eps
    values = torch.ones(P, dtype=torch.float64)
    for low, passes in ((-2 * u, True), (-1e-12, False)):
        values[0] = low
        if passes:
            _, jitter = cholesky(torch.diag(values))
            assert 0 < jitter < 1e-13
        else:
            with pytest.raises(NotPositiveDefiniteError, match="add_diagonal"):
                cholesky(torch.diag(values))
    values[0] = 0.0
    with pytest.raises(NotPositiveDefiniteError):
        cholesky(torch.diag(values), jitter=False)
    with pytest.raises(NotPositiveDefiniteError):
        cholesky(torch.zeros(3, 3))


def test_eigh_and_slogdet() -> None:
    values = torch.linspace(-1, 4, P, dtype=torch.float64)
    M = matrix(values)
    found, vectors = eigh(M)
    torch.testing.assert_close(found, values, atol=1e-12, rtol=0)
    torch.testing.assert_close(M @ vectors, vectors * found, atol=1e-12, rtol=0)
    sign, logabs = slogdet(M)
    assert float(sign) == float(values.sign().prod())
    assert float(logabs) == pytest.approx(float(values.abs().log().sum()), rel=1e-10)
    sign, logabs = slogdet(torch.zeros(2, 2))
    assert (float(sign), float(logabs)) == (0.0, -math.inf)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def definite(R: Tensor) -> Tensor:
        return R @ R.T + torch.eye(5, dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda R: logdet_cholesky(cholesky(definite(R))[0]), R)
    assert torch.autograd.gradcheck(lambda R, b: solve_cholesky(cholesky(definite(R))[0], b), (R, b))
    assert torch.autograd.gradcheck(lambda R: eigh(definite(R))[0], R)
    assert torch.autograd.gradcheck(lambda R: slogdet(definite(R))[1], R)
    # Through a jittered factor, too.
    J = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    L, jitter = cholesky(J @ J.T)
    (gradient,) = torch.autograd.grad(L.sum(), J)
    assert jitter > 0
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("function", [cholesky, eigh, slogdet])
def test_bad_input(function) -> None:
    with pytest.raises(ShapeError, match=r"expected \(P, P\)"):
        function(torch.ones(3, 4))
    with pytest.raises(ShapeError, match="float16"):
        function(torch.eye(3).half())
    with pytest.raises(DataError, match="NaN"):
        function(torch.full((3, 3), math.nan))


def test_a_right_hand_side_of_the_wrong_length() -> None:
    with pytest.raises(ShapeError, match=r"expected \(3,\) or \(3, K\)"):
        solve_cholesky(torch.eye(3), torch.ones(4, 1))
