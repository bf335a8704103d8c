"""The interface by curvlinops: products by its linear operators, Kronecker factors by its KFAC.

What curvlinops gets wrong, and what happens instead, is told where it is handled: `curvlinops_adapter`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvops.curvature.backends.curvlinops_adapter import (
    CurvlinopsProduct,
    Fisher,
    KroneckerFactors,
    from_curvlinops,
    provenance,
)
from curvops.curvature.ef import EFInterface
from curvops.curvature.ggn import GGNInterface
from curvops.curvature.hessian import HessianInterface
from curvops.curvature.interface import CurvatureInterface, Inputs, refuse_unknown
from curvops.curvature.matrixfree.fisher import EmpiricalFisher, MCFisher
from curvops.curvature.matrixfree.ggn import GGN
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.errors import DataError, UnsupportedError
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.deferred import Deferred

__all__ = ["CurvlinopsEF", "CurvlinopsGGN", "CurvlinopsHessian", "CurvlinopsInterface", "from_curvlinops"]


class CurvlinopsInterface(CurvatureInterface):
    """Curvatures by curvlinops (<https://github.com/f-dangel/curvlinops>); see the classes of each curvature.

    `full` returns an operator whose products curvlinops computes. Its first product is compared with double backward
    once (about three gradients); where they differ, curvops' own products answer and `repr` says why. `diag`,
    `jacobians` and `gradients` are native.
    """

    _fisher: Fisher | None = None

    def kron(
        self,
        x: Inputs,
        y: Tensor,
        N: int,
        *,
        mc_samples: int | None = None,
        kfac_approx: str = "expand",
        **kwargs: Any,
    ) -> tuple[Float[Tensor, ""], LinearOperator]:
        """Loss and the Kronecker-factored curvature of one batch of M data (KFAC; Martens & Grosse 2015).

        One block per parameter, in their order: `B ⊗ A` for a weight `(out, in)`, `B` for a bias. B sums over the batch
        the outer products of output gradients; A is the mean of the layer's inputs' outer products, times M/N. So the
        factors of batches add up, B = Σ B_b and A = Σ A_b, to those of all N data; `+` adds operators, not factors.

        Args:
            x: Inputs of one batch.
            y: Targets.
            N: Number of data in all.
            mc_samples: Draws per datum where `stochastic`; None for `num_samples`.
            kfac_approx: "expand" or "reduce" for layers with several positions per datum (Eschenhagen et al. 2023).
            kwargs: None known.

        Returns:
            `factor · lossfunc`, and a block-diagonal operator `(P, P)`, whose factors are computed at first need.

        Raises:
            UnsupportedLayerError: A layer other than Linear and Conv2d (without groups, zero padding), or a tied one.
            UnsupportedError: `subnetwork_indices` are set, or targets are ignored.

        Cost: one forward without graph now; C backward passes (exact), `mc_samples` (mc) or one (empirical) later.
        """
        refuse_unknown(self, "kron", kwargs, ("N", "mc_samples", "kfac_approx"))
        if self._fisher is None:
            return super().kron(x, y, N)
        if self.subnetwork_indices is not None:
            raise UnsupportedError(
                "kron has no meaning for single entries of a layer (subnetwork_indices); use full() or diag()"
            )
        if isinstance(N, bool) or not isinstance(N, int) or N < 1:
            raise DataError(f"N is {N!r}; expected the number of data in all, at least 1.")
        if kfac_approx not in ("expand", "reduce"):
            raise DataError(f'kfac_approx is {kfac_approx!r}; expected "expand" or "reduce".')
        if mc_samples is not None and self._fisher != "mc":
            raise DataError(f"mc_samples={mc_samples} counts draws, and {self!r} draws none; set stochastic=True.")
        samples = getattr(self, "num_samples", 1) if mc_samples is None else mc_samples
        if samples < 1:
            raise DataError(f"mc_samples is {samples}; expected at least 1.")
        objective = self._objective(x, y)
        scale = 1.0 / self.factor if self._fisher == "empirical" else 1.0
        seed = self._seed() if self._fisher == "mc" else 0
        factors = KroneckerFactors(objective, self._fisher, kfac_approx, N, scale, samples, seed)
        watch = GGN.of(objective)
        operator = Deferred(
            lambda: BlockDiagonal(*factors.blocks(), layout=objective.layout), BlockDiagonal, watch.shape, watch.dtype,
            watch.device, label=factors.label(), note=f"by {provenance()}", watch=watch, is_psd=True,
            layout=objective.layout, memory_budget=objective.memory_budget,
        )  # fmt: skip
        return objective.loss(), operator


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

    @property
    def _fisher(self) -> Fisher:  # type: ignore[override]
        return "mc" if self.stochastic else "exact"

    def _full(self, objective: Objective) -> LinearOperator:
        if self.stochastic:
            own = {"num_samples": self.num_samples, "seed": self._seed()}
            return CurvlinopsProduct.of(objective, native=MCFisher, own=own)
        return CurvlinopsProduct.of(objective, native=GGN)


class CurvlinopsEF(CurvlinopsInterface, EFInterface):
    """The empirical Fisher by curvlinops, in the scale of `EFInterface`: for regression twice `co.EmpiricalFisher`."""

    _fisher = "empirical"

    def _full(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * CurvlinopsProduct.of(objective, native=EmpiricalFisher)


class CurvlinopsHessian(CurvlinopsInterface, HessianInterface):
    """The Hessian by curvlinops; of models with layer or instance normalisation, where it errs, by curvops."""

    def _full(self, objective: Objective) -> LinearOperator:
        return CurvlinopsProduct.of(objective, native=Hessian)
