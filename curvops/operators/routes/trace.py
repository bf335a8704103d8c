"""Which algorithm answers `trace`: closed form, the diagonal of a dense copy, or a stochastic estimate to 1 %."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.linalg.traces import hutchinson_trace
from curvops.linalg.xtrace import xtrace
from curvops.operators import methods
from curvops.operators.routes import sampled
from curvops.operators.routes.plan import Plan, probes_within_memory, refuse_method

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_WORTHWHILE = 200
"""Probes that XTrace must be able to keep: with fewer, a slowly decaying spectrum leaves it behind Hutchinson."""


def plan(A: LinearOperator, method: methods.Method | None) -> Plan:
    """The plan for `A.trace(method)`."""
    if isinstance(method, methods.Hutchinson | methods.XTrace):
        return _estimate(A, method, "asked for")
    if method is not None:
        raise refuse_method("trace", method, "Hutchinson", "XTrace")
    if exact := sampled.exact(A, "trace", A._trace, torch.trace):
        return exact
    too_large = f"P = {A.shape[0]:,} is too large for a dense copy"
    if probes_within_memory(A) >= _WORTHWHILE:
        return _estimate(A, methods.XTrace(), too_large)
    return _estimate(A, methods.Hutchinson(), f"{too_large}, and the sketch of XTrace for the memory budget")


def _estimate(A: LinearOperator, method: methods.Hutchinson | methods.XTrace, reason: str) -> Plan:
    estimator = hutchinson_trace if isinstance(method, methods.Hutchinson) else xtrace
    return sampled.estimate(A, method, reason, estimator, _average, "half-width")


def _average(Z: Tensor, AZ: Tensor) -> Tensor:
    return (Z * AZ).sum(dtype=torch.float64) / Z.shape[1]
