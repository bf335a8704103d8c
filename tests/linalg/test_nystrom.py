"""Nyström approximation and preconditioner against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg.cg import cg
from curvops.linalg.nystrom import grown_nystrom, nystrom

P = 150


def rotation() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]


def matrix(values: Tensor) -> Tensor:
    Q = rotation()
    return (Q * values) @ Q.T


def dense(product, size: int = P, dtype: torch.dtype = torch.float64) -> Tensor:
    return product(torch.eye(size, dtype=dtype))


DECAY = 100 * torch.arange(1, P + 1, dtype=torch.float64) ** -2


@pytest.mark.parametrize("shift", [0.0, 0.3, 1e3])
def test_exact_for_low_rank_and_never_above(generator: torch.Generator, dtype: torch.dtype, shift: float) -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[:8] = torch.linspace(1, 5, 8, dtype=torch.float64)
    M = matrix(values)
    A = M + shift * torch.eye(P, dtype=torch.float64)
    found = nystrom(lambda V: A.to(dtype) @ V, P, rank=12, generator=generator, dtype=dtype, shift=shift)
    # Roundoff of the shifted products, amplified by the square root that the core goes through.
    u = torch.finfo(dtype).eps * (5 + shift)
    approximation = dense(found.matmat, dtype=dtype).double()
    assert float(torch.linalg.matrix_norm(approximation - M, 2)) < 200 * u
    assert found.matvecs == 12
    assert found.rank == 12
    torch.testing.assert_close(
        found.U.T @ found.U, torch.eye(12, dtype=dtype), rtol=0, atol=1e3 * torch.finfo(dtype).eps
    )
    assert bool((found.values >= 0).all())
    assert bool((found.values[1:] <= found.values[:-1]).all())


def test_is_the_nystrom_formula(generator: torch.Generator) -> None:
    M = matrix(DECAY)
    tests = []

    def matmat(V: Tensor) -> Tensor:
        tests.append(V.clone())
        return M @ V

    found = nystrom(matmat, P, rank=20, generator=generator)
    Omega = tests[0]
    exact = M @ Omega @ torch.linalg.inv(Omega.T @ M @ Omega) @ Omega.T @ M
    torch.testing.assert_close(dense(found.matmat), exact, rtol=0, atol=1e-9)
    gap = torch.linalg.eigvalsh(M - dense(found.matmat))
    assert float(gap[0]) > -1e-10
    error = found.error(lambda V: M @ V, generator=generator, steps=20)
    assert 0.9 * float(gap[-1]) < error <= float(gap[-1]) * (1 + 1e-9)


def test_preconditioner_is_the_inverse_of_its_definition(generator: torch.Generator) -> None:
    found = nystrom(lambda V: matrix(DECAY) @ V, P, rank=15, generator=generator)
    U, last, eye = found.U, found.values[-1], torch.eye(P, dtype=torch.float64)
    for delta in (0.0, 1e-3, 2.0):
        forward = U @ torch.diag((found.values + delta) / (last + delta)) @ U.T + eye - U @ U.T
        torch.testing.assert_close(dense(found.preconditioner(delta)) @ forward, eye, rtol=0, atol=1e-10)
    D = torch.linspace(0.1, 3, P, dtype=torch.float64)
    forward = U @ torch.diag(found.values - last) @ U.T + torch.diag(D + last)
    torch.testing.assert_close(dense(found.preconditioner(D)) @ forward, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vector", [False, True])
def test_preconditioned_cg_takes_fewer_products_in_all(generator: torch.Generator, vector: bool) -> None:
    delta = torch.linspace(0.5e-3, 2e-3, P, dtype=torch.float64) if vector else 1e-3
    M = matrix(DECAY)
    A = M + (torch.diag(delta) if isinstance(delta, Tensor) else delta * torch.eye(P, dtype=torch.float64))
    B = torch.randn(P, 1, generator=generator, dtype=torch.float64)
    found = nystrom(lambda V: M @ V, P, rank=60, generator=generator)
    _, plain = cg(lambda V: A @ V, B, rtol=1e-8)
    X, report = cg(lambda V: A @ V, B, rtol=1e-8, preconditioner=found.preconditioner(delta))
    assert report.converged
    assert float((A @ X - B).norm() / B.norm()) <= 1e-8
    assert report.matvecs + found.matvecs < 0.75 * plain.matvecs


def test_growing_stops_at_the_damping_and_repeats_no_product(generator: torch.Generator, dtype: torch.dtype) -> None:
    M = matrix(DECAY).to(dtype)
    seen: list[Tensor] = []

    def matmat(V: Tensor) -> Tensor:
        seen.append(V.clone())
        return M @ V

    found = grown_nystrom(matmat, P, delta=0.05, max_rank=P, rank=5, generator=generator, dtype=dtype)
    assert [V.shape[1] for V in seen] == [5, 5, 10, 20][: len(seen)]
    assert found.matvecs == found.rank == sum(V.shape[1] for V in seen)
    assert float(found.values[-1]) <= 0.5
    Omega = torch.cat(seen, 1)
    eye = torch.eye(found.rank, dtype=dtype)
    torch.testing.assert_close(Omega.T @ Omega, eye, rtol=0, atol=100 * torch.finfo(dtype).eps)
    capped = grown_nystrom(lambda V: M @ V, P, delta=1e-6, max_rank=23, generator=generator, dtype=dtype)
    assert capped.rank == 23


def test_full_rank_is_exact(generator: torch.Generator) -> None:
    M = matrix(DECAY)
    found = grown_nystrom(lambda V: M @ V, P, delta=1e-9, max_rank=P, generator=generator)
    assert found.rank == P
    torch.testing.assert_close(dense(found.matmat), M, rtol=0, atol=1e-10)


def test_zero_matrix(generator: torch.Generator) -> None:
    found = nystrom(lambda V: 0 * V, P, rank=3, generator=generator)
    assert torch.equal(found.values, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(dense(found.preconditioner(2.0)), torch.eye(P, dtype=torch.float64))


def test_bad_input(generator: torch.Generator) -> None:
    M = matrix(DECAY)
    for rank in (0, P + 1):
        with pytest.raises(ShapeError, match="1 <= rank"):
            nystrom(lambda V: M @ V, P, rank=rank, generator=generator)
    with pytest.raises(ShapeError, match="1 <= rank"):
        grown_nystrom(lambda V: M @ V, P, delta=1.0, max_rank=P + 1, generator=generator)
    with pytest.raises(ValueError, match="delta"):
        grown_nystrom(lambda V: M @ V, P, delta=0.0, max_rank=P, generator=generator)
    with pytest.raises(DataError, match="NaN"):
        nystrom(lambda V: math.nan * V, P, rank=3, generator=generator)
    with pytest.raises(NotPositiveDefiniteError, match="not positive semidefinite"):
        nystrom(lambda V: -(M @ V), P, rank=3, generator=generator)
    found = nystrom(lambda V: M @ V, P, rank=3, generator=generator)
    with pytest.raises(ValueError, match="delta"):
        found.preconditioner(-1.0)
    with pytest.raises(ValueError, match="delta"):
        found.preconditioner(-torch.ones(P, dtype=torch.float64))
    with pytest.raises(ShapeError, match="delta"):
        found.preconditioner(torch.ones(P + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="delta"):
        nystrom(lambda V: 0 * V, P, rank=3, generator=generator).preconditioner(0.0)
