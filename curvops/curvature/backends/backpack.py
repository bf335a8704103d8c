"""The interface by BackPACK: per-example gradients, diagonals and Kronecker factors from its passes over the layers.

What BackPACK gets wrong, and what happens instead, is told where it is handled: `backpack_adapter`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.curvature.backends.backpack_adapter import BackPackProduct, LayerRun, fill_rows, provenance
from curvops.curvature.backends.foreign import deferred, require_entries
from curvops.curvature.backends.layers import blocks_label
from curvops.curvature.ef import EFInterface
from curvops.curvature.ggn import GGNInterface
from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.fisher import EmpiricalFisher, MCFisher
from curvops.curvature.matrixfree.ggn import GGN
from curvops.curvature.objective import Objective
from curvops.curvature.structured.statistics import Approx
from curvops.nets.forward import Inputs, Network
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal
from curvops.operators.kronecker import Kronecker

__all__ = ["BackPackEF", "BackPackGGN", "BackPackInterface"]


class BackPackInterface(CurvatureInterface):
    """Curvatures by BackPACK (Dangel, Kunstner & Hennig 2020; <https://backpack.pt>); see the class of each.

    `jacobians`, `last_layer_jacobians` and `gradients` are BackPACK's per-example gradients (`BatchGrad`), compared
    with autograd once a call; with `enable_backprop=True`, and in `functorch_jacobians`, they are native. `full`
    returns an operator whose products are BackPACK's `hessianfree` ones; the first is compared with double backward
    (about three gradients), and where they differ curvops' own answer and `repr` says why.

    BackPACK works on a copy of the model that shares its parameters. It knows Linear, Conv, ConvTranspose, BatchNorm
    and Embedding layers; for the diagonal of the GGN and for `kron`, all that lies between them and the outputs has to
    be modules that it knows as well. What it would get wrong is refused by name, with the native class that does it.
    """

    def _example_rows(
        self,
        network: Network,
        selection: ParameterSelection,
        x: Inputs,
        f: Tensor,
        cotangents: Tensor | None = None,
    ) -> Tensor:
        with torch.inference_mode(False):
            result, _ = self._room_for_rows(selection, f, cotangents)
        return fill_rows(network.module, selection, x, f, cotangents, result)

    def __repr__(self) -> str:
        return f"{super().__repr__()} [by {provenance()}]"


class BackPackGGN(BackPackInterface, GGNInterface):
    """The GGN, or with `stochastic=True` the Monte-Carlo Fisher, by BackPACK; arguments as for `GGNInterface`.

    `diag` is `DiagGGNExact`, and `kron` KFLR, of the root of Λ; with `stochastic=True` both propagate the draws of
    `GGNInterface` instead, since BackPACK's own come from the global generator.

    Example:
        >>> import torch
        >>> from curvops.curvature import BackPackGGN
        >>> backend = BackPackGGN(torch.nn.Linear(3, 2), "classification")
        >>> loss, D = backend.diag(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> D
        Diagonal(8) [not computed; by backpack 1.7.1]
    """

    def _full(self, objective: Objective) -> LinearOperator:
        if not self.stochastic:
            return BackPackProduct.of(objective, native=GGN)
        own = {"num_samples": self.num_samples, "seed": self._seed()}
        return BackPackProduct.of(objective, native=MCFisher, own=own)

    def _diag(self, objective: Objective) -> LinearOperator:
        self._require_root(self._fisher)
        return _diagonal(objective, self._cotangents(), 1.0)

    def _kron(self, objective: Objective, cotangents: Cotangents, approx: Approx, N: int) -> LinearOperator:
        run = LayerRun(objective, cotangents, kron=True)
        selection = objective.selection

        def blocks() -> LinearOperator:
            found = []
            share = (objective.num_data or 0) / N
            for owner, shape, (B, A) in zip(run.owners, selection.shapes, run.factors(approx), strict=True):
                left, right = shape[0], shape[1:].numel()
                B = torch.zeros(left, left, dtype=selection.dtype, device=selection.device) if B is None else B
                require_entries(B.numel(), left**2, f"the factor of {owner.name!r}", provenance(), run.way_out)
                if owner.role == "bias":
                    found.append(Dense(B, is_psd=True))
                    continue
                A = B.new_zeros(right, right) if A is None else A
                require_entries(A.numel(), right**2, f"the factor of {owner.name!r}", provenance(), run.way_out)
                found.append(Kronecker(Dense(B, is_psd=True), Dense(A * share, is_psd=True)))
            return BlockDiagonal(*found, layout=objective.layout)

        label = blocks_label(run.owners, selection.shapes)
        return deferred(
            objective, cotangents.operator(objective), blocks, BlockDiagonal, library=provenance(), label=label
        )


class BackPackEF(BackPackInterface, EFInterface):
    """The empirical Fisher by BackPACK, in the scale of `EFInterface`: for regression twice `co.EmpiricalFisher`.

    `diag` is `SumGradSquared`. BackPACK has no factors of the empirical Fisher: `kron` is native.
    """

    def _full(self, objective: Objective) -> LinearOperator:
        return (1.0 / self.factor) * BackPackProduct.of(objective, native=EmpiricalFisher)

    def _diag(self, objective: Objective) -> LinearOperator:
        return _diagonal(objective, Cotangents("empirical"), 1.0 / self.factor)


def _diagonal(objective: Objective, cotangents: Cotangents, scale: float) -> LinearOperator:
    run = LayerRun(objective, cotangents)

    def built() -> LinearOperator:
        values = run.diagonal() * scale
        require_entries(values.numel(), objective.selection.size, "the diagonal", provenance(), run.way_out)
        return Diagonal(values)

    return deferred(objective, cotangents.operator(objective), built, Diagonal, library=provenance())
