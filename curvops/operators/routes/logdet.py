"""Which algorithm answers `logdet` and `slogdet`.

structure with a closed form                            exact
P small, or tensors held                                dense Cholesky (which also establishes definiteness)
curvature BᵀB plus a positive diagonal, n < P small     function space: determinant lemma through the Gram matrix
lower bound on the spectrum above 0                     stochastic Lanczos quadrature
anything else                                           refused
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, UnsupportedError
from curvops.linalg import dense
from curvops.linalg.growth import FIRST_STEPS, together
from curvops.linalg.probes import resolve_seed
from curvops.linalg.results import EstimateReport, settle
from curvops.linalg.slq import slq_logdet
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.dense import definite_cholesky
from curvops.operators.functionspace import FunctionSpaceForm, function_space
from curvops.operators.routes.definiteness import indefinite
from curvops.operators.routes.plan import (
    EIGH,
    FIRST_PROBES,
    Plan,
    basis_bytes,
    chosen_at_run,
    counted,
    dense_is_affordable,
    dense_need,
    dense_reason,
    exact_report,
    lanczos_need,
    product,
    refuse_method,
    resolvable,
    steps_within_memory,
)
from curvops.operators.routes.stochasticgradient import StochasticGradient

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_ADVICE = (
    "Give more probes and steps (SLQ(probes=, steps=)), a wider target (SLQ(rtol=, atol=)), a larger damping, or "
    'on_failure="warn" to take the estimate with its half-width.'
)


def plan(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.logdet(method)`."""
    from curvops.operators.inverse import Inverse

    if isinstance(A, Inverse):
        return _negated(plan(A.operator, method))
    if method is not None:
        return _plan_given(A, method)
    if not A.is_symmetric:
        raise NotPositiveDefiniteError(
            f"logdet: {A!r} is not known to be symmetric; slogdet() takes any square matrix."
        )
    closed_form = A._exact("logdet")
    if closed_form:
        return _exact(A, closed_form, "closed form of the structure")
    dual = function_space(A, must=False) if not A._holds_tensors() else None
    if dual is not None and dual.known_rows is None:
        return chosen_at_run(dual, "logdet", lambda: plan(A, None))
    if dual is not None and dual.is_affordable() and dual.rows < A.shape[0]:
        return _function_space(dual, f"n = {dual.rows:,} < P = {A.shape[0]:,}: exact through the Gram matrix")
    if dense_is_affordable(A):
        return _cholesky(A, dense_reason(A))
    return _slq(A, methods.SLQ(), f"P = {A.shape[0]:,} is too large for a dense factorisation")


def _negated(inner: Plan) -> Plan:
    """log det A⁻¹ = −log det A: the inverse asks for no more than the operator itself."""

    def run() -> tuple[Tensor, EstimateReport]:
        value, report = inner.run()
        low, high = report.bracket
        return -value, replace(report, value=-report.value, bracket=(-high, -low))

    return replace(inner, run=run)


def plan_signed(A: LinearOperator) -> Plan:
    """The plan for `A.slogdet()`, whose `run` returns (sign, log|det|)."""
    closed_form = A._exact("slogdet")
    if closed_form:
        return Plan(closed_form, "closed form of the structure", A._slogdet)
    if dense_is_affordable(A):
        return Plan("dense LU", dense_reason(A), lambda: dense.slogdet(A.to_dense()), need=lambda: dense_need(A))
    raise UnsupportedError(
        f"slogdet: {A!r} has no closed form and is too large for a dense LU; logdet() estimates where the spectrum is "
        f"known to be positive."
    )


def _plan_given(A: LinearOperator, method: methods.Method) -> Plan:
    A._require_symmetric("logdet")
    if isinstance(method, methods.Cholesky):
        return _cholesky(A, "asked for")
    if isinstance(method, methods.Eigh):
        return _eigh(A)
    if isinstance(method, methods.FunctionSpace):
        dual = function_space(A)
        assert dual is not None
        return _function_space(dual, "asked for")
    if isinstance(method, methods.SLQ):
        return _slq(A, method, "asked for")
    raise refuse_method("logdet", method, "Cholesky", "Eigh", "FunctionSpace", "SLQ")


def _exact(A: LinearOperator, name: str, reason: str) -> Plan:
    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value = A._logdet()
        return value, exact_report(value, name, reason, spent)

    return Plan(name, reason, run)


def _cholesky(A: LinearOperator, reason: str) -> Plan:
    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        operator, note = resolvable(A)
        L = definite_cholesky(operator.to_dense())
        value = dense.logdet_cholesky(L)
        return value, exact_report(value, "dense Cholesky", reason + note, spent)

    return Plan("dense Cholesky", reason, run, need=lambda: dense_need(A))


def _eigh(A: LinearOperator) -> Plan:
    from curvops.operators.dense import Dense

    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        operator, note = resolvable(A)
        value = Dense(operator.to_dense(), is_symmetric=True)._spectral()._logdet()
        return value, exact_report(value, "dense eigendecomposition", "asked for" + note, spent)

    return Plan("dense eigendecomposition", "asked for", run, need=lambda: dense_need(A, EIGH))


def _function_space(dual: FunctionSpaceForm, reason: str) -> Plan:
    name = dual.algorithm("logdet")

    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(dual.operator)
        operator, note = resolvable(dual.operator)
        form = dual if operator is dual.operator else function_space(operator)
        assert form is not None
        value = form.logdet()
        return value, exact_report(value, name, reason + note, spent)

    return Plan(name, reason, run, need=dual.need if dual.known_rows is not None else None)


def _slq(A: LinearOperator, method: methods.SLQ, reason: str, established: float | None = None) -> Plan:
    bound = A.lower_bound if established is None else established
    if bound is None or bound <= 0:
        return indefinite(A, "logdet", reason, lambda found, why: _slq(A, method, why, found))

    def run() -> tuple[Tensor, EstimateReport]:
        operator, note = resolvable(A)
        seed = resolve_seed(method.generator)
        value, report = slq_logdet(
            product(operator), operator.shape[0], lower_bound=bound, probes=method.probes, steps=method.steps,
            seed=seed, dtype=operator.dtype, device=operator.device, rtol=method.rtol, atol=method.atol,
            max_steps=max(method.steps or 0, steps_within_memory(operator, FIRST_PROBES)), memory=basis_bytes(operator),
        )  # fmt: skip
        report = replace(report, reason=f"{reason}{note}; {report.reason}", seed=None if method.generator else seed)
        estimate = torch.as_tensor(value, dtype=torch.float64, device=operator.device)
        settle(estimate, report, method.on_failure, _ADVICE)
        if torch.is_grad_enabled() and operator._requires_grad():
            gradient = StochasticGradient(operator, seed, max(report.probes, 10))
            estimate = gradient.attach(estimate)
            report = replace(report, gradient_stderr=gradient.stderr)
        return estimate, report

    return Plan("SLQ", reason, run, need=lambda: _slq_need(A, method))


def _slq_need(A: LinearOperator, method: methods.SLQ) -> Need:
    """The first probes at the first depth."""
    probes, steps = method.probes or FIRST_PROBES, min(method.steps or FIRST_STEPS, A.shape[0])
    probes = min(probes, together(A.shape[0], steps, A.dtype))
    return lanczos_need(A, probes, steps, grows=method.probes is None or method.steps is None)
