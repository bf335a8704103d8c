"""Eigenpairs against prescribed spectra, multiple eigenvalues above all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.linalg.eigenpairs import eigsh

P = 200


def matrix(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(values.numel(), values.numel(), generator=generator, dtype=torch.float64))[0]
    return (Q * values) @ Q.T


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    ordered = values.sort().values
    if which == "LA":
        return ordered[-k:]
    if which == "SA":
        return ordered[:k]
    if which == "BE":
        return torch.cat((ordered[: k // 2], ordered[values.numel() - (k - k // 2) :]))
    by_size = values[values.abs().argsort(descending=which == "LM")]
    return by_size[:k].sort().values


SPECTRA = {
    "decay": 10 * torch.arange(1, P + 1, dtype=torch.float64) ** -1.0,
    "fivefold": torch.cat(
        (torch.full((5,), 3.0), torch.full((5,), 2.0), torch.full((5,), -4.0), torch.linspace(-1.01, 1, P - 15))
    ).double(),
    "low rank": torch.cat((torch.full((5,), 7.0), torch.linspace(1, 2, 5), torch.zeros(P - 10))).double(),
    "negative": -(torch.linspace(1, 2, P, dtype=torch.float64) ** 2),
}


def check(M: Tensor, pairs, values: Tensor, k: int, which: str) -> None:
    scale = float(values.abs().max())
    u = torch.finfo(M.dtype).eps
    expected = wanted(values, k, which)
    found = pairs.values.double()
    assert bool((found[1:] >= found[:-1]).all())
    torch.testing.assert_close(found, expected, rtol=0, atol=(1e3 if u < 1e-10 else 30) * u * scale)
    V = pairs.vectors.double()
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=torch.float64), rtol=0, atol=100 * u)
    residuals = torch.linalg.vector_norm(M.double() @ V - V * found, dim=0)
    torch.testing.assert_close(pairs.residuals.double(), residuals, rtol=1e-3, atol=50 * u * scale)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_ends_of_the_spectrum(spectrum: str, which: str, k: int, dtype: torch.dtype) -> None:
    values = SPECTRA[spectrum]
    M = matrix(values).to(dtype)
    columns = 0

    def matmat(V: Tensor) -> Tensor:
        nonlocal columns
        assert V.dtype == dtype
        columns += V.shape[1]
        return M @ V

    pairs, report = eigsh(matmat, P, k, which=which, dtype=dtype)
    assert report.converged, report.reason
    assert report.matvecs == columns
    assert report.algorithm == "ARPACK"
    check(M, pairs, values, k, which)


@pytest.mark.parametrize("k", [1, 4])
def test_smallest_in_size(k: int) -> None:
    values = torch.cat(
        (torch.linspace(-3, -0.5, 100), torch.tensor([-0.01, 0.02, 0.03, -0.04]), torch.linspace(1, 3, 96))
    )
    M = matrix(values.double())
    pairs, report = eigsh(lambda V: M @ V, P, k, which="SM")
    assert report.converged
    check(M, pairs, values.double(), k, "SM")


def test_shift_invert_finds_the_nearest() -> None:
    values = torch.linspace(-1, 1, P, dtype=torch.float64)
    M = matrix(values)
    sigma = 0.1234
    inverse = torch.linalg.inv(M - sigma * torch.eye(P, dtype=torch.float64))
    pairs, report = eigsh(lambda V: M @ V, P, 4, sigma=sigma, solve=lambda V: inverse @ V)
    assert report.converged
    nearest = values[(values - sigma).abs().argsort()[:4]].sort().values
    torch.testing.assert_close(pairs.values, nearest, rtol=0, atol=1e-10)
    # SciPy's meaning of `which` with sigma: largest 1/(λ − σ) are the eigenvalues just above.
    pairs, _ = eigsh(lambda V: M @ V, P, 3, which="LA", sigma=sigma, solve=lambda V: inverse @ V)
    torch.testing.assert_close(pairs.values, values[values > sigma][:3], rtol=0, atol=1e-10)
    with pytest.raises(UnsupportedError, match="solve"):
        eigsh(lambda V: M @ V, P, 4, sigma=sigma)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (12, 12), (30, 29), (30, 30)])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE", "SM"])
def test_small_matrices_are_answered_densely(size: int, k: int, which: str) -> None:
    values = torch.linspace(-1.03, 2, size, dtype=torch.float64)
    M = matrix(values)
    pairs, report = eigsh(lambda V: M @ V, size, k, which=which)
    assert (report.converged, report.algorithm, report.matvecs) == (True, "dense eigh", size)
    check(M, pairs, values, k, which)


@pytest.mark.parametrize("copies", [2, 5, 12])
def test_every_copy_of_a_multiple_eigenvalue_is_found(copies: int, dtype: torch.dtype) -> None:
    # In exact arithmetic a Krylov space holds one of the copies; with a diagonal matrix, nearly so in floating point.
    values = torch.cat((torch.full((copies,), 5.0), torch.linspace(0, 4, P - copies))).double()
    pairs, report = eigsh(lambda V: values.to(dtype)[:, None] * V, P, copies + 1, dtype=dtype)
    assert report.converged, report.reason
    check(torch.diag(values).to(dtype), pairs, values, copies + 1, "LA")


def test_a_loose_tolerance_costs_fewer_products() -> None:
    M = matrix(torch.linspace(0, 1, P, dtype=torch.float64))
    tight, report = eigsh(lambda V: M @ V, P, 3)
    loose, quick = eigsh(lambda V: M @ V, P, 3, tol=1e-2)
    assert quick.matvecs < report.matvecs
    assert float((loose.values - tight.values).abs().max()) <= 1e-2
    assert float(loose.residuals.max()) <= 2e-2


def test_a_run_that_is_cut_short_returns_what_it_has() -> None:
    values = torch.linspace(1, 1.1, 400, dtype=torch.float64)
    M = matrix(values)
    pairs, report = eigsh(lambda V: M @ V, 400, 6, max_iters=2)
    assert not report.converged
    assert pairs.values.numel() < 6
    assert "raise max_iters" in report.reason
    assert pairs.vectors.shape == (400, pairs.values.numel())


def test_same_seed_same_bits_and_no_global_generator() -> None:
    M = matrix(SPECTRA["decay"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, _ = eigsh(lambda V: M @ V, P, 3)
    two, _ = eigsh(lambda V: M @ V, P, 3)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(5)
    three, _ = eigsh(lambda V: M @ V, P, 3, generator=generator)
    torch.testing.assert_close(three.values, one.values, rtol=0, atol=1e-12)
    four, report = eigsh(lambda V: M @ V, P, 3, v0=one.vectors.sum(1))
    assert report.converged
    torch.testing.assert_close(four.values, one.values, rtol=0, atol=1e-10)


def test_zero_and_identity() -> None:
    for multiple in (0.0, 1.0, -2.0):
        pairs, report = eigsh(lambda V, c=multiple: c * V, 50, 3)
        assert report.converged, report.reason
        torch.testing.assert_close(pairs.values, torch.full((3,), multiple, dtype=torch.float64), rtol=0, atol=1e-12)
        V = pairs.vectors
        torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_bad_input() -> None:
    for k in (0, 6):
        with pytest.raises(ShapeError, match="1 <= k <= 5"):
            eigsh(lambda V: V, 5, k)
    with pytest.raises(ValueError, match="which"):
        eigsh(lambda V: V, 50, 2, which="LR")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tol"):
        eigsh(lambda V: V, 50, 2, tol=-1.0)
    with pytest.raises(ShapeError, match="v0"):
        eigsh(lambda V: V, 50, 2, v0=torch.ones(49))
    with pytest.raises(ShapeError, match="float16"):
        eigsh(lambda V: V, 50, 2, dtype=torch.float16)
    for size in (50, 4):
        with pytest.raises(DataError, match="NaN"):
            eigsh(lambda V: V * math.nan, size, 2)
