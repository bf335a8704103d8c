"""EKFAC: KFAC's eigenvectors with the eigenvalues that fit the curvature best (George et al. 2018).

In the basis Q = Q_B ⊗ Q_A the diagonal of the exact block is λ = Σ_kn (Q_Bᵀ G_kn Q_A)²; of all matrices Q diag(·) Qᵀ,
KFAC's own included, Q diag(λ) Qᵀ is the nearest to the block in the Frobenius norm.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.cotangents import Cotangents, FisherKind, Tokens
from curvops.curvature.matrixfree.fisher import Datum
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective, Options
from curvops.curvature.structured.expected import Expected, expected
from curvops.curvature.structured.kfac import FromData, check_choice, deferred, refuse_indices
from curvops.curvature.structured.statistics import Approx, Fallback, Statistics, combined
from curvops.nets.factors import Direct, Factors, Lookup, Outer, Shift, SquareSum
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.deferred import Deferred
from curvops.operators.diagonal import Diagonal, Identity
from curvops.operators.eigen import Eigen
from curvops.operators.kronecker import Kronecker


class EKFAC(BlockDiagonal):
    """Eigenvalue-corrected KFAC, block-diagonal over the parameters in their order; every verb in closed form.

    Args:
        model, likelihood, data, options: As for `GGN`.
        fisher, approx, fallback, num_samples, generator, datum, tokens: As for `KFAC`. `approx` enters the
            eigenvectors alone: the eigenvalues are those of whole per-example gradients.

    Its Frobenius distance to the block-diagonal of the same Fisher is never larger than KFAC's.

    Cost: KFAC, an eigendecomposition of each factor, and a second pass of about the cost of `DiagonalGGN`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        fisher: FisherKind = "exact",
        approx: Approx = "expand",
        fallback: Fallback = "diag",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        datum: Datum = "token",
        tokens: Tokens = "auto",
        **options: Unpack[Options],
    ) -> None:
        cotangents = Cotangents.chosen("EKFAC", fisher, num_samples, generator, datum, tokens)
        self._begin(Objective(model, likelihood, data, **options), cotangents, approx, fallback)

    @classmethod
    def of(
        cls, objective: Objective, cotangents: Cotangents, approx: Approx = "expand", fallback: Fallback = "diag"
    ) -> Self:
        """The EKFAC over an objective that is already there."""
        ekfac = cls.__new__(cls)
        ekfac._begin(objective, cotangents, approx, fallback)
        return ekfac

    def _begin(self, objective: Objective, cotangents: Cotangents, approx: Approx, fallback: Fallback) -> None:
        check_choice("EKFAC", "approx", approx, ("expand", "reduce"))
        check_choice("EKFAC", "fallback", fallback, ("diag", "full", "raise"))
        selection = objective.selection
        refuse_indices("EKFAC", selection)
        objective.needed_likelihood()
        self.source = _Corrected(FromData(objective, cotangents, approx, fallback))
        watch = cotangents.operator(objective)
        blocks: list[Deferred] = []
        for i, name in enumerate(selection.names):
            guess = expected(objective.model, selection, fallback)[i]
            guess = guess if guess.kind is Diagonal else Expected(Eigen, str(selection.sizes[i]))

            def build(i: int = i, name: str = name) -> LinearOperator:
                operator = self.source.operators()[i]
                blocks[i].note = self.source.factors.note(name)
                return operator

            blocks.append(deferred(build, guess, selection, name, watch))
        BlockDiagonal.__init__(self, *blocks, layout=objective.layout)

    def release(self) -> None:
        super().release()
        self.source.forget()


class _Basis:
    """The eigenvectors of the factors on a parameter's two axes, and the eigenvalues summed so far.

    Args:
        first: `(G, n, n)` factor on the first axis of each group, or its diagonal `(n,)`.
        second: `(G, m, m)` factor on the second axis, or None where there is none.
    """

    def __init__(self, first: Tensor, second: Tensor | None) -> None:
        self.one, self.two = _eigenvectors(first), None if second is None else _eigenvectors(second)
        n = len(first) if first.dim() == 1 else first.shape[0] * first.shape[1]
        m = 1 if second is None else second.shape[-1]
        self.squares = SquareSum(n * m, first)
        self._inputs: tuple[Tensor, Tensor] | None = None

    def add(self, factors: Factors) -> None:
        """Squares of the gradients of some examples along some columns, in the basis."""
        if len(factors.parts) == 1:
            self.squares.add(self._rotated(factors))
            return
        whole = factors.per_example()
        n = factors.size // (1 if self.two is None else self.two.shape[-1])
        rows = whole.unflatten(-1, (n, -1))
        rows = rows if self.one is None else self.one[0].T @ rows
        rows = rows if self.two is None else rows @ self.two[0]
        self.squares.value += rows.square().sum((0, 1)).reshape(-1)

    def operator(self) -> LinearOperator:
        """`Q diag(λ) Qᵀ`, one for each group."""
        groups = 1 if self.one is None else self.one.shape[0]
        blocks = []
        for i, values in enumerate(self.squares.value.chunk(groups)):
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
            return Factors(factors.size, [Outer(self._inputs[1], _turned(part.g, Qg), part.flipped)])
        if isinstance(part, Lookup):
            assert self.two is not None
            return Factors(factors.size, [Lookup(part.index, part.g @ self.two[0], part.size)])
        assert isinstance(part, Shift)
        assert self.one is not None
        return Factors(factors.size, [Shift(part.g @ self.one[0])])


class _Corrected:
    """Eigenvectors from a pass of KFAC, eigenvalues from a second one; kept until forgotten."""

    def __init__(self, factors: FromData) -> None:
        self.factors = factors
        self._lock = threading.Lock()
        self._found: list[LinearOperator] | None = None

    def operators(self) -> list[LinearOperator]:
        with self._lock:
            if self._found is None:
                self._found = self._computed()
        return self._found

    def forget(self) -> None:
        self._found = None
        self.factors.forget()

    def _computed(self) -> list[LinearOperator]:
        selection = self.factors.objective.selection
        statistics = self.factors.statistics()
        bases = [_Basis(*combined(list(s.pairs.values()))) if _is_factored(s) else None for s in statistics]
        with torch.no_grad():
            for step in LayerPass(self.factors.objective, self.factors.cotangents):
                for basis, factors in zip(bases, step.factors, strict=True):
                    if basis is not None and factors is not None:
                        basis.add(factors)
                    if basis is not None and step.last:
                        basis.squares.flush()
        self.factors.forget()
        like = selection.tensors[0].detach()
        return [
            s.operator(like) if basis is None else basis.operator() for s, basis in zip(statistics, bases, strict=True)
        ]


def _is_factored(statistics: Statistics) -> bool:
    return statistics.exact is None and bool(statistics.pairs)


def _turned(t: Tensor, Q: Tensor) -> Tensor:
    """Each group's last axis in the basis Q `(G, d, d)`: t ↦ Qᵀ t, t `(…, G, d)`."""
    if Q.shape[0] == 1:
        return t @ Q[0]
    return (t.unsqueeze(-2) @ Q).squeeze(-2)


def _eigenvectors(factor: Tensor) -> Tensor | None:
    """`(G, n, n)`; None for the identity, which diagonalises a diagonal."""
    return None if factor.dim() == 1 else torch.linalg.eigh(factor)[1]
