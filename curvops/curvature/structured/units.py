"""Which parameters share a block: each its own, or a weight together with the bias of its module, as one matrix [W b].

With ã = (a, 1) the gradients of weight and bias are one product, Σ_t g_t ã_tᵀ, of shape (O, I + 1), and B ⊗ Ã with
Ã = Σ ã ãᵀ keeps what ties the two together. A vector holds W row by row and then b, which is another order than that of
[W b] row by row; the block is a Kronecker product between two permutations. With groups there is one such block for
each group, the bias's part in it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from curvops.nets.factors import Factors, Outer, Shift
from curvops.nets.parameters import ParameterSelection, unwrap

WeightAndBias = Literal["separate", "joint"]


class Unit:
    """One parameter, or a weight and the bias that follows it.

    Args:
        positions: In the selection.
        sizes: Entries of each.
    """

    def __init__(self, positions: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.positions, self.sizes, self.size = positions, sizes, sum(sizes)
        self._inputs: tuple[Tensor, Tensor] | None = None

    @property
    def is_joint(self) -> bool:
        """Whether it is two parameters."""
        return len(self.positions) > 1

    def alone(self) -> Unit:
        """The same, which keeps nothing of a batch yet."""
        return Unit(self.positions, self.sizes)

    def apart(self) -> list[Unit]:
        """Each parameter on its own."""
        return [Unit((i,), (p,)) for i, p in zip(self.positions, self.sizes, strict=True)]

    def of(self, factors: list[Factors | None]) -> Factors | None:
        """Per-example gradients of the unit, those of two in the order of [W b] row by row; None where they are zero.

        Raises:
            ApartError: The bias is not used where the weight is, as one more input of it.
        """
        found = [factors[i] for i in self.positions]
        if not self.is_joint:
            return found[0]
        weight, bias = found
        if weight is None and bias is None:
            return None
        if weight is None or bias is None or len(weight.parts) > 1 or len(bias.parts) > 1:
            raise ApartError
        outer, shift = weight.parts[0], bias.parts[0]
        if not isinstance(outer, Outer) or not isinstance(shift, Shift):
            raise ApartError
        if (outer.flipped and outer.g.shape[3] > 1) or not _is_same(outer.g.flatten(3), shift.g):
            raise ApartError
        if self._inputs is None or self._inputs[0] is not outer.a:  # the same for all columns of the examples
            self._inputs = outer.a, torch.cat([outer.a, outer.a.new_ones(*outer.a.shape[:3], 1)], -1)
        return Factors(self.size, [Outer(self._inputs[1], outer.g, outer.flipped)])

    def order(self, flipped: bool) -> Tensor | None:
        """Where each entry of the vector lies in [W b] row by row; None where they lie the same."""
        if not self.is_joint or flipped:  # a flipped weight is (inputs, outputs): the bias is its last row
            return None
        weight, outputs = self.sizes
        place = torch.arange(weight + outputs, device="cpu").reshape(outputs, -1)
        return torch.cat([place[:, :-1].reshape(-1), place[:, -1]])


class ApartError(Exception):
    """Weight and bias make no one matrix; caught where the pass begins again with the two apart."""


def units_of(model: nn.Module, selection: ParameterSelection, weight_and_bias: WeightAndBias) -> list[Unit]:
    """The units of a selection, in its order.

    A weight and a bias belong together where one module owns both under matching names, the second directly behind the
    first. Transposed convolutions do not: their bias is used at other positions than their weight.
    """
    units: list[Unit] = []
    i = 0
    while i < len(selection.names):
        pair = weight_and_bias == "joint" and i + 1 < len(selection.names) and _belong(model, selection, i)
        positions = (i, i + 1) if pair else (i,)
        units.append(Unit(positions, tuple(selection.sizes[j] for j in positions)))
        i += len(positions)
    return units


def _belong(model: nn.Module, selection: ParameterSelection, i: int) -> bool:
    (path, _, weight), (other, _, bias) = (selection.names[j].rpartition(".") for j in (i, i + 1))
    shape, entries = selection.shapes[i], selection.shapes[i + 1]
    if path != other or "weight" not in weight or bias != weight.replace("weight", "bias"):
        return False
    if isinstance(unwrap(model).get_submodule(path), nn.modules.conv._ConvTransposeNd):
        return False
    return len(shape) >= 2 and len(entries) == 1 and entries[0] in (shape[0], *shape[1:2])


def _is_same(g: Tensor, h: Tensor) -> bool:
    if g.shape != h.shape:
        return False
    return (g.data_ptr() == h.data_ptr() and g.stride() == h.stride()) or torch.equal(g, h)
