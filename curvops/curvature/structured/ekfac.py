"""EKFAC: KFAC's eigenvectors with the eigenvalues that fit the curvature best (George et al. 2018).

In the basis Q = Q_B ⊗ Q_A the diagonal of the exact block is λ = Σ_kn (Q_Bᵀ G_kn Q_A)²; of all matrices Q diag(·) Qᵀ,
KFAC's own included, Q diag(λ) Qᵀ is the nearest to the block in the Frobenius norm.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.structured.expected import Expected
from curvops.curvature.structured.factored import Factored, Source, Sums
from curvops.curvature.structured.secondmoment import SecondMoment, Thin, matrix_of
from curvops.curvature.structured.statistics import Statistics, combined
from curvops.nets.factors import Direct, Factors, Lookup, Outer, Shift
from curvops.nets.squares import SquareSums
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.diagonal import Diagonal, Identity
from curvops.operators.eigen import Eigen
from curvops.operators.kronecker import Kronecker
from curvops.operators.permuted import Permuted


class EKFAC(Factored):
    """Eigenvalue-corrected KFAC, block-diagonal over the parameters in their order; every verb in closed form.

    Args:
        model, likelihood, data, options: As for `GGN`; `params` by flat indices is refused.
        fisher, approx, fallback, weight_and_bias, num_samples, generator, datum, tokens: As for `Factored`. `approx`
            enters the eigenvectors alone: the eigenvalues are those of whole per-example gradients.

    Of a factor that is a sum over few vectors (see `KFAC`) the basis spans these alone, with approx="expand": all
    gradients lie there. The Frobenius distance to the block-diagonal of the same Fisher is never larger than KFAC's.

    Cost: KFAC, an eigendecomposition of each factor (of n vectors of d entries O(d·n²)), and a second pass of about the
    cost of `DiagonalGGN`.
    """

    def _from(self, sums: Sums) -> Source:
        return _Corrected(sums)

    def _guess(self, guess: Expected) -> Expected:
        if guess.kind is Diagonal:
            return guess
        if guess.kind is Permuted:
            return Expected(Permuted, f"Eigen({guess.size})", guess.size)
        return Expected(Eigen, guess.size, guess.size)


class _Basis:
    """The eigenvectors of the factors on a parameter's two axes, and the eigenvalues summed so far.

    Args:
        first: `(G, n, n)` factor on the first axis of each group, its diagonal `(n,)`, or its vectors.
        second: `(G, m, m)` factor on the second axis, or its vectors; None where there is none.
        like: A tensor of the dtype and on the device of the sums.
    """

    def __init__(self, first: SecondMoment, second: SecondMoment | None, like: Tensor) -> None:
        self.one, self.two = _eigenvectors(first), None if second is None else _eigenvectors(second)
        if self.one is None:
            assert isinstance(first, Tensor)
            rows = len(first)
        else:
            rows = self.one.shape[0] * self.one.shape[2]
        self._entries = rows * (1 if self.two is None else self.two.shape[2])
        self.squares = SquareSums([self._entries], like)
        self._inputs: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, statistics: Statistics) -> _Basis | None:
        """Of a unit's factors; None where it has none."""
        if statistics.exact is not None or not statistics.pairs:
            return None
        sides = combined(list(statistics.pairs.values()))
        if statistics.approx == "reduce":  # gradients have parts outside the range of averages
            sides = matrix_of(sides[0]), None if sides[1] is None else matrix_of(sides[1])
        return cls(*sides, statistics.like)

    def add(self, factors: Factors) -> None:
        """Squares of the gradients of some examples along some columns, in the basis."""
        if len(factors.parts) == 1:
            self.squares.add([self._rotated(factors)])
            return
        whole = factors.per_example()
        n = factors.size // (1 if self.two is None else self.two.shape[1])
        rows = whole.unflatten(-1, (n, -1))
        rows = rows if self.one is None else self.one[0].T @ rows
        rows = rows if self.two is None else rows @ self.two[0]
        self.squares.put(0, rows.square().sum((0, 1)).reshape(-1))

    def operator(self) -> LinearOperator:
        """`Q diag(λ) Qᵀ`, one for each group."""
        groups = 1 if self.one is None else self.one.shape[0]
        blocks = []
        for i, values in enumerate(self.squares.values[0].chunk(groups)):
            if self.two is None:
                assert self.one is not None
                blocks.append(Eigen(self.one[i], values))
                continue
            if self.one is None:
                left: LinearOperator | Tensor = Identity(len(values) // self.two.shape[-1], values.dtype, values.device)
            else:
                left = self.one[i]
            blocks.append(Eigen(Kronecker(left, self.two[i]), values))
        return blocks[0] if groups == 1 else BlockDiagonal(*blocks)

    def _rotated(self, factors: Factors) -> Factors:
        part = factors.parts[0]
        if isinstance(part, Direct):
            return factors
        if isinstance(part, Outer):
            assert self.one is not None
            assert self.two is not None
            Qa, Qg = (self.one, self.two) if part.flipped else (self.two, self.one)
            if self._inputs is None or self._inputs[0] is not part.a:  # the same for all columns of the examples
                self._inputs = part.a, _turned(part.a, Qa)
            return Factors(self._entries, [Outer(self._inputs[1], _turned(part.g, Qg), part.flipped)])
        if isinstance(part, Lookup):
            assert self.two is not None
            return Factors(self._entries, [Lookup(part.index, part.g @ self.two[0], part.size)])
        assert isinstance(part, Shift)
        assert self.one is not None
        return Factors(self._entries, [Shift(part.g @ self.one[0])])


class _Corrected:
    """Eigenvectors from a pass of KFAC, eigenvalues from a second one; kept until forgotten."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._lock = threading.Lock()
        self._found: list[list[LinearOperator]] | None = None

    def operators(self, number: int) -> list[LinearOperator]:
        with self._lock:
            if self._found is None:
                self._found = self._computed()
        return self._found[number]

    def forget(self) -> None:
        self._found = None
        self.sums.forget()

    def note(self, number: int) -> str | None:
        return self.sums.note(number)

    def _computed(self) -> list[list[LinearOperator]]:
        statistics = self.sums.statistics()
        parts = self.sums.parts()
        bases = [[_Basis.of(one) for one in group] for group in statistics]
        objective, cotangents = self.sums.objective, self.sums.cotangents
        with torch.no_grad():
            for step in LayerPass(objective, cotangents, report_unused=False, narrow=True):
                for units, group in zip(parts, bases, strict=True):
                    for unit, basis in zip(units, group, strict=True):
                        factors = None if basis is None else unit.of(step.factors)
                        if basis is not None and factors is not None:
                            basis.add(factors)
                        if basis is not None and step.last:
                            basis.squares.flush()
        self.sums.forget()
        return [
            [s.operator() if b is None else s.placed(b.operator()) for s, b in zip(group, found, strict=True)]
            for group, found in zip(statistics, bases, strict=True)
        ]


def _turned(t: Tensor, Q: Tensor) -> Tensor:
    """Each group's last axis in the basis Q `(G, d, r)`: t ↦ Qᵀ t, t `(…, G, d)`."""
    if Q.shape[0] == 1 and t.stride(-1) > 1 and t.stride(-3) == 1:  # positions last in memory
        turned = Q[0].T.expand(*t.shape[:-3], -1, -1) @ t.squeeze(-2).transpose(-1, -2)
        return turned.transpose(-1, -2).unsqueeze(-2)
    if Q.shape[0] == 1:
        return t @ Q[0]
    return (t.unsqueeze(-2) @ Q).squeeze(-2)


def _eigenvectors(factor: SecondMoment) -> Tensor | None:
    """`(G, n, r)`, of vectors those of their span; None for the identity, which diagonalises a diagonal."""
    if isinstance(factor, Thin):
        Q, R = torch.linalg.qr(factor.operator().U)
        return (Q @ torch.linalg.eigh(R @ R.T)[1]).unsqueeze(0)
    return None if factor.dim() == 1 else torch.linalg.eigh(factor)[1]
