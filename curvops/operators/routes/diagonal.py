"""Which algorithm answers `diagonal`: closed form, a dense copy, or a stochastic estimate to 5 % in the 2-norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from curvops.linalg.traces import hutchinson_diagonal
from curvops.linalg.xtrace import xdiag
from curvops.operators import methods
from curvops.operators.routes import sampled
from curvops.operators.routes.plan import Plan, refuse_method

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


def plan(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.diagonal(method)`."""
    if isinstance(method, methods.Hutchinson | methods.XDiag):
        return _estimate(A, method, "asked for")
    if method is not None:
        raise refuse_method("diagonal", method, "Hutchinson", "XDiag")
    if exact := sampled.exact(A, "diagonal", A._diagonal, lambda M: M.diagonal().clone()):
        return exact
    return _estimate(A, methods.XDiag(), f"P = {A.shape[0]:,} is too large for a dense copy")


def _estimate(A: LinearOperator, method: methods.Hutchinson | methods.XDiag, reason: str) -> Plan:
    estimator = hutchinson_diagonal if isinstance(method, methods.Hutchinson) else xdiag
    return sampled.estimate(A, method, reason, estimator, _average, "standard error")


def _average(Z: Tensor, AZ: Tensor) -> Tensor:
    return (Z * AZ).mean(1)
