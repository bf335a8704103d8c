"""Pictures: what is drawn, what it is called, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from spectra import matrix
from torch import Tensor

import curvops as co
from curvops import plot
from curvops.errors import DataError, MissingExtraError, ShapeError
from curvops.plot.spectrum import density


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")
    matplotlib.use(backend)


def operator(values: Tensor) -> co.Closure:
    M = matrix(values)
    return co.Closure(lambda V: M @ V, M.shape, dtype=M.dtype, is_symmetric=True, is_psd=bool((values >= 0).all()))


POSITIVE = torch.logspace(-2, 3, 60, dtype=torch.float64)
INDEFINITE = torch.cat([-torch.logspace(-1, 1, 20, dtype=torch.float64), POSITIVE])


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_spectrum_names_its_axes_and_curves() -> None:
    G, H = operator(POSITIVE), operator(INDEFINITE)
    ax = plot.spectrum({"GGN": G.spectrum(10, 40), "Hessian": H.spectrum(10, 40)}, delta=0.5)
    assert "eigenvalue" in ax.get_xlabel()
    assert ax.get_ylabel() == "eigenvalues per decade"
    assert labels(ax) == [
        "GGN (10 probes × 40 steps)",
        "Hessian (10 probes × 40 steps)",
        "prior precision δ = 0.5",
    ]
    low, high = ax.get_xlim()
    assert low < float(INDEFINITE.min())
    assert high > float(INDEFINITE.max())


def test_spectrum_draws_on_the_axes_given_and_marks_the_pairs() -> None:
    G = operator(POSITIVE)
    mine = Figure().subplots()
    ax = plot.spectrum(G.spectrum(5, 30), mine, pairs=G.eigsh(3))
    assert ax is mine
    ticks = [
        segment[0][0] for lines in ax.collections if hasattr(lines, "get_segments") for segment in lines.get_segments()
    ]
    np.testing.assert_allclose(sorted(ticks), POSITIVE[-3:].numpy(), rtol=1e-9)


def test_density_has_the_area_of_the_spectrum() -> None:
    """The area under the curve is the number of eigenvalues, and its bump lies where they are."""
    values = torch.cat([torch.full((40,), 1.0, dtype=torch.float64), torch.full((20,), 100.0, dtype=torch.float64)])
    found = operator(values).spectrum(20, 2)
    grid = torch.linspace(-2, 7, 4000, dtype=torch.float64)
    height, half = density(found, grid, 0.01, 0.05)
    area = np.trapezoid(height, grid.numpy())
    assert abs(area - 60) < 1e-6
    upper = grid.numpy() > 3.3
    assert abs(np.trapezoid(height[upper], grid.numpy()[upper]) - 20) < np.trapezoid(half[upper], grid.numpy()[upper])


def test_density_stays_above_a_proven_bound() -> None:
    found = operator(POSITIVE).spectrum(10, 10)
    assert found.lower_bound == 0.0
    grid = torch.linspace(-2, 6, 4000, dtype=torch.float64)
    height, _ = density(found, grid, 0.05, 0.05)
    assert height[grid.numpy() < 0].max() == 0
    assert abs(np.trapezoid(height, grid.numpy()) - 60) < 0.2


def test_one_probe_has_no_band() -> None:
    _, half = density(operator(POSITIVE).spectrum(1, 10), torch.zeros(1, dtype=torch.float64), 0.1, 0.1)
    assert half == np.inf
    assert plot.spectrum(operator(POSITIVE).spectrum(1, 10)).lines


def test_spectrum_refuses_a_threshold_of_zero() -> None:
    with pytest.raises(ValueError, match="threshold=0"):
        plot.spectrum(operator(POSITIVE).spectrum(2, 5), threshold=0.0)


def test_scree_draws_from_the_largest_down() -> None:
    pairs = operator(POSITIVE).eigsh(4)
    ax = plot.scree(pairs)
    x, y = ax.containers[0].lines[0].get_data()
    np.testing.assert_array_equal(x, [1, 2, 3, 4])
    np.testing.assert_array_equal(y, pairs.values.flip(0).numpy())
    assert ax.get_yscale() == "log"
    assert "residuals ≤" in labels(ax)[0]
    assert plot.scree({"H": operator(INDEFINITE).eigsh(4, which="SA")}).get_yscale() == "linear"


def test_evidence_draws_curve_optimum_and_exact_values() -> None:
    deltas = torch.logspace(-2, 2, 9, dtype=torch.float64)
    found = operator(POSITIVE).spectrum(10, 40)
    mean = torch.ones(60, dtype=torch.float64)
    curve = found.evidence_curve(3.0, mean, deltas)
    best = found.optimal_prior_precision(3.0, mean)
    ax = plot.evidence(deltas, curve, optimum=best, exact=curve.value)
    assert ax.get_xlabel() == "prior precision δ"
    assert ax.get_ylabel() == "log evidence (nats)"
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), curve.value.numpy())
    assert any(label.startswith("best δ = ") for label in labels(ax))
    assert "exact" in labels(ax)


def test_evidence_refuses_other_deltas() -> None:
    deltas = torch.logspace(-2, 2, 9, dtype=torch.float64)
    curve = operator(POSITIVE).spectrum(10, 40).evidence_curve(3.0, torch.ones(60, dtype=torch.float64), deltas)
    with pytest.raises(ShapeError, match=r"\(8,\) prior precisions for a curve of shape \(9,\)"):
        plot.evidence(deltas[:-1], curve)


def test_convergence_of_solves() -> None:
    A = operator(POSITIVE).add_diagonal(0.1)
    b = torch.ones(60, dtype=torch.float64)
    reports = [A.solve(b, co.CG(rtol=10.0**-k), return_report=True)[1] for k in (2, 4, 6)]
    ax = plot.convergence({"CG": reports})
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, [r.matvecs for r in reports])
    np.testing.assert_array_equal(y, [r.worst_residual for r in reports])
    assert "residual" in ax.get_ylabel()
    assert labels(ax) == ["CG"]


def test_convergence_of_estimates() -> None:
    A = operator(POSITIVE).add_diagonal(0.1)
    reports = [A.logdet(co.SLQ(probes=m, steps=20), return_report=True)[1] for m in (4, 8)]
    ax = plot.convergence(reports, exact=-12.5)
    assert labels(ax) == ["exact: −12.5", "estimate with its 95 % interval"]


def test_convergence_refuses_a_mixture() -> None:
    A = operator(POSITIVE).add_diagonal(0.1)
    mixed = [A.solve(torch.ones(60, dtype=torch.float64), return_report=True)[1], A.logdet(return_report=True)[1]]
    with pytest.raises(DataError, match="EstimateReport, SolveReport; expected SolveReports alone"):
        plot.convergence(mixed)
    with pytest.raises(DataError, match="got nothing"):
        plot.convergence([])


def test_without_matplotlib_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'curvops\[plot\]'"):
        plot.scree(operator(POSITIVE).eigsh(2))
