"""Plans for what is exact by structure or size and otherwise sampled with ±1 probes: traces and diagonals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.linalg.probes import rademacher, resolve_seed
from curvops.linalg.results import EstimateReport, settle
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
    sketch_need,
    vectors,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Sampled = methods.Hutchinson | methods.XTrace | methods.XDiag


def exact(
    A: LinearOperator,
    verb: str,
    closed: Callable[[], Tensor],
    of_dense: Callable[[Tensor], Tensor],
) -> Plan | None:
    """By the structure's closed form for `verb` or from a dense matrix; None where there is neither."""

    def plan(name: str, reason: str, compute: Callable[[], Tensor], need: Callable[[], Need] | None) -> Plan:
        def run() -> tuple[Tensor, EstimateReport]:
            spent = counted(A)
            value = compute()
            return value, exact_report(value, name, reason, spent)

        return Plan(name, reason, run, need=need)

    if name := A._exact(verb):
        return plan(name, "closed form of the structure", closed, None)
    if dense_is_affordable(A):
        return plan("diagonal of the dense matrix", dense_reason(A), lambda: of_dense(A._dense()), A._dense_need)
    return None


def estimate(
    A: LinearOperator,
    method: Sampled,
    reason: str,
    estimator: Callable[..., tuple[Any, EstimateReport]],
    average: Callable[[Tensor, Tensor], Tensor],
    width: str,
) -> Plan:
    """By probes; those that a sketch keeps are as many as the memory budget holds.

    Args:
        estimator: The algorithm, `(matmat, size, probes=, rtol=, …)` → value and report.
        average: Of probes Z and A Z `(P, K)` the plain estimate, whose gradient the value has.
        width: What the report gives beside the value, for advice.
    """
    sketches = not isinstance(method, methods.Hutchinson)
    advice = f'Give more probes or a wider rtol, or on_failure="warn" to take the estimate with its {width}.'

    def run() -> tuple[Tensor, EstimateReport]:
        seed = resolve_seed(method.generator)
        kept: dict[str, Any] = {"max_probes": probes_within_memory(A)} if sketches else {}
        value, report = estimator(
            product(A), A.shape[0], probes=method.probes, rtol=method.rtol, seed=seed, dtype=A.dtype, device=A.device,
            **kept,
        )  # fmt: skip
        report = replace(report, reason=f"{reason}; {report.reason}", seed=None if method.generator else seed)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.float64, device=A.device)
        settle(value, report, method.on_failure, advice)
        if torch.is_grad_enabled() and A._requires_grad():
            Z = rademacher(A.shape[0], 0, max(report.probes, 1), seed=seed, dtype=A.dtype, device=A.device)
            value = with_gradient_of(value, average(Z, A._apply(Z)))
        return value, report

    def need() -> Need:
        if sketches:
            return sketch_need(A, method.probes)
        return A._product_need(FIRST_PROBES).beside(vectors(A, 3 * FIRST_PROBES))

    return Plan(type(method).__name__, reason, run, need=need)
