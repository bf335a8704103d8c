"""Which algorithm answers `frobenius_norm` and `spectral_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.linalg import norms
from curvops.linalg.results import EstimateReport, settle
from curvops.operators import methods
from curvops.operators.routes.plan import (
    Plan,
    counted,
    dense_is_affordable,
    dense_reason,
    exact_report,
    product,
    refuse_method,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


def frobenius(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.frobenius_norm(method)`."""
    if method is not None and not isinstance(method, methods.Hutchinson):
        raise refuse_method("frobenius_norm", method, "Hutchinson")
    if method is None and dense_is_affordable(A):
        return _dense(A, lambda M: M.norm())
    chosen = method or methods.Hutchinson()

    def run() -> tuple[Tensor, EstimateReport]:
        options = {"probes": chosen.probes, "rtol": chosen.rtol, "generator": chosen.generator}
        given = {name: value for name, value in options.items() if value is not None}
        value, report = norms.frobenius_norm(product(A), A.shape[1], dtype=A.dtype, device=A.device, **given)
        estimate = torch.as_tensor(value, dtype=torch.float64)
        settle(estimate, report, chosen.on_failure, "Give more probes, or a wider rtol.")
        return estimate, report

    return Plan("Hutchinson", "too large for a dense copy" if method is None else "asked for", run)


def spectral(A: LinearOperator, rtol: float) -> Plan:
    """The plan for `A.spectral_norm(rtol)`: Lanczos on A, or on AᵀA where A is not symmetric."""
    if A._holds_tensors() and dense_is_affordable(A):
        return _dense(A, lambda M: torch.linalg.matrix_norm(M, 2))
    matmat = product(A) if A.is_symmetric else lambda V: A._rapply(product(A)(V))

    def run() -> tuple[Tensor, EstimateReport]:
        target = rtol if A.is_symmetric else 2 * rtol
        value, report = norms.spectral_norm(matmat, A.shape[1], rtol=target, dtype=A.dtype, device=A.device)
        estimate = torch.as_tensor(value, dtype=torch.float64)
        settle(estimate, report, "raise", "Give a wider rtol.")
        return (estimate if A.is_symmetric else estimate.sqrt()), report

    return Plan("Lanczos", f"largest Ritz value to {rtol:g}", run)


def _dense(A: LinearOperator, norm: object) -> Plan:
    reason = dense_reason(A) if A.shape[0] == A.shape[1] else "small enough for a dense copy"

    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value = norm(A.to_dense())  # type: ignore[operator]
        return value, exact_report(value, "dense matrix", reason, spent)

    return Plan("dense matrix", reason, run)
