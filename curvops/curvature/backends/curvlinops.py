"""The interface by curvlinops: products by its linear operators, Kronecker factors by its KFAC.

What curvlinops gets wrong, and what happens instead, is told where it is handled: `curvlinops_adapter`.
"""

from __future__ import annotations

from curvops.curvature.backends.curvlinops_adapter import (
    CurvlinopsProduct,
    KroneckerFactors,
    from_curvlinops,
    provenance,
)
from curvops.curvature.backends.foreign import deferred
from curvops.curvature.ef import EFInterface
from curvops.curvature.ggn import GGNInterface
from curvops.curvature.hessian import HessianInterface
from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.fisher import EmpiricalFisher, MCFisher
from curvops.curvature.matrixfree.ggn import GGN
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.curvature.structured.statistics import Approx
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal

__all__ = ["CurvlinopsEF", "CurvlinopsGGN", "CurvlinopsHessian", "CurvlinopsInterface", "from_curvlinops"]


class CurvlinopsInterface(CurvatureInterface):
    """Curvatures by curvlinops (<https://github.com/f-dangel/curvlinops>); see the classes of each curvature.

    `full` returns an operator whose products curvlinops computes. Its first product is compared with double backward
    once (about three gradients); where they differ, curvops' own products answer and `repr` says why. `diag`,
    `jacobians` and `gradients` are native.

    `kron` factorises Linear and Conv2d layers and refuses the others by name, where `GGNInterface.kron` would do.
    """

    def _kron(self, objective: Objective, cotangents: Cotangents, approx: Approx, N: int) -> LinearOperator:
        scale = 1.0 / self.factor if cotangents.fisher == "empirical" else 1.0
        factors = KroneckerFactors(objective, cotangents, approx, N, scale)
        return deferred(
            objective,
            GGN.of(objective),
            lambda: BlockDiagonal(*factors.blocks(), layout=objective.layout),
            BlockDiagonal,
            library=provenance(),
            label=factors.label(),
        )


class CurvlinopsGGN(CurvlinopsInterface, GGNInterface):
    """The GGN, or with `stochastic=True` the Monte-Carlo Fisher, by curvlinops; arguments as for `GGNInterface`.

    Example:
        >>> import torch
        >>> from curvops.curvature import CurvlinopsGGN
        >>> backend = CurvlinopsGGN(torch.nn.Linear(3, 2), "classification")
        >>> loss, H = backend.full(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> H
        GGN(P=8, N=5, classification) [by curvlinops 3.0.1]
    """

    def _full(self, objective: Objective) -> LinearOperator:
        if not self.stochastic:
            return CurvlinopsProduct.of(objective, native=GGN)
        own = {"num_samples": self.num_samples, "seed": self._seed()}
        return CurvlinopsProduct.of(objective, native=MCFisher, own=own)


class CurvlinopsEF(CurvlinopsInterface, EFInterface):
    """The empirical Fisher by curvlinops, in the scale of `EFInterface`: for regression twice `co.EmpiricalFisher`."""

    def _full(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * CurvlinopsProduct.of(objective, native=EmpiricalFisher)


class CurvlinopsHessian(CurvlinopsInterface, HessianInterface):
    """The Hessian by curvlinops; of models with layer or instance normalisation, where it errs, by curvops."""

    def _full(self, objective: Objective) -> LinearOperator:
        return CurvlinopsProduct.of(objective, native=Hessian)
