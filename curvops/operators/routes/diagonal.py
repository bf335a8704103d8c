"""Which algorithm answers `diagonal`: closed form, a dense copy, or a stochastic estimate to 5 % in the 2-norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.linalg.probes import rademacher, resolve_seed
from curvops.linalg.results import EstimateReport, settle
from curvops.linalg.traces import hutchinson_diagonal
from curvops.linalg.xtrace import xdiag
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

_ADVICE = 'Give more probes or a wider rtol, or on_failure="warn" to take the estimate with its standard error.'


def plan(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.diagonal(method)`."""
    if isinstance(method, methods.Hutchinson | methods.XDiag):
        return _estimate(A, method, "asked for")
    if method is not None:
        raise refuse_method("diagonal", method, "Hutchinson", "XDiag")
    closed_form = A._exact("diagonal")
    if closed_form:
        return _exact(A, closed_form, "closed form of the structure", None, A._diagonal)
    if dense_is_affordable(A):
        return _exact(
            A, "diagonal of the dense matrix", dense_reason(A), A._dense_need, lambda: A._dense().diagonal().clone()
        )
    return _estimate(A, methods.XDiag(), f"P = {A.shape[0]:,} is too large for a dense copy")


def _exact(
    A: LinearOperator, name: str, reason: str, need: Callable[[], Need] | None, compute: Callable[[], Tensor]
) -> Plan:
    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value = compute()
        return value, exact_report(value, name, reason, spent)

    return Plan(name, reason, run, need=need)


def _estimate(A: LinearOperator, method: methods.Hutchinson | methods.XDiag, reason: str) -> Plan:
    name = type(method).__name__
    estimator = hutchinson_diagonal if isinstance(method, methods.Hutchinson) else xdiag

    def run() -> tuple[Tensor, EstimateReport]:
        seed = resolve_seed(method.generator)
        kept: dict[str, Any] = {"max_probes": probes_within_memory(A)} if isinstance(method, methods.XDiag) else {}
        value, report = estimator(
            product(A), A.shape[0], probes=method.probes, rtol=method.rtol, seed=seed, dtype=A.dtype, device=A.device,
            **kept,
        )  # fmt: skip
        report = replace(report, reason=f"{reason}; {report.reason}", seed=None if method.generator else seed)
        settle(value, report, method.on_failure, _ADVICE)
        if torch.is_grad_enabled() and A._requires_grad():
            Z = rademacher(A.shape[0], 0, max(report.probes, 1), seed=seed, dtype=A.dtype, device=A.device)
            value = with_gradient_of(value, (Z * A._apply(Z)).mean(1))
        return value, report

    def need() -> Need:
        if isinstance(method, methods.XDiag):
            return sketch_need(A, method.probes)
        return A._product_need(FIRST_PROBES).beside(vectors(A, 3 * FIRST_PROBES))

    return Plan(name, reason, run, need=need)
