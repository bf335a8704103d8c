"""Which algorithm answers `trace`: closed form, the diagonal of a dense copy, or a stochastic estimate to 1 %."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.linalg.probes import rademacher, resolve_seed
from curvops.linalg.results import EstimateReport, settle
from curvops.linalg.traces import hutchinson_trace
from curvops.linalg.xtrace import xtrace
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.autograd import with_gradient_of
from curvops.operators.routes.plan import (
    FIRST_PROBES,
    Plan,
    counted,
    dense_is_affordable,
    dense_reason,
    exact_report,
    probes_within_memory,
    product,
    refuse_method,
    sketch_need,
    vectors,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_WORTHWHILE = 200
"""Probes that XTrace must be able to keep: with fewer, a slowly decaying spectrum leaves it behind Hutchinson."""

_ADVICE = 'Give more probes or a wider rtol, or on_failure="warn" to take the estimate with its half-width.'


def plan(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.trace(method)`."""
    if isinstance(method, methods.Hutchinson | methods.XTrace):
        return _estimate(A, method, "asked for")
    if method is not None:
        raise refuse_method("trace", method, "Hutchinson", "XTrace")
    closed_form = A._exact("trace")
    if closed_form:
        return _exact(A, closed_form, "closed form of the structure", None, A._trace)
    if dense_is_affordable(A):
        return _exact(A, "diagonal of the dense matrix", dense_reason(A), A._dense_need, lambda: A._dense().trace())
    too_large = f"P = {A.shape[0]:,} is too large for a dense copy"
    if probes_within_memory(A) >= _WORTHWHILE:
        return _estimate(A, methods.XTrace(), too_large)
    return _estimate(A, methods.Hutchinson(), f"{too_large}, and the sketch of XTrace for the memory budget")


def _exact(
    A: LinearOperator, name: str, reason: str, need: Callable[[], Need] | None, compute: Callable[[], Tensor]
) -> Plan:
    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value = compute()
        return value, exact_report(value, name, reason, spent)

    return Plan(name, reason, run, need=need)


def _estimate(A: LinearOperator, method: methods.Hutchinson | methods.XTrace, reason: str) -> Plan:
    name = type(method).__name__
    estimator = hutchinson_trace if isinstance(method, methods.Hutchinson) else xtrace

    def run() -> tuple[Tensor, EstimateReport]:
        seed = resolve_seed(method.generator)
        kept: dict[str, Any] = {"max_probes": probes_within_memory(A)} if isinstance(method, methods.XTrace) else {}
        value, report = estimator(
            product(A), A.shape[0], probes=method.probes, rtol=method.rtol, seed=seed, dtype=A.dtype, device=A.device,
            **kept,
        )  # fmt: skip
        report = replace(report, reason=f"{reason}; {report.reason}", seed=None if method.generator else seed)
        estimate = torch.as_tensor(value, dtype=torch.float64, device=A.device)
        settle(estimate, report, method.on_failure, _ADVICE)
        if torch.is_grad_enabled() and A._requires_grad():
            Z = rademacher(A.shape[0], 0, max(report.probes, 1), seed=seed, dtype=A.dtype, device=A.device)
            estimate = with_gradient_of(estimate, (Z * A._apply(Z)).sum(dtype=torch.float64) / Z.shape[1])
        return estimate, report

    def need() -> Need:
        if isinstance(method, methods.XTrace):
            return sketch_need(A, method.probes)
        return A._product_need(FIRST_PROBES).beside(vectors(A, 3 * FIRST_PROBES))

    return Plan(name, reason, run, need=need)
