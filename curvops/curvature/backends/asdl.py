"""The interface by ASDL: per-example gradients, diagonals and Kronecker factors by its rules for layers.

What ASDL gets wrong, and what happens instead, is told where it is handled: `asdl_adapter`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.curvature.backends.asdl_adapter import Examples, library, provenance
from curvops.curvature.backends.asdl_curvatures import (
    AsdlHessianProduct,
    AsdlProduct,
    KroneckerFactors,
    hessian_diagonal,
    squared,
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
from curvops.curvature.subject import Inputs
from curvops.nets.batches import batch_length
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.diagonal import Diagonal

__all__ = ["AsdlEF", "AsdlGGN", "AsdlHessian", "AsdlInterface"]


class AsdlInterface(CurvatureInterface):
    """Jacobians and gradients by ASDL (<https://github.com/kazukiosawa/asdl>); see the classes of each curvature.

    ASDL knows Linear, Conv2d, BatchNorm1d, BatchNorm2d and LayerNorm. It works on a copy of the model that shares the
    parameters' storage, and is checked before it is used: `jacobians`, `gradients`, `diag` and `kron` refuse by name
    what it gets wrong, where `full` answers natively and says so in `repr`. With `enable_backprop=True` Jacobians are
    curvops' own, since ASDL's have no graph.

    No global random state is read: `stochastic=True` draws as `GGNInterface` does.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator: As for
            `CurvatureInterface`.

    Raises:
        MissingExtraError: ASDL is not installed: `pip install 'curvops[asdl]'`.
        UnsupportedError: Another version than 0.1a4 is.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
        **own: Any,
    ) -> None:
        library()
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator=generator, **own
        )

    def _example_rows(
        self,
        network: Network,
        selection: ParameterSelection,
        x: Inputs,
        f: Tensor,
        cotangents: Float[Tensor, "B R *event"] | None = None,
    ) -> Float[Tensor, "B R P"]:
        result, room = self._room_for_rows(selection, f, cotangents)
        if cotangents is None:
            units = torch.eye(result.shape[1], dtype=f.dtype, device=f.device).reshape(-1, *f.shape[1:])
            cotangents = units.expand(len(f), *units.shape)
        examples = Examples(self.model, selection, x, f)
        step = examples.step(room // max(result.shape[1], 1))
        for start in range(0, len(f), step):
            stop = min(start + step, len(f))
            result[start:stop] = examples.rows(start, stop, cotangents[start:stop])
        return result

    def _get_batch_size(self, x: Inputs) -> int:
        """Number of data: rows of a layer in excess of it are positions, and are summed."""
        return batch_length(x, "x", self.dict_key_x)

    def _squares(self, objective: Objective, cotangents: Cotangents) -> LinearOperator:
        """The diagonal of `Σ Jᵀ Λ J`, at first need."""
        known = (objective, cotangents.operator(objective))
        return deferred(*known, lambda: Diagonal(squared(objective, cotangents)), Diagonal, library=provenance())

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

    def __repr__(self) -> str:
        return f"{super().__repr__()} [by {provenance()}]"


class AsdlGGN(AsdlInterface, GGNInterface):
    """The GGN, or with `stochastic=True` the Monte-Carlo Fisher, by ASDL; arguments as for `GGNInterface`.

    `full` multiplies with ASDL's per-example gradients, R = C of them per datum for softmax C − 1; `diag` squares them.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator,
            stochastic=stochastic, num_samples=num_samples,
        )  # fmt: skip

    def _full(self, objective: Objective) -> LinearOperator:
        if not self.stochastic:
            return AsdlProduct.of(objective, native=GGN)
        own = {"num_samples": self.num_samples, "seed": self._seed()}
        return AsdlProduct.of(objective, native=MCFisher, own=own)

    def _diag(self, objective: Objective) -> LinearOperator:
        self._require_root(self._fisher)
        return self._squares(objective, self._cotangents())


class AsdlEF(AsdlInterface, EFInterface):
    """The empirical Fisher by ASDL, in the scale of `EFInterface`: for regression twice `co.EmpiricalFisher`.

    Args:
        model, likelihood, last_layer, dict_key_x, dict_key_y, generator: As for `CurvatureInterface`, in this order.
        subnetwork_indices: The same; by name only.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
        *,
        subnetwork_indices: Tensor | None = None,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator)

    def _full(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * AsdlProduct.of(objective, native=EmpiricalFisher)

    def _diag(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * self._squares(objective, Cotangents("empirical"))


class AsdlHessian(AsdlInterface, HessianInterface):
    """The Hessian of the negative log-likelihood by ASDL's double backward.

    `full` is matrix-free; `diag` computes each layer's block, P backward passes in all, and refuses blocks past the
    memory budget. `kron` is refused: a Hessian has no such factors.

    Args:
        model, likelihood, last_layer, dict_key_x, dict_key_y, generator, subnetwork_indices: As for `AsdlEF`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
        *,
        subnetwork_indices: Tensor | None = None,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator)

    def _full(self, objective: Objective) -> LinearOperator:
        return AsdlHessianProduct.of(objective, native=Hessian)

    def _diag(self, objective: Objective) -> LinearOperator:
        watch = Hessian.of(objective)
        return deferred(
            objective, watch, lambda: Diagonal(hessian_diagonal(objective)), Diagonal, library=provenance(),
            is_psd=False,
        )  # fmt: skip
