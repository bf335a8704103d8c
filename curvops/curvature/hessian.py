"""`HessianInterface`: the Hessian of the negative log-likelihood, batch by batch."""

from __future__ import annotations

from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.curvature.structured.diagonal import DiagonalHessian
from curvops.operators.base import LinearOperator


class HessianInterface(CurvatureInterface):
    """`factor` times the Hessian of `lossfunc`: the exact Hessian of −log p, indefinite in general; native.

    `diag` is exact (P products of about two gradients each) where a dense copy is affordable, otherwise estimated to
    5 % in the 2-norm; its `describe()` and `report` say which. `kron` is refused: a Hessian has no such factors.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator: As for
            `CurvatureInterface`.
    """

    def _full(self, objective: Objective) -> LinearOperator:
        return Hessian.of(objective)

    def _diag(self, objective: Objective) -> LinearOperator:
        return DiagonalHessian.of(objective)
