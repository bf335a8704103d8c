"""Trace and diagonal estimators against exact values and against their naive definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectra import matrix, spectra
from torch import Tensor

from curvops.errors import ShapeError
from curvops.linalg import xtrace as xtrace_module
from curvops.linalg.probes import gaussian, rademacher
from curvops.linalg.traces import Moments, block_traces, hutchinson_diagonal, hutchinson_trace
from curvops.linalg.xtrace import xdiag, xtrace

P = 150
TRACES = [hutchinson_trace, xtrace]
DIAGONALS = [hutchinson_diagonal, xdiag]


class Counted:
    def __init__(self, M: Tensor) -> None:
        self.M, self.columns = M, 0

    def __call__(self, V: Tensor) -> Tensor:
        self.columns += V.shape[1]
        return self.M @ V


@pytest.mark.parametrize("estimator", TRACES)
@pytest.mark.parametrize("kind", spectra(P))
def test_trace_meets_its_target(estimator: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    product = Counted(matrix(spectra(P)[kind]).to(dtype))
    exact = float(product.M.double().trace())
    value, report = estimator(product, P, dtype=dtype)
    assert report.converged, report.reason
    assert report.half_width <= 0.01 * abs(value)
    assert abs(value - exact) <= 3 * report.half_width + 1e-5 * abs(exact)
    assert report.matvecs == product.columns
    assert report.matvecs <= 3 * P


@pytest.mark.parametrize("estimator", DIAGONALS)
@pytest.mark.parametrize("kind", spectra(P))
def test_diagonal_meets_its_target(estimator: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    product = Counted(matrix(spectra(P)[kind]).to(dtype))
    exact = product.M.double().diagonal()
    value, report = estimator(product, P, dtype=dtype)
    assert report.converged, report.reason
    assert value.shape == report.stderr.shape == report.half_width.shape == (P,)
    assert value.dtype == dtype
    assert float(report.half_width.norm()) <= 0.05 * float(value.norm()) * (1 + 1e-5)
    assert float((value - exact).norm()) <= 0.05 * float(exact.norm())
    assert report.matvecs == product.columns


@pytest.mark.parametrize("estimator", TRACES + DIAGONALS)
def test_estimates_are_unbiased_and_their_errors_honest(estimator: Callable[..., Any]) -> None:
    M = matrix(spectra(P)["geometric"])
    exact = M.diagonal() if estimator in DIAGONALS else M.trace()
    runs = [estimator(lambda V: M @ V, P, probes=12, seed=s) for s in range(200)]
    values = torch.stack([torch.as_tensor(value) for value, _ in runs])
    claimed = torch.stack([torch.as_tensor(report.stderr) for _, report in runs])
    spread = values.std(0)
    assert bool(((values.mean(0) - exact).abs() < 5 * spread / 200**0.5).all())
    # Root mean square of the claimed standard errors against the actual spread.
    ratio = (claimed.square().mean().sqrt() / spread.square().mean().sqrt()).item()
    assert 0.85 < ratio < (1.15 if estimator in (hutchinson_trace, hutchinson_diagonal) else 2.2)
    assert all(report.probes == 12 and report.converged for _, report in runs)
    assert all(report.matvecs == (24 if estimator in (xtrace, xdiag) else 12) for _, report in runs)


def test_fixed_probes_average_the_quadratic_forms() -> None:
    M = matrix(spectra(P)["power law"])
    seen: list[Tensor] = []

    def product(V: Tensor) -> Tensor:
        seen.append(V.clone())
        return M @ V

    value, report = hutchinson_trace(product, P, probes=100)
    Z = torch.cat(seen, dim=1)
    samples = ((M @ Z) * Z).sum(0)
    assert Z.shape == (P, 100)
    assert value == pytest.approx(float(samples.mean()), rel=1e-12)
    assert report.stderr == pytest.approx(float(samples.std()) / 10, rel=1e-12)
    assert report.half_width == pytest.approx(1.9842169515086827 * report.stderr, rel=1e-9)


def naive_leave_one_out(M: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """XTrace's and XDiag's estimates by their definition: a QR factorisation per left-out vector."""
    m, traces, diagonals = omega.shape[1], [], []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        Q = torch.linalg.qr(M @ omega[:, others])[0]
        w = omega[:, i] - Q @ (Q.T @ omega[:, i])
        w = w * (len(M) - m + 1) ** 0.5 / w.norm()
        traces.append((Q.T @ M @ Q).trace() + w @ M @ w)
        left = M - Q @ (Q.T @ M)
        diagonals.append((Q @ (Q.T @ M)).diagonal() + omega[:, i] * (left @ omega[:, i]))
    return torch.stack(traces), torch.stack(diagonals, dim=1)


@pytest.mark.parametrize("batches", [(9,), (4, 5), (1, 2, 6)])
def test_xtrace_and_xdiag_are_their_definitions(batches: tuple[int, ...]) -> None:
    M = matrix(spectra(P)["power law"])
    for draw, samples in ((gaussian, xtrace_module._trace_samples), (rademacher, xtrace_module._diagonal_samples)):
        omega = draw(P, 0, 9, seed=1, dtype=torch.float64, device="cpu")
        if draw is gaussian:
            omega = omega * P**0.5 / omega.norm(dim=0)
        sketch = xtrace_module._Sketch(lambda V: M @ V, P, torch.float64, "cpu")
        start = 0
        for count in batches:
            sketch.add(omega[:, start : start + count])
            start += count
        expected = naive_leave_one_out(M, omega)[0 if draw is gaussian else 1]
        assert torch.allclose(samples(sketch), expected, rtol=1e-8, atol=1e-8)
        assert sketch.matvecs == 18


@pytest.mark.parametrize("estimator", [xtrace, xdiag])
def test_low_rank_is_exact(estimator: Callable[..., Any], dtype: torch.dtype) -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[:6] = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    M = matrix(values).to(dtype)
    value, report = estimator(lambda V: M @ V, P, probes=12, dtype=dtype)
    exact = M.double().trace() if estimator is xtrace else M.double().diagonal()
    tol = 2e3 * torch.finfo(dtype).eps
    assert float((torch.as_tensor(value) - exact).abs().max()) <= tol * 32
    assert float(torch.as_tensor(report.half_width).max()) <= tol * 32


def test_unit_vectors_when_they_cost_no_more() -> None:
    product = Counted(matrix(spectra(P)["one outlier"]))
    value, report = hutchinson_trace(product, P)
    assert "unit vectors" in report.algorithm
    assert value == pytest.approx(float(product.M.trace()), rel=1e-12)
    assert report.half_width == 0
    assert report.matvecs == product.columns


def test_bounds_on_growth_are_kept_and_said() -> None:
    M = matrix(spectra(P)["one outlier"])
    for estimator in (hutchinson_trace, hutchinson_diagonal):
        _, report = estimator(lambda V: M @ V, P, max_probes=40)
        assert not report.converged
        assert report.probes == 40
        assert "did not meet" in report.reason
    _, report = xtrace(lambda V: V * torch.linspace(1, 2, P)[:, None], P, rtol=1e-9, max_probes=30)
    assert not report.converged
    assert report.probes == 30


def test_an_asymmetric_matrix_has_a_trace() -> None:
    M = torch.randn(P, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.eye(P)
    value, report = hutchinson_trace(lambda V: M @ V, P, probes=40)
    assert abs(value - float(M.trace())) <= 2 * report.half_width


def test_block_traces_share_a_run() -> None:
    product = Counted(matrix(spectra(P)["geometric"]))
    blocks = {"weight": slice(0, 100), "bias": slice(100, 140), "scattered": torch.tensor([3, 149, 7])}
    value, report = block_traces(product, P, blocks, rtol=0.2)
    assert list(value) == list(blocks)
    exact = torch.stack([product.M.diagonal()[part].sum() for part in blocks.values()])
    assert bool(((torch.tensor(list(value.values())) - exact).abs() <= 2 * report.half_width + 1e-9).all())
    assert report.converged
    assert report.matvecs == product.columns
    few, report = block_traces(product, P, blocks, probes=20)
    assert report.probes == 20
    assert bool((report.half_width > 0).all())
    assert few != value
    with pytest.raises(ShapeError, match="at least one block"):
        block_traces(product, P, {})


def test_moments_in_pieces() -> None:
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e6
    running = Moments()
    for piece in (x[:, :1], x[:, 1:9], x[:, 9:]):
        running.add(piece)
    assert torch.allclose(running.mean, x.mean(1), rtol=1e-15)
    assert torch.allclose(running.stderr(), x.std(1) / 17**0.5, rtol=1e-6)


@pytest.mark.parametrize("estimator", TRACES + DIAGONALS)
def test_seeds_generators_and_refusals(estimator: Callable[..., Any]) -> None:
    M = matrix(spectra(P)["geometric"])
    state = torch.get_rng_state()
    a, b, c = (torch.as_tensor(estimator(lambda V: M @ V, P, probes=5, seed=s)[0]) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    _, report = estimator(lambda V: M @ V, P, probes=5, generator=torch.Generator().manual_seed(0))
    assert report.seed is None
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="rtol must be > 0"):
        estimator(lambda V: M @ V, P, rtol=0.0)
    with pytest.raises(ShapeError, match="probes"):
        estimator(lambda V: M @ V, P, probes=0)
