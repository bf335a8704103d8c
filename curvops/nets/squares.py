"""Sums of squares of per-example gradients, over examples whose columns come one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.nets.factors import Factors, Outer, Shift, operand_key, outputs_of
from curvops.nets.pooled import Pooled

_CALL = 2**13
"""Entries from which on the squares of each column are added in a call of its own: they stay in the caches."""


class SquareSums:
    """Σ_kn G_kn² of each parameter, entry by entry, over examples that come with their columns in several goes.

    Args:
        sizes: p of each.
        like: A tensor of the dtype and on the device of the sums.

    Without weight sharing only the squares of g are summed until `flush`, which ends the examples: then one product
    with the squares of a serves all columns; and those who have the same g, as a layer's weight and bias, share its
    squares. With weight sharing columns are held, as far as they may be, for a product to serve several.
    """

    def __init__(self, sizes: Sequence[int], like: Tensor) -> None:
        self._sizes, self._like = sizes, like
        self._sums: dict[int, Tensor] = {}
        # Of the present examples. Without weight sharing, Σ_k g_k² (B, G, O) by the parameters that share g, and each
        # parameter's latest part, for its a; with it, each parameter's parts that wait.
        self._squares: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[int, Outer | Shift] = {}
        self._held: dict[int, list[Outer] | list[Pooled]] = {}

    @property
    def values(self) -> list[Float[Tensor, " p"]]:
        """The sums so far."""
        dtype, device = self._like.dtype, self._like.device
        return [
            self._sums[i] if i in self._sums else torch.zeros(size, dtype=dtype, device=device)
            for i, size in enumerate(self._sizes)
        ]

    def add(self, factors: Sequence[Factors | None], *, hold: int = 1) -> None:
        """Some columns of the present examples, of each parameter.

        Args:
            hold: Columns of which factors may be held here.
        """
        sharing: dict[object, tuple[Tensor, list[int]]] = {}
        for i, one in enumerate(factors):
            if one is None:
                continue
            part = one.parts[0]
            if len(one.parts) == 1 and isinstance(part, Outer | Shift) and part.positions == 1:
                self._parts[i] = part
                g = outputs_of(part)
                sharing.setdefault(operand_key(g), (g[:, :, 0], []))[1].append(i)
            elif len(one.parts) == 1 and isinstance(part, Outer | Pooled):
                self._hold(i, part, hold)
            else:
                self.put(i, one.squares())
        for g, mine in sharing.values():
            self._squares[tuple(mine)] = with_squares(self._squares.get(tuple(mine)), g)

    def put(self, i: int, squares: Float[Tensor, " p"]) -> None:
        """What was squared and summed elsewhere, of parameter i; it is nobody else's."""
        self._sums[i] = self._sums[i].add_(squares) if i in self._sums else squares

    def flush(self) -> None:
        """The present examples have had all their columns."""
        for mine, g_squared in self._squares.items():
            for i in mine:
                self.put(i, self._parts[i].squared_product(g_squared))
        for i in list(self._held):
            self._multiply(i)
        self._squares, self._parts = {}, {}

    def _hold(self, i: int, part: Outer | Pooled, hold: int) -> None:
        held = self._held.setdefault(i, [])
        held.append(part)  # type: ignore[arg-type]  # all of the examples' are of one kind
        if sum(len(one.g) for one in held) * part.share >= hold:
            self._multiply(i)

    def _multiply(self, i: int) -> None:
        first, *others = self._held.pop(i)
        self.put(i, first.squares(*others))  # type: ignore[arg-type]


def with_squares(total: Float[Tensor, "*b"] | None, columns: Float[Tensor, "K *b"]) -> Float[Tensor, "*b"]:
    """`total + Σ_k columns_k²`, in place where there is a total."""
    interleaved = columns.stride(0) == 1 and columns.stride(1) > 0  # columns last in memory, as a likelihood makes them
    if columns.device.type != "cpu" or columns[0].numel() < _CALL or interleaved:
        squares = columns.square().sum(0)
        return squares if total is None else total.add_(squares)
    for column in columns:
        total = column.square() if total is None else total.addcmul_(column, column)
    assert total is not None
    return total
