"""KFAC: one Kronecker product per weight, its factors from the layers' inputs and output derivatives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.cotangents import Cotangents, FisherKind, Tokens
from curvops.curvature.matrixfree.fisher import Datum
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective, Options
from curvops.curvature.structured.expected import Expected, expected, module_of
from curvops.curvature.structured.statistics import Approx, Fallback, Moments, Statistics, has_pairs
from curvops.errors import ShapeError, UnsupportedError, UnsupportedLayerError
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import Layout, LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.deferred import Deferred


class Source(Protocol):
    """Where the statistics of each parameter come from."""

    def statistics(self) -> list[Statistics]:
        """One per parameter, computed now if they were not."""
        ...

    def forget(self) -> None:
        """Drop what was computed."""
        ...

    def note(self, name: str) -> str | None:
        """What a reader should know of how a parameter's statistics were computed."""
        ...


class KFAC(BlockDiagonal):
    """Kronecker-factored curvature (Martens & Grosse 2015), block-diagonal over the parameters in their order.

    A weight of a layer that computes `W a` has the block B ⊗ A, its bias B; an embedding (num, dim) A ⊗ B, A diagonal;
    grouped convolutions have one product per group. All uses of a parameter enter its factors. A parameter that is no
    factor of a product (norm layers, scales, whatever no rule covers) has an exact block.

    Args:
        model, likelihood, data, options: As for `GGN`; `params` by flat indices is refused.
        fisher: "exact" (columns of the output Hessian's root), "mc" (sampled targets), "empirical" (observed targets).
        approx: "expand" (positions are further terms) or "reduce" (positions are averaged in A, summed in B).
        fallback: Of parameters without factors: "diag", "full" (dense), or "raise".
        num_samples, generator: Of "mc", as for `MCFisher`.
        datum: Of "empirical", as for `EmpiricalFisher`.
        tokens: For outputs `(B, T, C)`: "separate" columns for each position, T times the work; "sketched", positions
            told apart by random signs (unbiased); "auto": separate up to 256 columns.

    Scale: a sum over the data; B sums, A averages.

    Cost: one forward, C backward passes through the activations (one for "mc" with one sample), O(d²) per position and
    layer of width d. Nothing is computed before it is needed.
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
        cotangents = Cotangents.chosen("KFAC", fisher, num_samples, generator, datum, tokens)
        self._begin(Objective(model, likelihood, data, **options), cotangents, approx, fallback)

    @classmethod
    def of(
        cls, objective: Objective, cotangents: Cotangents, approx: Approx = "expand", fallback: Fallback = "diag"
    ) -> Self:
        """The KFAC over an objective that is already there."""
        kfac = cls.__new__(cls)
        kfac._begin(objective, cotangents, approx, fallback)
        return kfac

    def _begin(self, objective: Objective, cotangents: Cotangents, approx: Approx, fallback: Fallback) -> None:
        check_choice("KFAC", "approx", approx, ("expand", "reduce"))
        check_choice("KFAC", "fallback", fallback, ("diag", "full", "raise"))
        refuse_indices("KFAC", objective.selection)
        objective.needed_likelihood()
        source = FromData(objective, cotangents, approx, fallback)
        guesses = expected(objective.model, objective.selection, fallback)
        self._fill(source, objective.selection, guesses, cotangents.operator(objective), objective.layout)

    def _fill(
        self,
        source: Source,
        selection: ParameterSelection,
        guesses: list[Expected],
        watch: LinearOperator | None,
        layout: Layout | None,
    ) -> None:
        self.source, self._selection, self._guesses = source, selection, guesses
        like = selection.tensors[0].detach()
        blocks: list[Deferred] = []
        for i, name in enumerate(selection.names):

            def build(i: int = i, name: str = name) -> LinearOperator:
                operator = source.statistics()[i].operator(like)
                blocks[i].note = source.note(name)
                return operator

            blocks.append(deferred(build, guesses[i], selection, name, watch))
        BlockDiagonal.__init__(self, *blocks, layout=layout)

    def statistics(self) -> list[Statistics]:
        """The sums that the factors are made of, one per parameter; computed now if they were not."""
        return self.source.statistics()

    def merge(self, other: KFAC) -> KFAC:
        """The KFAC of both data sets: factors accumulated, not operators added.

        B adds, A becomes the average over the terms of both, so that the factors of mini-batches merge to those of the
        whole set (Ritter et al. 2018 average otherwise; see `fraction`).

        Raises:
            ShapeError: Other parameters, or other options.
        """
        if not isinstance(other, KFAC) or other._selection.names != self._selection.names or other.sizes != self.sizes:
            raise ShapeError(f"merge: expected a KFAC of the same parameters as {self!r}, got {other!r}.")
        return self._over(_Merged(self.source, other.source))

    def fraction(self, num_data: int, batch: int) -> KFAC:
        """With A multiplied by batch / num_data: mini-batch factors, plainly added, then give the whole set's.

        `merge` of such adds both factors without another average.
        """
        return self._over(_Fraction(self.source, batch / num_data))

    def _over(self, source: Source) -> KFAC:
        result = KFAC.__new__(KFAC)
        result._fill(source, self._selection, self._guesses, None, self._layout)
        return result

    def release(self) -> None:
        super().release()
        self.source.forget()


class FromData:
    """Statistics by one pass over the data."""

    def __init__(self, objective: Objective, cotangents: Cotangents, approx: Approx, fallback: Fallback) -> None:
        self.objective, self.cotangents = objective, cotangents
        self.approx: Approx = approx
        self.fallback: Fallback = fallback
        self._lock = threading.Lock()
        self._found: list[Statistics] | None = None
        self.passes = LayerPass(objective, cotangents)

    def statistics(self) -> list[Statistics]:
        with self._lock:
            if self._found is None:
                self._found = self._computed()
        return self._found

    def forget(self) -> None:
        self._found = None

    def note(self, name: str) -> str | None:
        return self.passes.note(name)

    def _computed(self) -> list[Statistics]:
        selection = self.objective.selection
        found = [Statistics(size, approx=self.approx) for size in selection.sizes]
        with torch.no_grad():
            for step in self.passes:
                moments = Moments()
                for i, factors in enumerate(step.factors):
                    if factors is None:
                        continue
                    if self.fallback == "raise" and not has_pairs(factors):
                        raise UnsupportedLayerError(
                            f"KFAC has no factors for the parameter {selection.names[i]!r} of "
                            f"{module_of(self.objective.network.module, selection.names[i])}; pass fallback='diag' or "
                            "'full' for an exact block there, or leave it out with params=[…]"
                        )
                    found[i].add(factors, step.active, step.first, self.fallback, moments)
        return found


class _Merged:
    def __init__(self, one: Source, two: Source) -> None:
        self.one, self.two = one, two
        self._found: list[Statistics] | None = None

    def statistics(self) -> list[Statistics]:
        if self._found is None:
            pairs = zip(self.one.statistics(), self.two.statistics(), strict=True)
            self._found = [a.plus(b) for a, b in pairs]
        return self._found

    def forget(self) -> None:
        self._found = None

    def note(self, name: str) -> str | None:
        return self.one.note(name)


class _Fraction:
    def __init__(self, source: Source, share: float) -> None:
        self.source, self.share = source, share

    def statistics(self) -> list[Statistics]:
        return [one.averaged(self.share) for one in self.source.statistics()]

    def forget(self) -> None:
        self.source.forget()

    def note(self, name: str) -> str | None:
        return self.source.note(name)


def deferred(
    build: Callable[[], LinearOperator],
    guess: Expected,
    selection: ParameterSelection,
    name: str,
    watch: LinearOperator | None,
) -> Deferred:
    """The block of one parameter, computed at first need."""
    p = selection.sizes[selection.names.index(name)]
    return Deferred(
        build, guess.kind, (p, p), selection.dtype, selection.device, label=guess.label, watch=watch,
        is_symmetric=True, is_psd=True, layout={name: slice(0, p)},
    )  # fmt: skip


def check_choice(who: str, argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless an argument is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{who}({argument}={value!r}): expected one of {', '.join(map(repr, allowed))}.")


def refuse_indices(who: str, selection: ParameterSelection) -> None:
    """Raise `UnsupportedError` for a selection by flat indices, which cuts through the blocks."""
    if selection.indices is not None:
        raise UnsupportedError(
            f"{who} is a curvature of whole parameters, and params selects single entries by flat index; select by "
            f"name, take {who}(…).submatrix(indices), or use DiagonalGGN or GGN"
        )
