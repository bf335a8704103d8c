"""Stochastic Lanczos quadrature: targets met against exact values, exact where theory promises it, loud otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import matrix, spectra
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg import quadrature
from curvops.linalg.growth import Interval, Limits, Run, grow, interval, sample_variance, student
from curvops.linalg.slq import slq_logdet, slq_trace
from curvops.linalg.split import SKETCH_VECTORS, split

P = 200


def exact_logdet(M: Tensor) -> float:
    return float(torch.linalg.slogdet(M.double())[1])


@pytest.mark.parametrize("kind", spectra(P))
@pytest.mark.parametrize("reduce_variance", [True, False])
def test_logdet_meets_its_default_target(kind: str, reduce_variance: bool) -> None:
    values = spectra(P)[kind]
    M = matrix(values)
    columns = 0

    def product(V: Tensor) -> Tensor:
        nonlocal columns
        columns += V.shape[1]
        return M @ V

    floor = float(values.min())
    value, report = slq_logdet(product, P, lower_bound=floor, reduce_variance=reduce_variance, max_probes=10_000)
    exact = exact_logdet(M)
    assert report.converged, report.reason
    assert report.half_width <= max(0.5, 0.01 * abs(value))
    # Three half-widths are six standard errors: a failure here is a bias, not bad luck.
    assert abs(value - exact) <= 3 * report.half_width + 1e-9
    assert report.value == value
    assert report.matvecs == columns
    assert report.probes >= 10
    assert report.seed == 0
    assert report.bracket[0] <= value <= report.bracket[1]
    t_part = student(report.probes) * report.stderr if report.stderr else 0.0
    assert report.half_width == pytest.approx(t_part + (report.bracket[1] - report.bracket[0]) / 2)
    assert "dominates" in report.reason


def test_low_rank_plus_shift_is_split_exactly() -> None:
    values = torch.full((P,), 1e-3, dtype=torch.float64)
    values[:12] = torch.logspace(0, 5, 12, dtype=torch.float64)
    M = matrix(values)
    value, report = slq_logdet(lambda V: M @ V, P, lower_bound=1e-3)
    assert "Nyström split" in report.algorithm
    assert abs(value - exact_logdet(M)) <= report.half_width + 1e-6
    assert report.half_width < 1e-2
    assert report.matvecs <= 200 + 16 + 100


def test_the_split_is_an_identity_and_its_bound_holds() -> None:
    M = matrix(spectra(P)["geometric"])
    s = split(lambda V: M @ V, P, floor=0.01, rank=40, seed=3, dtype=torch.float64, device="cpu")
    assert s.matvecs == 40
    middle = s.remainder(lambda V: M @ V)(torch.eye(P, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh((middle + middle.T) / 2)[0]) >= 1 - s.margin - 1e-9
    assert s.margin < 1e-6
    assert s.logdet + exact_logdet(middle) == pytest.approx(exact_logdet(M), abs=1e-6)
    with pytest.raises(NotPositiveDefiniteError, match="sketch of the matrix met"):
        split(lambda V: M @ V, P, floor=0.05, rank=P, seed=3, dtype=torch.float64, device="cpu")


def test_fixed_probes_and_steps_are_exactly_those() -> None:
    M = matrix(spectra(P)["power law"])
    value, report = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, probes=7, steps=9)
    assert (report.probes, report.steps, report.matvecs, report.converged) == (7, 9, 63, True)
    assert report.half_width > 0
    assert abs(value - exact_logdet(M)) < 3 * report.half_width
    _, judged = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, probes=7, steps=9, rtol=1e-6)
    assert not judged.converged
    assert "left a bracket" in judged.reason
    _, few = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, probes=3, rtol=1e-3, atol=0.0)
    assert few.probes == 3
    assert "only 3 probes were allowed" in few.reason


def test_short_lanczos_is_not_believed() -> None:
    M = matrix(torch.logspace(-6, 3, P, dtype=torch.float64))
    value, report = slq_logdet(lambda V: M @ V, P, lower_bound=1e-6, probes=10, steps=8)
    assert abs(value - exact_logdet(M)) <= report.half_width
    assert report.half_width > 20
    assert "bracket dominates" in report.reason


def test_same_seed_same_bits_and_generators() -> None:
    M = matrix(spectra(P)["geometric"])
    runs = [slq_logdet(lambda V: M @ V, P, lower_bound=0.01, seed=s)[0] for s in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(1)
    first, report = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, generator=g)
    second, _ = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, generator=g)
    again, _ = slq_logdet(lambda V: M @ V, P, lower_bound=0.01, generator=torch.Generator().manual_seed(1))
    assert report.seed is None
    assert first == again != second
    assert torch.equal(state, torch.get_rng_state())


def test_the_identity_needs_nothing(dtype: torch.dtype) -> None:
    value, report = slq_logdet(lambda V: 3 * V, 50, lower_bound=3.0, dtype=dtype)
    assert value == pytest.approx(50 * math.log(3), rel=1e-5)
    assert report.steps == 1 or report.matvecs <= 10
    one, _ = slq_logdet(lambda V: 3 * V, 1, lower_bound=2.0, dtype=dtype)
    assert one == pytest.approx(math.log(3), rel=1e-5)


def test_float32_brackets_include_rounding() -> None:
    values = spectra(P)["geometric"].clone()
    M = matrix(values).float()
    stored = M.double()
    floor = 0.5 * float(torch.linalg.eigvalsh(stored)[0])
    value, report = slq_logdet(lambda V: M @ V, P, lower_bound=floor, dtype=torch.float32, rtol=0.03)
    assert report.converged
    assert abs(value - exact_logdet(stored)) <= 3 * report.half_width
    lost = matrix(values * 1e6 + 1e-3).float()
    with pytest.raises(NotPositiveDefiniteError, match="lost in the rounding"):
        slq_logdet(lambda V: lost @ V, P, lower_bound=1e-3, dtype=torch.float32)


def test_what_stops_it_is_said() -> None:
    M = matrix(torch.logspace(-6, 3, P, dtype=torch.float64))
    _, report = slq_logdet(lambda V: M @ V, P, lower_bound=1e-6, max_steps=10, reduce_variance=False)
    assert not report.converged
    assert "10 Lanczos steps left a bracket" in report.reason
    _, report = slq_logdet(
        lambda V: M @ V, P, lower_bound=1e-6, max_probes=20, reduce_variance=False, atol=0.01, rtol=0
    )
    assert not report.converged
    assert "only 20 probes" in report.reason


@pytest.mark.parametrize("kind", spectra(P))
def test_traces_of_functions(kind: str) -> None:
    values = spectra(P)[kind]
    M = matrix(values)
    floor = float(values.min())
    for f in (quadrature.shrinkage(0.1), quadrature.power(0.5), quadrature.inverse(0.5)):
        value, report = slq_trace(lambda V: M @ V, P, f, lower_bound=floor, rtol=0.05)
        assert report.converged, report.reason
        assert report.half_width <= 0.05 * abs(value)
        assert abs(value - float(f(values).sum())) <= 3 * report.half_width
    plain, report = slq_trace(lambda V: M @ V, P, lambda x: torch.exp(-x), atol=10.0)
    assert report.converged
    assert abs(plain - float(torch.exp(-values).sum())) <= 3 * report.half_width


def test_refusals() -> None:
    M = matrix(spectra(P)["flat"])
    for floor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NotPositiveDefiniteError, match="positive lower bound"):
            slq_logdet(lambda V: M @ V, P, lower_bound=floor)
    with pytest.raises(NotPositiveDefiniteError, match=r"bounded below by 0\.9"):
        slq_logdet(lambda V: M @ V, P, lower_bound=0.9)
    with pytest.raises(ShapeError, match="probes=0"):
        slq_logdet(lambda V: M @ V, P, lower_bound=0.5, probes=0)
    with pytest.raises(ShapeError, match="steps=-1"):
        slq_trace(lambda V: M @ V, P, torch.exp, steps=-1)
    with pytest.raises(ValueError, match="rtol must be >= 0"):
        slq_trace(lambda V: M @ V, P, torch.exp, rtol=-0.1)
    with pytest.raises(ValueError, match="target of zero"):
        slq_trace(lambda V: M @ V, P, torch.exp, rtol=0.0, atol=0.0)
    with pytest.raises(DataError, match="NaN"):
        slq_logdet(lambda V: M @ V * float("nan"), P, lower_bound=0.5)


def test_interval_is_students() -> None:
    low = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = interval(low, low + 0.5, offset=10.0, slack=0.1)
    assert found.value == pytest.approx(10 + 7 / 3 + 0.25)
    assert found.stderr == pytest.approx(float(low.std()) / 3**0.5)
    assert found.noise == pytest.approx(4.302652729911275 * found.stderr)
    assert found.bracket == pytest.approx(0.35)
    assert math.isinf(interval(low[:1], low[:1]).half_width)


def test_variance_of_a_dominant_direction_is_not_lost() -> None:
    v = torch.randn(P, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B = v @ v.T / float(v.square().sum())
    true = 2 * float(B.square().sum() - B.diagonal().square().sum())
    bare, kept = [], []
    for seed in range(400):
        z = torch.randint(0, 2, (P, 10), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
        samples = ((B @ z) * z).sum(0)
        bare.append(samples.var())
        kept.append(sample_variance(samples.var(), samples.mean(), (B @ z).square().sum(0).mean(), 10, P))
    assert float((torch.stack(bare) < 0.25 * true).double().mean()) > 0.1
    assert float((torch.stack(kept) < 0.25 * true).double().mean()) < 0.02
    # A diagonal matrix is seen without noise, and stays so.
    zero = torch.zeros((), dtype=torch.float64)
    assert sample_variance(zero, torch.tensor(6.0), torch.tensor(14.0), 10, 3) == 0


def test_bases_stay_within_the_memory_given() -> None:
    """Runs whose basis had to go are repeated: the same interval, more products."""
    size, memory = 400, 2_500_000
    M = matrix(torch.logspace(-3, 2, size, dtype=torch.float64))

    def grown(limit: int | None) -> tuple[Interval, int, int]:
        held = 0

        def matmat(V: Tensor) -> Tensor:
            nonlocal held
            held = max(held, sum(block.nbytes for group in run.groups for block in group.blocks))
            return M @ V

        run = Run(
            matmat, size, quadrature.log(), 1e-3, seed=0, dtype=M.dtype, device="cpu", memory=limit, progress=False
        )  # fmt: skip
        found, _ = grow(run, lambda value: 40.0, Limits())
        return found, run.matvecs, held

    free, bounded = grown(None), grown(memory)
    assert bounded[2] <= memory < free[2]
    assert bounded[1] > free[1]
    for given, unlimited in zip(bounded[0], free[0], strict=True):
        assert given == pytest.approx(unlimited, rel=1e-8)


def test_memory_bounds_the_rank_of_a_split() -> None:
    """Where the sketch does not fit, plain quadrature answers, within its half-width."""
    values = torch.full((P,), 1e-3, dtype=torch.float64)
    values[:12] = torch.logspace(0, 5, 12, dtype=torch.float64)
    M = matrix(values)
    value, report = slq_logdet(lambda V: M @ V, P, lower_bound=1e-3, memory=SKETCH_VECTORS * P * 8 * 7, max_probes=80)
    assert report.algorithm == "SLQ"
    assert abs(value - exact_logdet(M)) <= report.half_width
