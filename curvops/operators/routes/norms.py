"""Which algorithm answers `frobenius_norm` and `spectral_norm`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.linalg import norms
from curvops.linalg.results import EstimateReport, settle
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.routes.plan import (
    FIRST_PROBES,
    Plan,
    counted,
    dense_is_affordable,
    dense_reason,
    exact_report,
    product,
    refuse_method,
    vectors,
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
        estimate = torch.as_tensor(value, dtype=torch.float64, device=A.device)
        settle(estimate, report, chosen.on_failure, "Give more probes, or a wider rtol.")
        return estimate, report

    reason = "too large for a dense copy" if method is None else "asked for"
    return Plan("Hutchinson", reason, run, need=lambda: A._product_need(FIRST_PROBES).beside(vectors(A, 30)))


def spectral(A: LinearOperator, rtol: float) -> Plan:
    """The plan for `A.spectral_norm(rtol)`: Lanczos on A, or on AᵀA where A is not symmetric."""
    if A._holds_tensors() and dense_is_affordable(A):
        return _dense(A, lambda M: torch.linalg.matrix_norm(M, 2))
    if A.is_symmetric:
        return _lanczos_norm(A, product(A), rtol, is_psd=A.is_psd)

    def normal(V: Tensor) -> Tensor:
        with torch.no_grad():
            return A._rapply(product(A)(V))

    return _lanczos_norm(A, normal, rtol, is_psd=True, squared=True)


def _lanczos_norm(
    A: LinearOperator, matmat: Callable[[Tensor], Tensor], rtol: float, *, is_psd: bool, squared: bool = False
) -> Plan:
    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value, report = norms.spectral_norm(
            matmat, A.shape[1], rtol=min(2 * rtol, 0.5) if squared else rtol, is_psd=is_psd,
            dtype=A.dtype, device=A.device,
        )  # fmt: skip
        if squared:
            low, high = (math.sqrt(end) for end in report.bracket)
            value = math.sqrt(value)
            report = replace(report, value=value, bracket=(low, high), half_width=high - value)
        report = replace(report, matvecs=spent()[0])
        settle(value, report, "raise", "Give a wider rtol.")
        return torch.as_tensor(value, dtype=torch.float64, device=A.device), report

    def need() -> Need:
        steps = norms.depth(A.shape[1], min(2 * rtol, 0.5) if squared else rtol, is_psd)
        return A._product_need(1).beside(A.shape[1] * (steps + 5) * A.dtype.itemsize)

    of = "AᵀA" if squared else "A"
    return Plan("Lanczos", f"largest stretch in a Krylov space of {of}, bracketed to {rtol:g}", run, need=need)


def _dense(A: LinearOperator, norm: object) -> Plan:
    reason = dense_reason(A) if A.shape[0] == A.shape[1] else "small enough for a dense copy"

    def run() -> tuple[Tensor, EstimateReport]:
        spent = counted(A)
        value = norm(A.to_dense())  # type: ignore[operator]
        return value, exact_report(value, "dense matrix", reason, spent)

    return Plan("dense matrix", reason, run, need=A._dense_need)
