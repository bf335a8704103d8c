"""Sums of squares of per-example gradients, over examples whose columns come one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.nets.factors import Factors, Outer
from curvops.nets.pooled import Pooled


class SquareSum:
    """Σ_kn G_kn², entry by entry, over examples that come with their columns in several goes.

    Args:
        size: p.
        like: A tensor of the dtype and on the device of the sum.

    Without weight sharing only the squares of g are summed until `flush`, which ends the examples: then one product
    with the squares of a serves all columns. With it columns are held, as far as they may be, for a product to serve
    several.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.value: Tensor = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._part: Outer | None = None
        self._g_squared: Tensor | None = None
        self._held: list[Outer] | list[Pooled] = []

    def add(self, factors: Factors, *, hold: int = 1) -> None:
        """Some columns of the present examples.

        Args:
            hold: Columns of which factors may be held here.
        """
        part = factors.parts[0]
        if len(factors.parts) > 1 or not isinstance(part, Outer | Pooled):
            self.value += factors.squares()
        elif part.positions > 1:
            self._held.append(part)  # type: ignore[arg-type]  # all of the examples' are of one kind
            columns = sum(len(one.g) for one in self._held)
            if columns * part.share >= hold:
                self._multiply()
        else:
            assert isinstance(part, Outer)
            g_squared = part.g[:, :, 0].square().sum(0)
            self._part = part
            self._g_squared = g_squared if self._g_squared is None else self._g_squared.add_(g_squared)

    def flush(self) -> None:
        """The present examples have had all their columns."""
        self._multiply()
        if self._part is not None and self._g_squared is not None:
            self.value += self._part.squared_product(self._g_squared)
        self._part = self._g_squared = None

    def _multiply(self) -> None:
        if self._held:
            first, *others = self._held
            self.value += first.squares(*others)  # type: ignore[arg-type]
            self._held = []
