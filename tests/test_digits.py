"""The promises of the certified numerics on a real network: 64-16-10 on the digits, P = 1,210, trained with δ = 1."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from digits import Digits, dense_ggn, digits
from torch import Tensor

import curvops as co


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def net() -> Digits:
    return digits()


def exact_logdet(delta: float, seed: int = 0) -> float:
    values = torch.linalg.eigvalsh(dense_ggn(seed))
    return float((values.clamp(min=0) + delta).log().sum())


@pytest.mark.parametrize(("delta", "most"), [(0.01, 0.5), (1.0, 1.1)])
def test_the_automatic_preconditioner_pays_for_its_set_up(net: Digits, delta: float, most: float) -> None:
    b = normal(1210)
    A = net.ggn().add_diagonal(delta)
    x, plain = A.solve(b, return_report=True)
    before = A.matvec_count
    z, auto = A.solve(b, co.CG(preconditioner="auto"), return_report=True)
    assert auto.matvecs == A.matvec_count - before  # the sketch is in the bill
    assert auto.matvecs <= most * plain.matvecs
    assert "Nyström preconditioner of rank" in auto.reason
    assert "cost model" in auto.reason
    for answer, report in ((x, plain), (z, auto)):
        assert float(report.residual) <= 1e-6
        assert float((b - A @ answer).norm() / b.norm()) <= 1.01e-6


def test_a_short_solve_gets_no_preconditioner(net: Digits) -> None:
    _, report = net.ggn().add_diagonal(1e4).solve(normal(1210), co.CG(preconditioner="auto"), return_report=True)
    assert "no preconditioner" in report.reason
    assert report.matvecs <= report.iterations + 4


def test_more_right_hand_sides_deserve_a_larger_sketch(net: Digits) -> None:
    A = net.ggn().add_diagonal(1.0)
    _, one = A.solve(normal(1210), co.CG(preconditioner="auto"), return_report=True)
    _, many = A.solve(normal(1210, 20), co.CG(preconditioner="auto"), return_report=True)
    assert many.matvecs < 20 * one.matvecs / 2
    assert many.iterations < one.iterations


@pytest.mark.slow
def test_the_dense_reference_is_the_ggn(net: Digits) -> None:
    V = normal(1210, 5)
    torch.testing.assert_close(net.ggn() @ V, dense_ggn() @ V, rtol=1e-10, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 10.0])
def test_estimated_logdets_meet_their_default_target(net: Digits, delta: float) -> None:
    exact = exact_logdet(delta)
    value, report = net.ggn().add_diagonal(delta).logdet(co.SLQ(), return_report=True)
    assert report.half_width <= max(0.5, 0.01 * abs(float(value)))
    assert abs(float(value) - exact) <= report.half_width
    assert "dominates" in report.reason


@pytest.mark.slow
def test_plain_quadrature_is_hundreds_of_nats_off_and_says_so(net: Digits) -> None:
    """10 probes of 20 steps at δ = 0.01: Gauss quadrature alone misses by more than 500 nats; its bracket holds."""
    exact = exact_logdet(0.01)
    _, report = net.ggn().add_diagonal(0.01).logdet(co.SLQ(10, 20), return_report=True)
    assert report.matvecs == 200
    gauss = report.bracket[1]
    assert gauss - exact > 500
    assert report.half_width > 500
    assert abs(report.value - exact) <= report.half_width


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_one_spectrum_finds_the_evidence_s_maximum(seed: int) -> None:
    net = digits(seed)
    deltas = torch.logspace(-2, 2, 41, dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense_ggn(seed)).clamp(min=0)
    loss, squared = float(net.loss()), float(net.mean.square().sum())
    logdets = (values + deltas[:, None]).log().sum(1)
    exact = -loss - 0.5 * deltas * squared + 0.5 * 1210 * deltas.log() - 0.5 * logdets
    H = net.ggn()
    spectrum = H.spectrum()
    before = H.matvec_count
    curve = spectrum.evidence_curve(loss, net.mean, deltas)
    best = spectrum.optimal_prior_precision(loss, net.mean)
    assert H.matvec_count == before  # no further product
    assert int(curve.value.argmax()) == int(exact.argmax())
    step = math.log(float(deltas[1] / deltas[0]))
    assert abs(math.log(best.value / float(deltas[exact.argmax()]))) < step
    covered = (curve.value - exact).abs() <= curve.half_width
    assert float(covered.double().mean()) > 0.5  # correlated points: no point-wise count, but no systematic miss either


@pytest.mark.slow
def test_a_thousand_draws_predict_to_their_monte_carlo_error(net: Digits) -> None:
    delta = 1.0
    covariance = torch.linalg.inv(dense_ggn() + delta * torch.eye(1210, dtype=torch.float64))
    J = co.Jacobian(net.model, (net.test[0][:100], net.test[1][:100]))
    rows = J.to_dense()
    exact = ((rows @ covariance) * rows).sum(1)
    posterior = co.Gaussian(net.mean, net.ggn().add_diagonal(delta), generator=torch.Generator().manual_seed(0))
    draws, report = posterior.sample(1000, co.PerturbAndSolve(rtol=1e-2), return_report=True)
    assert float(report.residual.max()) <= 1e-2
    deviations = draws - net.mean
    estimate = (rows @ deviations.T).square().mean(1)
    assert float(((estimate - exact) / exact).abs().median()) == pytest.approx(0.03, abs=0.006)
    assert float(deviations.square().sum() / 1000 / covariance.trace()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.1, 1.0, 10.0])
def test_stochastic_gradients_cover_the_exact_ones(net: Digits, delta: float) -> None:
    """value ± t·stderr of the gradient in δ and in a factor c, over 60 seeds of 10 probes."""
    M = dense_ggn()
    size = len(M)
    G = co.Closure(lambda V: M @ V, (size, size), batched=True, is_psd=True)
    values = torch.linalg.eigvalsh(M).clamp(min=0)
    exact = (1 / (values + delta)).sum(), (values / (values + delta)).sum()
    hits = [0, 0]
    seeds = 60
    for seed in range(seeds):
        d = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
        c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        method = co.SLQ(10, 10, generator=torch.Generator().manual_seed(seed))
        value, report = (c * G).add_diagonal(d).logdet(method, return_report=True)
        gradients = torch.autograd.grad(value, (d, c))
        assert report.gradient_stderr is not None
        for i, (g, error) in enumerate(zip(gradients, report.gradient_stderr(d, c), strict=True)):
            hits[i] += bool((g - exact[i]).abs() <= 2.262 * error)
    assert min(hits) >= 51  # 95 % of 60, less three standard deviations


@pytest.mark.slow
def test_beside_linear_operator_on_the_same_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours stay within what they claim; the table is printed (`-s`)."""
    from benchmarks.against_linear_operator import rows

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # linear_operator's own
        table = list(rows())
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(map(str, table)) + "\n")
    for row in table:
        if row.library == "curvops":
            assert row.claimed is not None
            assert abs(row.error) <= row.claimed, str(row)
    theirs = {row.question: row for row in table if row.library == "linear_operator" and row.delta == 0.01}
    assert theirs["solve, relative residual"].error > 0.5
    assert theirs["log det, nats"].error > 500
    assert theirs["draws of N(0, A), bulk"].error < -0.9


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.1, 1.0, 10.0])
def test_intervals_cover_over_200_seeds(delta: float) -> None:
    G = dense_ggn()
    A = co.Closure(lambda V: G @ V + delta * V, (1210, 1210), batched=True, is_psd=True, lower_bound=delta)
    logdet, trace = exact_logdet(delta), float(G.trace()) + 1210 * delta
    hits = {"logdet, 10 x 20": 0, "trace, 10 probes": 0}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        _, report = A.logdet(co.SLQ(probes=10, steps=20, generator=generator), return_report=True)
        hits["logdet, 10 x 20"] += abs(report.value - logdet) <= report.half_width
        _, report = A.trace(co.Hutchinson(probes=10, generator=generator), return_report=True)
        hits["trace, 10 probes"] += abs(report.value - trace) <= report.half_width
    print(f"\ndelta = {delta}: {hits} of 200")
    assert min(hits.values()) >= 180, hits
