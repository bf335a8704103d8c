"""Second moments Σ x xᵀ: multiplied out, or of few vectors kept as these.

Of fewer vectors than entries (the inputs of a wide layer over one batch) the d x d matrix says less than the vectors
themselves, and is not formed: it would take longer to make, and several times as long to decompose.

Torch has no symmetric product: on a processor the sums are made in panels of the upper triangle, which saves nearly
half of the work, and mirrored at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.operators.dense import require_finite
from curvops.operators.lowrank import LowRank

FEW = 0.75
"""Vectors for each entry up to which they are kept: a decomposition takes little more than half as long, a product with
the matrix half as long again."""

PANEL = 96
"""Rows of a panel of a symmetric product: fewer save more arithmetic, and take more calls."""

CROWDED = 1024
"""Where the length of a row in bytes is near a multiple of this, entries of many rows share few places in the caches:
what is read across such rows is copied first."""

NEAR = 32
"""Bytes."""


@dataclass(frozen=True)
class Thin:
    """Σ v vᵀ of few vectors, kept as these: V `(n, d)`."""

    V: Float[Tensor, "n d"]

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, `(1, d, d)`."""
        return torch.Size((1, *2 * self.V.shape[1:]))

    def matrix(self) -> Float[Tensor, "1 d d"]:
        """Multiplied out. O(n·d²)."""
        return (self.V.T @ self.V).unsqueeze(0)

    def operator(self) -> LowRank:
        """The matrix, with all its verbs.

        Raises:
            DataError: Some of its entries are too large for the dtype.
        """
        require_finite(self.V.square().sum(0), f"the diagonal of Σ v vᵀ over {tuple(self.V.shape)} vectors")
        return LowRank(self.V.T)

    def __mul__(self, factor: float) -> Thin:
        return Thin(self.V * math.sqrt(factor))

    def __truediv__(self, divisor: float) -> Thin:
        return Thin(self.V / math.sqrt(divisor))


SecondMoment = Tensor | Thin
"""`(G, d, d)` for each of G groups, or the diagonal `(d,)` of one; or of a single group, the vectors."""


def matrix_of(moment: SecondMoment) -> Tensor:
    """As a tensor."""
    return moment.matrix() if isinstance(moment, Thin) else moment


def added(one: SecondMoment, two: SecondMoment) -> SecondMoment:
    """Their sum; the vectors of both where these are still few."""
    if isinstance(one, Thin) and isinstance(two, Thin) and _are_few(len(one.V) + len(two.V), one.V.shape[1]):
        return Thin(torch.cat([one.V, two.V]))
    return matrix_of(one) + matrix_of(two)


def _are_few(n: int, d: int) -> bool:
    return n <= FEW * d


def _joined(few: list[Tensor]) -> Tensor:
    return few[0] if len(few) == 1 else torch.cat(few)


class SymmetricSum:
    """Σ x xᵀ over vectors that come in several goes."""

    def __init__(self) -> None:
        # The vectors as long as they are few, on storage of their own; then the sum.
        self._few: list[Tensor] = []
        self._total: Tensor | None = None
        # The upper triangle of a large one in panels of rows, each turned: (d − start, rows).
        self._panels: list[tuple[int, Tensor]] = []

    def add(self, V: Float[Tensor, "n d"]) -> None:
        """n vectors of one group, in any layout. About n·d² operations, on a processor half of that for many."""
        if not self._keeps(V):
            self._multiply(V)

    def add_stacked(self, X: Float[Tensor, "m d n"]) -> None:
        """m stacks of n vectors of one group, stack by stack: what is positions last in memory is not copied."""
        m, d, n = X.shape
        if X.device.type != "cpu" or _are_few(m * n, d):  # a product per stack costs more than a copy
            self.add(X.mT.reshape(m * n, d))
            return
        total, kept = self._prepared(X, 1, d)
        if not self._panels:
            total[0].addbmm_(X, X.mT, beta=kept)
        for start, panel in self._panels:
            panel.addbmm_(X[:, start:], X[:, start : start + PANEL].mT, beta=kept)

    def add_grouped(self, X: Float[Tensor, "G d n"]) -> None:
        """n vectors of each group, in any layout. G·n·d² operations."""
        total, kept = self._prepared(X, *X.shape[:2])
        total.baddbmm_(X, X.mT, beta=kept)

    def add_sum(self, S: Float[Tensor, "G d d"]) -> None:
        """What was summed elsewhere."""
        total, kept = self._prepared(S, *S.shape[:2])
        total.copy_(S) if kept == 0 else total.add_(S)

    def value(self) -> SecondMoment:
        """The sum so far, in place: further vectors go on being added to it."""
        if self._total is None:
            return Thin(_joined(self._few))
        d = self._total.shape[2]
        crowded = (d * self._total.element_size() + NEAR) % CROWDED <= 2 * NEAR
        for start, panel in self._panels[:-1]:
            stop = start + PANEL
            above = panel[PANEL:]
            below = self._total.as_strided(above.shape, (d, 1), stop * d + start)
            below.copy_(above.T.contiguous().T if crowded else above)
        return self._total

    def _keeps(self, V: Tensor) -> bool:
        """Keep the vectors if they are few, with those of before."""
        if self._total is not None or not _are_few(sum(map(len, self._few), len(V)), V.shape[1]):
            return False
        self._few.append(V.clone(memory_format=torch.contiguous_format))
        return True

    def _multiply(self, V: Tensor) -> None:
        total, kept = self._prepared(V, 1, V.shape[1])
        turned = V.T
        if not self._panels:
            total[0].addmm_(turned, V, beta=kept)
            return
        # All views first: each product drives what Python needs out of the nearest caches.
        products = [(panel, turned[start:], V[:, start : start + PANEL]) for start, panel in self._panels]
        for panel, left, right in products:
            panel.addmm_(left, right, beta=kept)

    def _prepared(self, X: Tensor, G: int, d: int) -> tuple[Tensor, int]:
        """Where to sum, and what to multiply the sum so far with: 0 as long as there is none."""
        if self._total is not None:
            return self._total, 1
        self._total = X.new_empty(G, d, d)
        # Halves of a small one would save nothing, and on an accelerator calls weigh more than arithmetic.
        if G == 1 and d >= 2 * PANEL and X.device.type == "cpu":
            self._panels = [
                (start, self._total.as_strided((d - start, min(PANEL, d - start)), (1, d), start * (d + 1)))
                for start in range(0, d, PANEL)
            ]
        if not self._few:
            return self._total, 0
        few, self._few = _joined(self._few), []
        self._total.zero_()
        self._multiply(few)
        return self._total, 1
