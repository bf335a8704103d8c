"""The second moments that KFAC's factors are, summed over a pass, each once and in place.

What shares an operand shares its moment: a weight and its bias the output derivatives, projections of one tensor their
inputs.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvops.curvature.structured.secondmoment import SecondMoment, SymmetricSum, added
from curvops.curvature.structured.statistics import Approx, Pair
from curvops.nets.factors import Factors, Lookup, Made, Outer, Shift, operand_key, outputs_of

STACKED = 64
"""Outputs from which a product per stack is fast."""

_Use = tuple[int, object]
"""Whose use of a parameter it is, and its kind."""


class Moments:
    """The factor pairs of one pass.

    Args:
        approx: As for `KFAC`.
    """

    def __init__(self, approx: Approx) -> None:
        self.approx: Approx = approx
        self._flipped: dict[_Use, bool] = {}
        self._terms: dict[_Use, float] = {}
        self._counts: dict[_Use, Tensor] = {}
        # By all the uses that share an operand in a step; in the next one others may.
        self._inputs: dict[tuple[_Use, ...], SymmetricSum] = {}
        self._outputs: dict[tuple[_Use, ...], SymmetricSum] = {}

    def add(
        self,
        used: dict[int, Factors],
        active: Bool[Tensor, "*b"],
        first: bool,
        moment: Float[Tensor, "O O"] | None = None,
    ) -> None:
        """Some columns of some examples.

        Args:
            used: Whose factors → the factors; `has_pairs` of them. It is emptied, so that what nobody else holds is
                freed as it is summed.
            active: `(B,)` or `(B, T)`, what counts.
            first: Whether the examples come for the first time, so that their inputs count.
            moment: What to take for Σ g gᵀ, in either approximation, instead of summing it.
        """
        weights: dict[int, _Weight] = {}
        inputs: dict[object, tuple[Tensor | Made, _Weight, bool, list[_Use]]] = {}
        outputs: dict[object, tuple[Tensor, bool, list[_Use]]] = {}
        for number, factors in used.items():
            for part in factors.parts:
                assert isinstance(part, Outer | Lookup | Shift)
                # Averages over positions would make a lookup dense: its positions stay apart in both approximations.
                together = self.approx == "reduce" and not isinstance(part, Lookup)
                use = (number, _kind(part))
                g = outputs_of(part)
                outputs.setdefault((operand_key(g), together), (g, together, []))[2].append(use)
                if use not in self._flipped:
                    self._flipped[use] = part.flipped if isinstance(part, Outer) else isinstance(part, Lookup)
                    self._terms[use] = 0.0
                if not first:
                    continue
                if part.positions not in weights:
                    weights[part.positions] = _Weight(part, active)
                weight = weights[part.positions]
                self._terms[use] += weight.examples if together else weight.positions
                if isinstance(part, Outer):
                    inputs.setdefault(operand_key(part.inputs), (part.inputs, weight, together, []))[3].append(use)
                if isinstance(part, Lookup):
                    counts = self._counts.setdefault(use, part.g.new_zeros(part.size))
                    counts.index_add_(0, part.index.reshape(-1), weight.each.reshape(-1))
        used.clear()
        for key in list(inputs):
            a, weight, together, uses = inputs.pop(key)
            total = self._inputs.setdefault(tuple(uses), SymmetricSum())
            if isinstance(a, Tensor):
                _add_inputs(total, a, weight, together)
            else:
                _add_inputs(total, a.value(), weight, together)
                a.drop()  # further columns have no use of it
        for key in list(outputs):
            g, together, uses = outputs.pop(key)
            total = self._outputs.setdefault(tuple(uses), SymmetricSum())
            if moment is None:
                _add_outputs(total, g, together)
            else:
                total.add_sum(moment.unsqueeze(0))

    def knows(self, number: int) -> bool:
        """Whether there were factors of it."""
        return any(mine == number for mine, _ in self._flipped)

    def pairs(self) -> dict[int, dict[object, Pair]]:
        """Whose → kind of use → the sums so far."""
        A: dict[_Use, SecondMoment] = dict(self._counts)
        B: dict[_Use, SecondMoment] = {}
        for sums, found in ((self._inputs, A), (self._outputs, B)):
            for uses, total in sums.items():
                value = total.value()
                for use in uses:
                    found[use] = added(found[use], value) if use in found else value
        result: dict[int, dict[object, Pair]] = {}
        for use, flipped in self._flipped.items():
            result.setdefault(use[0], {})[use[1]] = Pair(flipped, A.get(use), B[use], self._terms[use])
        return result


def _kind(part: Outer | Lookup | Shift) -> object:
    """Uses of one kind have factors of one shape, which add up."""
    if isinstance(part, Outer):
        return "outer", part.flipped, part.inputs.shape[2:], part.g.shape[3:]
    return ("lookup",) if isinstance(part, Lookup) else ("shift", part.g.shape[3:])


class _Weight:
    """What counts. Positions in step with those of the targets follow them one by one.

    Attributes:
        is_one: Whether every position does.
        positions: How many count.
        examples: Of how many examples.
    """

    def __init__(self, part: Outer | Lookup | Shift, active: Tensor) -> None:
        B, T = self._shape = part.g.shape[1], part.positions
        active = active.any(1) if active.dim() == 2 and active.shape[1] != T else active
        self._active, self._dtype = active, part.g.dtype
        self.is_one = bool(active.all())
        count = active.numel() if self.is_one else int(active.count_nonzero())
        self.positions = float(count if active.dim() == 2 else count * T)
        self.examples = float(B if self.is_one else count if active.dim() == 1 else active.any(1).sum())

    @functools.cached_property
    def each(self) -> Float[Tensor, "B T"]:
        """1 where a position counts."""
        each = self._active.to(self._dtype)
        return each if each.dim() == 2 else each.unsqueeze(1).expand(self._shape)


def _add_inputs(total: SymmetricSum, a: Tensor, weight: _Weight, together: bool) -> None:
    """a `(B, T, G, I)`: each position a vector, or each example the average over its positions."""
    if together:
        a = torch.einsum("bt,btgi->bgi", weight.each, a) / weight.each.sum(1).clamp(min=1)[:, None, None]
    elif not weight.is_one:
        a = a * weight.each[:, :, None, None]
    _add_vectors(total, a)


def _add_outputs(total: SymmetricSum, g: Tensor, together: bool) -> None:
    """g `(K, B, T, G, O)`: each column and position of an example a vector, or each column the sum over positions."""
    if together:
        g = g.sum(2, keepdim=True)
    K, _, T, G, O = g.shape
    if G == 1 and K > 1 and g.stride(0) == 1 and O >= STACKED:  # columns last in memory, as a likelihood makes them
        total.add_stacked(g[:, :, :, 0].permute(1, 2, 3, 0).flatten(0, 1))
        return
    if G == 1 and O < 2 * STACKED and T >= O and g.stride(2) < g.stride(4):  # positions last, as convolutions have them
        total.add_stacked(g[:, :, :, 0].flatten(0, 1).transpose(1, 2))
        return
    _add_vectors(total, g)


def _add_vectors(total: SymmetricSum, t: Float[Tensor, "*n G d"]) -> None:
    """A vector for each place along the first axes; what has to be copied for that is copied in its own order."""
    if t.shape[-2] == 1 and t.stride(-1) == 1:
        total.add(t.flatten(0, -2))
        return
    X = t.movedim((-2, -1), (0, 1)).flatten(2)
    if len(X) == 1:
        total.add(X[0].T)
    else:
        total.add_grouped(X)
