"""One Lanczos run against exact spectra, at every shift."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import function, matrix, spectra
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg import quadrature
from curvops.linalg.growth import student
from curvops.linalg.probes import derive_seed, rademacher
from curvops.linalg.spectrum import Spectrum, spectrum

P = 150
DELTAS = (1e-3, 0.1, 1.0, 100.0)


def curvature() -> Tensor:
    """Singular and decaying, as a GGN is."""
    values = torch.logspace(-7, 3, P, dtype=torch.float64)
    values[:40] = 0
    return matrix(values)


def build(M: Tensor, probes: int = 20, steps: int = 60, lower_bound: float | None = 0.0, **kw) -> Spectrum:
    return spectrum(lambda V: M @ V, len(M), probes=probes, steps=steps, lower_bound=lower_bound, dtype=M.dtype, **kw)


def probes_of(s: Spectrum) -> Tensor:
    assert s.seed is not None
    return rademacher(P, 0, s.probes, seed=derive_seed(s.seed, 2), dtype=torch.float64, device="cpu")


def test_shapes_and_products() -> None:
    M = curvature()
    widths: list[int] = []

    def product(V: Tensor) -> Tensor:
        widths.append(V.shape[1])
        return M @ V

    s = spectrum(product, P, probes=4, steps=9, lower_bound=0.0)
    assert s.nodes.shape == s.weights.shape == (4, 9)
    assert torch.allclose(s.weights.sum(1), torch.full((4,), float(P), dtype=torch.float64))
    assert s.matvecs == sum(widths) == 36
    before = len(widths)
    s.logdet(1.0)
    s.count((0.0, 1.0))
    s.density(torch.linspace(0, 1000, 5))
    assert len(widths) == before


@pytest.mark.parametrize("steps", [5, 20, 60])
def test_brackets_hold_the_probes_mean_at_every_shift(steps: int, dtype: torch.dtype) -> None:
    M = curvature().to(dtype)
    stored = M.double()
    s = build(M, steps=steps)
    Z = probes_of(s)
    for delta in DELTAS if dtype == torch.float64 else DELTAS[1:]:
        pairs = (
            (s.logdet(delta), lambda x, d=delta: torch.log(x.clamp(min=0) + d)),
            (s.effective_dimension(delta), lambda x, d=delta: x.clamp(min=0) / (x.clamp(min=0) + d)),
        )
        for report, f in pairs:
            F = function(stored, f)
            mean = float(((F @ Z) * Z).sum(0).mean())
            slack = 1e-8 * max(1.0, abs(mean)) if dtype == torch.float64 else 0.02
            assert report.bracket[0] - slack <= mean <= report.bracket[1] + slack
            assert abs(report.value - float(F.trace())) <= 3 * report.half_width
            noise = student(20) * report.stderr
            assert report.half_width == pytest.approx(noise + (report.bracket[1] - report.bracket[0]) / 2, abs=1e-9)


def test_full_depth_of_a_diagonal_matrix_is_exact() -> None:
    M = torch.diag(torch.logspace(-2, 2, 40, dtype=torch.float64))  # Rademacher probes see a diagonal without noise
    s = build(M, probes=3, steps=40, lower_bound=0.01)
    values = M.diagonal()
    for delta in (0.0, 0.3, 10.0):
        assert s.logdet(delta).value == pytest.approx(float(torch.log(values + delta).sum()), rel=1e-9, abs=1e-9)
        assert s.logdet(delta).half_width < 1e-6
    assert s.effective_dimension(0.5).value == pytest.approx(float((values / (values + 0.5)).sum()), rel=1e-9)
    assert s.trace_of(lambda x: torch.sin(x)).value == pytest.approx(float(values.sin().sum()), abs=1e-8)
    assert s.count((0.1, 1.0)).value == pytest.approx(int(((values >= 0.1) & (values <= 1.0)).sum()), abs=1e-8)
    grid = torch.linspace(0, 100, 7)
    exact = torch.exp(-0.5 * ((grid[:, None] - values) / 3.0) ** 2).sum(1) / (3.0 * math.sqrt(2 * math.pi))
    assert torch.allclose(s.density(grid, width=3.0).value, exact, rtol=1e-8)


@pytest.mark.parametrize("kind", spectra(P))
def test_counts_bracket_the_probes_distribution(kind: str) -> None:
    values = spectra(P)[kind]
    M = matrix(values)
    s = build(M, steps=12, lower_bound=float(values.min()))
    energies = (torch.linalg.eigh(M)[1].T @ probes_of(s)).square()
    exact_values = torch.linalg.eigvalsh(M)
    for low, high in ((0.0, 1.0), (0.3, 30.0), (-5.0, 0.001), (1.2, math.inf), (-math.inf, math.inf)):
        report = s.count((low, high))
        inside = ((exact_values >= low) & (exact_values <= high)).double()
        mean = float((inside[:, None] * energies).sum(0).mean())
        assert report.bracket[0] - 1e-8 <= mean <= report.bracket[1] + 1e-8
        assert abs(report.value - float(inside.sum())) <= 2 * report.half_width + 1e-8
    assert s.count((-math.inf, math.inf)).value == pytest.approx(P)
    with pytest.raises(ValueError, match="low <= high"):
        s.count((2.0, 1.0))


@pytest.mark.parametrize("log", [False, True])
def test_density_brackets_and_integrates(log: bool) -> None:
    values = torch.linspace(1.0, 50.0, P, dtype=torch.float64)
    M = matrix(values)
    s = build(M, steps=25, lower_bound=1.0)
    grid = (
        torch.logspace(-1, 2.5, 400, dtype=torch.float64) if log else torch.linspace(-30, 80, 400, dtype=torch.float64)
    )
    axis = torch.log10 if log else (lambda x: x)
    width = 0.1 if log else 3.0
    report = s.density(grid, log=log, width=width)
    assert report.value.shape == report.stderr.shape == report.half_width.shape == (400,)
    assert float(torch.trapezoid(report.value, axis(grid))) == pytest.approx(P, rel=1e-3)
    energies = (torch.linalg.eigh(M)[1].T @ probes_of(s)).square()
    kernel = torch.exp(-0.5 * ((axis(grid)[:, None] - axis(torch.linalg.eigvalsh(M))) / width) ** 2)
    kernel = kernel / (width * math.sqrt(2 * math.pi))
    mean = (kernel @ energies).mean(1)
    assert bool((report.bracket[0] <= mean + 1e-8).all())
    assert bool((mean <= report.bracket[1] + 1e-8).all())
    assert bool(((report.value - kernel.sum(1)).abs() <= report.half_width + 1e-8).float().mean() > 0.95)
    assert s.density(grid, log=log).value.shape == (400,)
    with pytest.raises(DataError, match="grid"):
        s.density([-1.0, 0.0], log=True)
    with pytest.raises(ValueError, match="width > 0"):
        s.density(grid, width=0.0)


def exact_evidence(M: Tensor, loss: float, mean: Tensor, delta: float, centre: float | Tensor = 0.0) -> float:
    logdet = float(torch.linalg.slogdet(M + delta * torch.eye(P, dtype=torch.float64))[1])
    return -loss - 0.5 * delta * float(((mean - centre) ** 2).sum()) + 0.5 * P * math.log(delta) - 0.5 * logdet


def test_evidence_curve_and_its_maximum() -> None:
    M = curvature()
    s = build(M, probes=40, steps=100)
    mean = torch.randn(P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    centre = 0.1 * torch.ones(P, dtype=torch.float64)
    deltas = torch.logspace(-3, 3, 41, dtype=torch.float64)
    report = s.evidence_curve(torch.tensor(12.0), mean, deltas, centre)
    exact = torch.tensor([exact_evidence(M, 12.0, mean, float(d), centre) for d in deltas], dtype=torch.float64)
    assert report.value.shape == (41,)
    assert bool(((report.value - exact).abs() <= 2 * report.half_width).all())
    assert int(report.value.argmax()) == int(exact.argmax())
    best = s.optimal_prior_precision(12.0, mean, centre)
    fine = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    truth = float(fine[int(torch.tensor([exact_evidence(M, 12.0, mean, float(d), centre) for d in fine]).argmax())])
    assert best.converged
    assert abs(best.value - truth) <= 2 * best.half_width + 2e-3 * truth
    assert best.bracket[0] <= best.value <= best.bracket[1]
    assert 0 < best.stderr < 0.2 * best.value
    ended = s.optimal_prior_precision(12.0, mean, centre, bounds=(1e2, 1e3))
    assert not ended.converged
    assert "widen" in ended.reason


def test_refusals() -> None:
    M = curvature()
    s = build(M, probes=3, steps=20)
    mean = torch.zeros(P, dtype=torch.float64)
    for delta in (0.0, -1.0, float("nan")):
        with pytest.raises(NotPositiveDefiniteError, match=r"lower_bound \+ δ > 0"):
            s.logdet(delta)
    with pytest.raises(NotPositiveDefiniteError, match="underflows"):
        s.logdet(1e-14)
    with pytest.raises(NotPositiveDefiniteError, match="underflows"):
        build(M.float(), probes=3, steps=20).logdet(1e-5)
    unknown = build(M, probes=3, steps=20, lower_bound=None)
    with pytest.raises(NotPositiveDefiniteError, match="none is known"):
        unknown.logdet(1.0)
    with pytest.raises(NotPositiveDefiniteError, match="semidefinite"):
        build(M, probes=3, steps=20, lower_bound=-1.0).effective_dimension(2.0)
    assert math.isfinite(build(M, probes=3, steps=20, lower_bound=-1.0).logdet(2.0).value)
    with pytest.raises(ShapeError, match="mean of shape"):
        s.evidence_curve(0.0, mean[:5], [1.0])
    with pytest.raises(DataError, match="finite and positive"):
        s.evidence_curve(0.0, mean, [1.0, -1.0])
    with pytest.raises(DataError, match="finite loss"):
        s.evidence_curve(float("nan"), mean, [1.0])
    with pytest.raises(DataError, match="bounds"):
        s.optimal_prior_precision(0.0, mean, bounds=(1.0, 0.5))
    with pytest.raises(ShapeError, match="probes >= 1"):
        build(M, probes=0)


def test_an_indefinite_matrix_has_traces_counts_and_density() -> None:
    values = torch.linspace(-2, 5, P, dtype=torch.float64)
    s = build(matrix(values), probes=20, steps=40, lower_bound=None)
    report = s.trace_of(lambda x: torch.exp(-x))
    assert abs(report.value - float(torch.exp(-values).sum())) <= 2 * report.half_width
    absolute = s.trace_of(torch.abs)
    assert absolute.bracket[1] > absolute.bracket[0]
    negative = s.count((-math.inf, 0.0))
    assert abs(negative.value - int((values <= 0).sum())) <= negative.half_width
    assert s.trace_of(quadrature.power(0.5, 3.0)).half_width < 20


def test_seed_and_generator() -> None:
    M = curvature()
    a, b, c = (build(M, probes=3, steps=10, seed=k).logdet(1.0).value for k in (1, 1, 2))
    assert a == b != c
    state = torch.get_rng_state()
    s = build(M, probes=3, steps=10, generator=torch.Generator().manual_seed(4))
    assert s.seed is None
    assert torch.equal(state, torch.get_rng_state())
    one = build(M, probes=1, steps=10).logdet(1.0)
    assert math.isinf(one.half_width)
