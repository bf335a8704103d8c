"""What KFAC keeps of one parameter: sums over the data that add up over batches, and the block made of them.

For a weight W (O x I) with per-example gradients G = Σ_t g_t a_tᵀ:

    expand    A = Σ_nt a aᵀ / (terms),     B = Σ_k Σ_nt g gᵀ              (Martens & Grosse 2015, Grosse & Martens 2016)
    reduce    A = Σ_n ā āᵀ / (examples),   B = Σ_k Σ_n (Σ_t g)(Σ_t g)ᵀ     (Eschenhagen et al. 2023), ā the mean over t

and the block is B ⊗ A, of the scale of a sum over the data. Positions whose targets are ignored are no terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvops.curvature.matrixfree.cotangents import FisherKind
from curvops.curvature.structured.secondmoment import SecondMoment, Thin, added, matrix_of
from curvops.errors import ShapeError
from curvops.nets.factorblocks import block
from curvops.nets.factors import Factors, Lookup, Outer, Part, Shift
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal
from curvops.operators.kronecker import Kronecker
from curvops.operators.permuted import Permuted

Approx = Literal["expand", "reduce"]
Fallback = Literal["diag", "full", "raise"]


@dataclass
class Pair:
    """The two factors of one kind of use of a parameter.

    Attributes:
        flipped: The parameter is (inputs, outputs), and the block A ⊗ B.
        A: Σ a aᵀ `(G, I, I)`, or its vectors; its diagonal `(I,)` for lookups, None for biases.
        B: Σ g gᵀ `(G, O, O)`, or its vectors.
        terms: Of A's sum; None where A is an average already.
    """

    flipped: bool
    A: SecondMoment | None
    B: SecondMoment
    terms: float | None

    def plus(self, other: Pair) -> Pair:
        """Sums of the sums."""
        same = self.flipped == other.flipped and self.B.shape == other.B.shape
        if not same or (self.terms is None) != (other.terms is None):
            raise ShapeError("merge: the factors of the two are of different kinds; build both with the same options.")
        A = None if self.A is None or other.A is None else added(self.A, other.A)
        terms = None if self.terms is None or other.terms is None else self.terms + other.terms
        return Pair(self.flipped, A, added(self.B, other.B), terms)

    def average(self) -> SecondMoment | None:
        """A, averaged."""
        if self.A is None or self.terms is None:
            return self.A
        return self.A / max(self.terms, 1.0)

    def sides(self) -> tuple[SecondMoment, SecondMoment | None]:
        """The factors on the parameter's first and second axis (None: there is no second)."""
        A = self.average()
        return (A, self.B) if self.flipped and A is not None else (self.B, A)


Order = Callable[[bool], Tensor | None]
"""Whether the parameter is (inputs, outputs) → where each of its entries lies in the block; None for the same place."""


class Statistics:
    """The sums of one parameter, or of a weight and its bias: factor pairs by kind of use, or an exact block.

    Args:
        size: Entries.
        like: A tensor of the dtype and on the device of the block.
        approx: What a term of the factors is.
        order: Where the entries of the block lie.
        fisher: Of which Fisher matrix they are.
    """

    def __init__(
        self,
        size: int,
        like: Tensor,
        approx: Approx = "expand",
        order: Order = lambda flipped: None,
        fisher: FisherKind = "exact",
    ) -> None:
        self.size, self.order = size, order
        self.like = like.detach()
        self.approx: Approx = approx
        self.fisher: FisherKind = fisher
        self.pairs: dict[object, Pair] = {}
        self.exact: Tensor | None = None

    def add_exact(self, factors: Factors, fallback: Fallback) -> None:
        """Some columns of some examples, to the exact block: its diagonal, or for "full" all of it."""
        new = block(factors, factors) if fallback == "full" else factors.squares()
        self.exact = new if self.exact is None else self.exact + new

    def plus(self, other: Statistics) -> Statistics:
        """Sums of the sums: the statistics of both data sets."""
        if self.size != other.size or self.approx != other.approx or self.fisher != other.fisher:
            raise ShapeError(
                f'merge: {self.size} entries with approx="{self.approx}", fisher="{self.fisher}" in one of the two, '
                f'{other.size} with approx="{other.approx}", fisher="{other.fisher}" in the other; build both with the '
                "same options."
            )
        if self.exact is not None and other.exact is not None and self.exact.shape != other.exact.shape:
            raise ShapeError('merge: fallback="diag" in one of the two and "full" in the other; build both with one.')
        if (self.exact is not None and other.pairs) or (other.exact is not None and self.pairs):
            raise ShapeError(
                "merge: a parameter has factors in one of the two, and an exact block in the other, where the forward "
                "uses it in another way; build one KFAC over all the data."
            )
        keys = {**self.pairs, **other.pairs}
        pairs = {
            key: self.pairs[key].plus(other.pairs[key])
            if key in self.pairs and key in other.pairs
            else (self.pairs.get(key) or other.pairs[key])
            for key in keys
        }
        if self.exact is None or other.exact is None:
            exact = self.exact if other.exact is None else other.exact
        else:
            exact = self.exact + other.exact
        return self._with(pairs, exact)

    def averaged(self, share: float, scale: float = 1.0) -> Statistics:
        """With every A an average times `share`, so that the factors of mini-batches add up (design §4 on N).

        The curvature itself is multiplied by `scale`, in B.
        """
        pairs = {}
        for key, pair in self.pairs.items():
            A = pair.average()
            pairs[key] = Pair(pair.flipped, None if A is None else A * share, pair.B * scale, None)
        return self._with(pairs, None if self.exact is None else self.exact * scale)

    def operator(self) -> LinearOperator:
        """The block. A parameter that the outputs do not depend on has a zero diagonal."""
        if self.exact is not None:
            return Diagonal(self.exact) if self.exact.dim() == 1 else Dense(self.exact, is_psd=True)
        if not self.pairs:
            return Diagonal(self.like.new_zeros(self.size))
        return self.placed(kronecker(*combined(list(self.pairs.values()))))

    def placed(self, natural: LinearOperator) -> LinearOperator:
        """A block in the order of the factors, in the order of the parameters."""
        order = self.order(any(pair.flipped for pair in self.pairs.values()))
        return natural if order is None else Permuted(natural, order)

    def _with(self, pairs: dict[object, Pair], exact: Tensor | None) -> Statistics:
        result = Statistics(self.size, self.like, self.approx, self.order, self.fisher)
        result.pairs, result.exact = pairs, exact
        return result


def has_pairs(factors: Factors) -> bool:
    """Whether every use of a parameter has factors, of one kind or of kinds that fit together."""
    if any(not isinstance(part, Outer | Lookup | Shift) for part in factors.parts):
        return False
    if len(factors.parts) == 1:
        return True
    # Several kinds meet in a tied weight; they must be matrices of the same two axes.
    return None not in (axes := {_axes(part) for part in factors.parts}) and len(axes) == 1


def _axes(part: Part) -> tuple[int, int] | None:
    """Rows and columns of the matrix that one kind of use takes a parameter for; None where it is another thing."""
    if isinstance(part, Lookup):
        return part.size, part.g.shape[-1]
    if not isinstance(part, Outer) or part.g.shape[3] > 1:
        return None
    outputs, inputs = part.g.shape[-1], part.inputs.shape[-1]
    return (inputs, outputs) if part.flipped else (outputs, inputs)


def combined(pairs: Sequence[Pair]) -> tuple[SecondMoment, SecondMoment | None]:
    """The factors on the parameter's two axes.

    Kinds of use that put inputs and outputs on opposite axes (an embedding tied to a decoder) make a sum of Kronecker
    products; the one nearest to it in the Frobenius norm (Van Loan & Pitsianis 1993) has factors in the span of theirs,
    with positive weights since all factors are positive semidefinite.
    """
    sides = [pair.sides() for pair in pairs]
    if len(sides) == 1:
        return sides[0]
    left = torch.stack([_square(one) for one, _ in sides]).flatten(1)
    right = torch.stack([_square(two) for _, two in sides if two is not None]).flatten(1)
    # Σ_i vec(L_i) vec(R_i)ᵀ has the singular vectors of its 2 x 2 core between orthonormal bases of the spans.
    Ql, Cl = torch.linalg.qr(left.T)
    Qr, Cr = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(Cl @ Cr.T)
    one, two = Ql @ U[:, 0], Qr @ Vh[0]
    n, m = (round(len(v) ** 0.5) for v in (one, two))
    one, two = one.reshape(1, n, n), two.reshape(1, m, m)
    sign = torch.sign(one.diagonal(dim1=1, dim2=2).sum())
    return one * sign * S[0], two * sign


def kronecker(first: SecondMoment, second: SecondMoment | None) -> LinearOperator:
    """The block of the two axes' factors, one Kronecker product per group."""
    groups = [_factor(first, i) for i in range(_groups(first))]
    if second is None:
        return groups[0]
    products = [Kronecker(one, _factor(second, i)) for i, one in enumerate(groups)]
    return products[0] if len(products) == 1 else BlockDiagonal(*products)


def _groups(factor: SecondMoment) -> int:
    return 1 if len(factor.shape) == 1 else factor.shape[0]


def _factor(factor: SecondMoment, group: int) -> LinearOperator:
    if isinstance(factor, Thin):
        return factor.operator()
    return Diagonal(factor) if factor.dim() == 1 else Dense(factor[group], is_psd=True)


def _square(factor: SecondMoment | None) -> Tensor:
    assert factor is not None
    S = matrix_of(factor)
    return torch.diag(S) if S.dim() == 1 else S[0]
