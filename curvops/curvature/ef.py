"""`EFInterface`: the empirical Fisher in the scale of laplace-torch, batch by batch."""

from __future__ import annotations

from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.fisher import EmpiricalFisher
from curvops.curvature.objective import Objective
from curvops.curvature.structured.diagonal import DiagonalEF
from curvops.operators.base import LinearOperator


class EFInterface(CurvatureInterface):
    """`factor · Σ g gᵀ`, with g the gradient of the **unscaled** `lossfunc`; native.

    Mind the scale: `co.EmpiricalFisher` is `Σ ĝ ĝᵀ` with ĝ = factor · g the gradient of −log p. For classification and
    binary targets both agree; for regression (factor ½) `full`, `diag` and `kron` here are **twice** as large.

    Of sequences each position is one term of the sum, so that `full` is not `factor · GsᵀGs` with `Gs` from
    `gradients`, which sums over positions first; `co.EmpiricalFisher(…, datum="example")` is that one.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator: As for
            `CurvatureInterface`.
    """

    _fisher = "empirical"

    def _full(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * EmpiricalFisher.of(objective)

    def _diag(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * DiagonalEF.of(objective, Cotangents("empirical"))
