"""Sums of squares of per-example gradients, over examples whose columns come one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.nets.factors import Factors, Outer, Shift, identity
from curvops.nets.pooled import Pooled

_CALL = 2**13
"""Entries from which on the squares of each column are added in a call of its own: they stay in the caches."""


class SquareSum:
    """Σ_kn G_kn² of one parameter, entry by entry, over examples that come with their columns in several goes.

    Args:
        size: p.
        like: A tensor of the dtype and on the device of the sum.

    Without weight sharing only the squares of g are summed until `flush`, which ends the examples: then one product
    with the squares of a serves all columns. With it columns are held, as far as they may be, for a product to serve
    several.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self._size, self._like = size, like
        self._value: Tensor | None = None
        self._part: Outer | None = None
        self._g_squared: Tensor | None = None
        self._held: list[Outer] | list[Pooled] = []

    @property
    def value(self) -> Float[Tensor, " p"]:
        """The sum so far."""
        if self._value is None:
            self._value = torch.zeros(self._size, dtype=self._like.dtype, device=self._like.device)
        return self._value

    def add(self, factors: Factors, *, hold: int = 1) -> None:
        """Some columns of the present examples.

        Args:
            hold: Columns of which factors may be held here.
        """
        part = factors.parts[0]
        if len(factors.parts) > 1 or not isinstance(part, Outer | Pooled):
            self.add_squares(factors.squares())
        elif part.positions > 1:
            self._held.append(part)  # type: ignore[arg-type]  # all of the examples' are of one kind
            columns = sum(len(one.g) for one in self._held)
            if columns * part.share >= hold:
                self._multiply()
        else:
            assert isinstance(part, Outer)
            self._part = part
            self._g_squared = with_squares(self._g_squared, part.g[:, :, 0])

    def add_squares(self, squares: Float[Tensor, " p"]) -> None:
        """What was squared and summed elsewhere; it is nobody else's."""
        self._value = squares if self._value is None else self._value.add_(squares)

    def flush(self) -> None:
        """The present examples have had all their columns."""
        self._multiply()
        if self._part is not None and self._g_squared is not None:
            self.add_squares(self._part.squared_product(self._g_squared))
        self._part = self._g_squared = None

    def _multiply(self) -> None:
        if self._held:
            first, *others = self._held
            self.add_squares(first.squares(*others))  # type: ignore[arg-type]
            self._held = []


class SquareSums:
    """Those of all parameters. Where several have the same output derivatives and no shared weights, as a layer's
    weight and bias, they are squared once.
    """

    def __init__(self, sizes: Sequence[int], like: Tensor) -> None:
        self._each = [SquareSum(size, like) for size in sizes]
        # Of the present examples: Σ_k g_k² (B, G, O), by the parameters whose g it is; and those parameters' parts.
        self._squares: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[int, Outer | Shift] = {}

    @property
    def values(self) -> list[Float[Tensor, " p"]]:
        """The sums so far, of each parameter."""
        return [total.value for total in self._each]

    def add(self, factors: Sequence[Factors | None], *, hold: int, last: bool) -> None:
        """Some columns of some examples.

        Args:
            hold: Columns of which factors may be held here.
            last: These examples' last ones.
        """
        shared: dict[object, tuple[Tensor, list[int]]] = {}
        for i, one in enumerate(factors):
            if one is None:
                continue
            part = one.single
            if part is None:
                self._each[i].add(one, hold=hold)
                continue
            self._parts[i] = part
            g = part.g if isinstance(part, Outer) else part.g.unsqueeze(3)
            shared.setdefault(identity(g), (g, []))[1].append(i)
        for g, mine in shared.values():
            self._squares[tuple(mine)] = with_squares(self._squares.get(tuple(mine)), g[:, :, 0])
        if last:
            self._flush()

    def _flush(self) -> None:
        for mine, g_squared in self._squares.items():
            for i in mine:
                self._each[i].add_squares(self._parts[i].squared_product(g_squared))
        self._squares, self._parts = {}, {}
        for total in self._each:
            total.flush()


def with_squares(total: Float[Tensor, "*b"] | None, columns: Float[Tensor, "K *b"]) -> Float[Tensor, "*b"]:
    """`total + Σ_k columns_k²`, in place where there is a total."""
    if columns.device.type != "cpu" or columns[0].numel() < _CALL:
        squares = columns.square().sum(0)
        return squares if total is None else total.add_(squares)
    for column in columns:
        total = column.square() if total is None else total.addcmul_(column, column)
    assert total is not None
    return total
