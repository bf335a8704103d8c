"""Every algorithm asked for by name, on matrix-free operators of every kind, against the dense matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvops.errors import ConvergenceError, NotPositiveDefiniteError, NumericalWarning, ShapeError
from curvops.linalg.results import EstimateReport, SolveReport
from curvops.operators import Closure, Dense, Diagonal, Kronecker, LinearOperator, LowRank
from curvops.operators.methods import (
    CG,
    LU,
    MINRES,
    SLQ,
    Cholesky,
    Eigh,
    Hutchinson,
    Lanczos,
    Nystrom,
    XDiag,
    XTrace,
)
from curvops.testing.zoo import Parts

P = 60
m = Parts(torch.float64, "cpu")
PD, INDEFINITE, SINGULAR, GENERAL = m.pd(P), m.indefinite(P), m.psd(P, 20), m.general(P, P)
BOUND = 0.49


def _pd() -> Closure:
    return m.closure(PD, is_psd=True, lower_bound=BOUND)


def _indefinite() -> Closure:
    return m.closure(INDEFINITE, is_symmetric=True)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (None, "CG"),
        (CG(), "CG"),
        (CG(rtol=1e-11), "CG"),
        (CG(preconditioner="auto"), "preconditioned CG"),
        (CG(preconditioner=Nystrom(10)), "preconditioned CG"),
        (CG(preconditioner=Nystrom()), "preconditioned CG"),
        (CG(preconditioner=Diagonal(PD.diagonal())), "preconditioned CG"),
        (CG(x0=m.vector(P, 5)), "CG"),
        (MINRES(), "MINRES"),
        (MINRES(x0=m.vector(P, 5)), "MINRES"),
        (Cholesky(), "dense Cholesky"),
        (Eigh(), "dense eigendecomposition"),
        (LU(), "dense LU"),
    ],
    ids=str,
)
def test_solve(method: object, name: str) -> None:
    A, b = _pd(), m.vector(P)
    x, report = A.solve(b, method, return_report=True)  # type: ignore[arg-type]
    assert isinstance(report, SolveReport)
    assert report.algorithm == name
    rtol = 1e-11 if method == CG(rtol=1e-11) else 1e-6
    assert float((b - PD @ x).norm() / b.norm()) <= rtol
    assert _error(x, torch.linalg.solve(PD, b)) < 30 * rtol
    assert report.matvecs == A.matvec_count > 0
    assert report.residual.shape == (1,)


def test_solve_by_x0_starts_there() -> None:
    A, b = _pd(), m.vector(P)
    x = torch.linalg.solve(PD, b)
    _, report = A.solve(b, CG(x0=x), return_report=True)
    assert report.iterations <= 1
    _, cold = A.solve(b, return_report=True)
    assert cold.iterations > 5


@pytest.mark.parametrize("method", [None, MINRES(), Eigh(), LU()], ids=str)
def test_solve_indefinite(method: object) -> None:
    B = m.general(P, 3)
    X, report = _indefinite().solve(B, method, return_report=True)  # type: ignore[arg-type]
    assert float(((B - INDEFINITE @ X).norm(dim=0) / B.norm(dim=0)).max()) <= 1e-6
    assert report.residual.shape == (3,)
    assert report.worst_residual <= 1e-6


@pytest.mark.parametrize("method", [None, CG(rtol=1e-10), MINRES(rtol=1e-10), Eigh()], ids=str)
@pytest.mark.parametrize("free", [True, False], ids=["matrix-free", "dense"])
def test_solve_singular_gives_the_shortest_solution(method: object, free: bool) -> None:
    A = m.closure(SINGULAR, is_psd=True) if free else Dense(SINGULAR)
    b = SINGULAR @ m.vector(P)
    x = A.solve(b, method)  # type: ignore[arg-type]
    assert _error(x, torch.linalg.pinv(SINGULAR, hermitian=True) @ b) < (1e-4 if method is None else 1e-7)


def test_solve_not_symmetric_falls_to_lu_where_small() -> None:
    x, report = m.closure(GENERAL).solve(m.vector(P), return_report=True)
    assert report.algorithm == "dense LU"
    assert _error(x, torch.linalg.solve(GENERAL, m.vector(P))) < 1e-10


def test_defaults_are_the_promised_residuals(dtype: torch.dtype) -> None:
    p = Parts(dtype, "cpu")
    M, b = p.pd(P), p.vector(P)
    A = p.closure(M, is_psd=True)
    x, report = A.solve(b, return_report=True)
    target = 1e-6 if dtype == torch.float64 else 1e-4
    assert float((b.double() - M.double() @ x.double()).norm() / b.double().norm()) <= target
    assert target / 1e3 < report.worst_residual <= target


def test_refinement_goes_beyond_float32() -> None:
    p = Parts(torch.float32, "cpu")
    M = p.pd(P)

    class Twin(Closure):
        def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
            return Closure(lambda V: M.to(dtype) @ V, (P, P), dtype=dtype, device=device, batched=True, is_psd=True)

    A = Twin(lambda V: M @ V, (P, P), dtype=torch.float32, batched=True, is_psd=True)
    b = p.vector(P)
    x, report = A.solve(b, CG(rtol=1e-10, refine=True), return_report=True)
    assert x.dtype == torch.float64
    assert float((b.double() - M.double() @ x).norm() / b.double().norm()) <= 1e-10
    assert report.worst_residual <= 1e-10


@pytest.mark.parametrize("method", [None, Cholesky(), Eigh()], ids=str)
def test_logdet_exact(method: object) -> None:
    value, report = _pd().logdet(method, return_report=True)  # type: ignore[arg-type]
    assert torch.allclose(value, torch.logdet(PD), rtol=1e-11)
    assert report.half_width == 0.0
    assert report.bracket == (report.value, report.value)


def test_logdet_by_slq_reaches_the_default_target_and_says_how_wide_it_is() -> None:
    value, report = _pd().logdet(SLQ(), return_report=True)
    true = float(torch.logdet(PD))
    assert isinstance(report, EstimateReport)
    assert report.half_width <= max(0.5, 0.01 * abs(true))
    assert abs(float(value) - true) <= 2 * report.half_width + 1e-9
    assert report.probes >= 10
    assert report.seed == 0
    assert float(_pd().logdet(SLQ())) == float(value)
    assert value.dtype == torch.float64


def test_slq_of_given_size_runs_exactly_that() -> None:
    value, report = _pd().logdet(SLQ(probes=12, steps=15), return_report=True)
    assert (report.probes, report.steps) == (12, 15)
    assert report.half_width > 0
    assert abs(float(value) - float(torch.logdet(PD))) <= 3 * report.half_width


def test_a_generator_replaces_the_seed_and_advances() -> None:
    generator = torch.Generator().manual_seed(3)
    first, report = _pd().logdet(SLQ(probes=10, steps=10, generator=generator), return_report=True)
    second = _pd().logdet(SLQ(probes=10, steps=10, generator=generator))
    again = _pd().logdet(SLQ(probes=10, steps=10, generator=torch.Generator().manual_seed(3)))
    assert report.seed is None
    assert float(first) == float(again) != float(second)


def test_a_missed_estimate_raises_or_warns_with_the_estimate() -> None:
    # One product short of anything: the target cannot be met with two probes of two steps.
    A = _pd()
    with pytest.raises(ConvergenceError, match="SLQ") as missed:
        A.logdet(SLQ(probes=2, steps=2, rtol=1e-6))
    report = missed.value.report
    assert isinstance(report, EstimateReport)
    assert report.half_width > 1e-6 * abs(report.value)
    assert math.isfinite(float(missed.value.value))
    with pytest.warns(NumericalWarning):
        value = A.logdet(SLQ(probes=2, steps=2, rtol=1e-6, on_failure="warn"))
    assert float(value) == float(missed.value.value)


@pytest.mark.parametrize("method", [Hutchinson(), XTrace(), None], ids=str)
def test_trace(method: object) -> None:
    value, report = _pd().trace(method, return_report=True)  # type: ignore[arg-type]
    true = float(PD.trace())
    assert report.half_width <= 0.01 * true
    assert abs(float(value) - true) <= (2 * report.half_width or 1e-9)


@pytest.mark.parametrize("method", [Hutchinson(rtol=0.2), XDiag(rtol=0.2), None], ids=str)
def test_diagonal(method: object) -> None:
    value, report = _pd().diagonal(method, return_report=True)  # type: ignore[arg-type]
    assert _error(value, PD.diagonal()) < (0.25 if method else 1e-12)
    assert report.probes > 0 or method is None or "unit vectors" in report.algorithm


@pytest.mark.parametrize("method", [None, Eigh(), Lanczos(), Lanczos(steps=P)], ids=str)
def test_functions(method: object) -> None:
    v = m.general(P, 2)
    values, Q = torch.linalg.eigh(PD)
    for call, f in [
        (lambda: _pd().sqrt_matvec(v, method), torch.sqrt),
        (lambda: _pd().inv_sqrt_matvec(v, method), torch.rsqrt),
        (lambda: _pd().function(torch.exp, v, method), torch.exp),
    ]:
        assert _error(call(), (Q * f(values)) @ Q.T @ v) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "which"), [(3, "LA"), (3, "SA"), (4, "BE"), (2, "LM"), (P, "LA")])
def test_eigsh(k: int, which: str) -> None:
    pairs, report = _indefinite().eigsh(k, which=which, return_report=True)
    values = torch.linalg.eigvalsh(INDEFINITE)
    order = {"LA": range(P - k, P), "SA": range(k), "BE": [0, 1, P - 2, P - 1]}.get(which)
    expected = values[list(order)] if order is not None else values[values.abs().argsort()[-k:]].sort().values
    assert torch.allclose(pairs.values, expected, atol=1e-9)
    assert float(pairs.residuals.max()) < 1e-8
    assert report.converged


def test_eigsh_by_shift_invert() -> None:
    A = Dense(INDEFINITE)
    pairs = A.eigsh(2, sigma=0.5)
    values = torch.linalg.eigvalsh(INDEFINITE)
    nearest = values[(values - 0.5).abs().argsort()[:2]].sort().values
    assert torch.allclose(pairs.values, nearest, atol=1e-9)


def test_norms() -> None:
    A, G = _indefinite(), m.closure(m.general(20, P))
    assert float(A.spectral_norm()) == pytest.approx(float(torch.linalg.matrix_norm(INDEFINITE, 2)), rel=1e-3)
    assert float(G.spectral_norm()) == pytest.approx(float(torch.linalg.matrix_norm(m.general(20, P), 2)), rel=1e-3)
    value, report = A.frobenius_norm(Hutchinson(probes=40), return_report=True)
    assert abs(float(value) - float(INDEFINITE.norm())) <= 3 * report.half_width
    assert float(A.frobenius_norm()) == pytest.approx(float(INDEFINITE.norm()), rel=1e-12)


def test_spectrum() -> None:
    spectrum = _pd().spectrum(probes=20, steps=P)
    exact = torch.logdet(PD + 0.1 * m.eye(P))
    estimate = spectrum.logdet(0.1)
    assert abs(float(estimate.value) - float(exact)) <= 3 * estimate.half_width + 1e-9


@pytest.mark.parametrize("make", [Dense, lambda M: Kronecker(M, m.pd(2)), lambda M: Dense(M) + Diagonal(m.positive(P))])
def test_spectrum_of_tensors_has_the_bound_of_a_factorisation(
    make: Callable[[Tensor], LinearOperator],
) -> None:
    A = make(PD)
    spectrum = A.spectrum(probes=20, steps=P)
    exact = torch.logdet(A.to_dense() + 0.1 * m.eye(A.shape[0]))
    estimate = spectrum.logdet(0.1)
    assert abs(float(estimate.value) - float(exact)) <= 3 * estimate.half_width + 1e-9
    with pytest.raises(ShapeError, match=r"shape \(2,\), expected one number"):
        spectrum.logdet(torch.ones(2))


def test_spectrum_without_a_bound_knows_no_logdet() -> None:
    for A in (Dense(INDEFINITE), _indefinite()):
        spectrum = A.spectrum(probes=20, steps=P)
        assert float(spectrum.trace_of(torch.abs).value) > 0
        with pytest.raises(NotPositiveDefiniteError, match="is_psd, lower_bound"):
            spectrum.logdet(1e3)


def test_a_large_matrix_free_operator_never_becomes_dense() -> None:
    size = 5_000  # beyond MAX_DENSE
    U, d = m.general(size, 2), 4 * m.positive(size)
    low = LowRank(U)
    A = Closure(lambda V: low @ V, (size, size), batched=True, is_psd=True).add_diagonal(d)
    b = m.vector(size)
    assert A.explain("solve").startswith("solve: CG")
    assert A.explain("logdet").startswith("logdet: SLQ")
    assert A.explain("trace").startswith("trace: XTrace")
    assert A.explain("diagonal").startswith("diagonal: XDiag")
    exact = low + Diagonal(d)
    assert _error(A.solve(b), exact.solve(b)) < 1e-4
    value, report = A.logdet(return_report=True)
    assert abs(float(value) - float(exact.logdet())) <= 2 * report.half_width
    trace, report = A.trace(return_report=True)
    assert abs(float(trace) - float(exact.trace())) <= 2 * report.half_width
    inverse, report = A.inverse().logdet(return_report=True)
    assert float(inverse) == -float(value)
    assert abs(float(inverse) + float(exact.logdet())) <= 2 * report.half_width
    assert report.bracket[0] <= report.bracket[1]
    root = A.inv_sqrt_matvec(b)
    assert _error(root @ root, b @ exact.solve(b)) < 1e-4


def test_float32_that_cannot_resolve_the_damping_says_so() -> None:
    p = Parts(torch.float32, "cpu")
    A = p.closure(1e6 * p.psd(30, 10), is_psd=True).add_diagonal(0.1)
    from curvops.errors import NotPositiveDefiniteError

    for call in (A.logdet, lambda: A.logdet(SLQ()), lambda: A.inv_sqrt_matvec(p.vector(30))):
        with pytest.raises(NotPositiveDefiniteError, match="float64"):
            call()


@pytest.mark.parametrize("build", [_pd, lambda: Dense(PD), lambda: LowRank(m.general(P, 3)).add_diagonal(1.0)])
def test_reports_are_frozen_and_say_why(build: Callable[[], LinearOperator]) -> None:
    for call in ("logdet", "trace", "diagonal", "solve"):
        arguments = (m.vector(P),) if call == "solve" else ()
        _, report = getattr(build(), call)(*arguments, return_report=True)
        assert report.reason
        assert report.converged
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.algorithm = "another"
