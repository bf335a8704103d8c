"""`HessianInterface`: the Hessian of the negative log-likelihood, batch by batch."""

from __future__ import annotations

from curvops.curvature.exact_diagonal import deferred_diagonal, diagonal_of_columns
from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.operators.base import LinearOperator


class HessianInterface(CurvatureInterface):
    """`factor` times the Hessian of `lossfunc`: the exact Hessian of −log p, indefinite in general; native.

    `diag` is exact and reads all P columns: P products of about two gradients each. `full(…)[1].diagonal()` estimates
    it to a stated error at less cost.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator: As for
            `CurvatureInterface`.
    """

    def _full(self, objective: Objective) -> LinearOperator:
        return Hessian.of(objective)

    def _diag(self, objective: Objective) -> LinearOperator:
        curvature = Hessian.of(objective)
        return deferred_diagonal(curvature, lambda: diagonal_of_columns(curvature), is_psd=False)
