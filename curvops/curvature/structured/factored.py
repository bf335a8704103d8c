"""What KFAC and EKFAC share: their arguments, and the pass over the data that sums the factors."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.cotangents import Cotangents, FisherKind, Tokens
from curvops.curvature.matrixfree.fisher import Datum
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective, Options
from curvops.curvature.structured.expected import Expected, expected, module_of
from curvops.curvature.structured.moments import Moments
from curvops.curvature.structured.statistics import Approx, Fallback, Statistics, has_pairs
from curvops.curvature.structured.units import ApartError, Unit, WeightAndBias, units_of
from curvops.errors import UnsupportedError, UnsupportedLayerError
from curvops.nets.factors import Factors, Lookup, Outer
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.deferred import Deferred


@dataclass(frozen=True)
class Choice:
    """How a curvature is factored; see `Factored`."""

    approx: Approx = "expand"
    fallback: Fallback = "diag"
    weight_and_bias: WeightAndBias = "separate"

    def check(self, who: str) -> None:
        """Raise `ValueError` for a value that is none of those known."""
        known = (
            ("approx", ("expand", "reduce")),
            ("fallback", ("diag", "full", "raise")),
            ("weight_and_bias", ("separate", "joint")),
        )
        for name, allowed in known:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{who}({name}={getattr(self, name)!r}): expected one of {', '.join(map(repr, allowed))}."
                )


class Source(Protocol):
    """Where the blocks come from."""

    def operators(self, number: int) -> list[LinearOperator]:
        """What the block of unit `number` is made of, computed now if it was not."""
        ...

    def forget(self) -> None:
        """Drop what was computed."""
        ...

    def note(self, number: int) -> str | None:
        """What a reader should know of how a block was computed."""
        ...


class Factored(BlockDiagonal):
    """A curvature in blocks made of Kronecker factors, in the order of the parameters.

    Args:
        model, likelihood, data, options: As for `GGN`; `params` by flat indices is refused.
        fisher: "exact" (columns of the output Hessian's root), "mc" (sampled targets), "empirical" (observed targets).
        approx: "expand" (positions are further terms) or "reduce" (positions are averaged in A, summed in B).
        fallback: Of parameters without factors: "diag", "full" (dense), or "raise".
        weight_and_bias: "separate" blocks, or one "joint" block B ⊗ Ã of [W b] for a weight and the bias of the same
            module behind it in the selection, Ã of the inputs and a 1. Where the two make no one matrix (transposed
            convolutions, recurrent layers, norm layers), they stay apart.
        num_samples, generator: Of "mc", as for `MCFisher`.
        datum: Of "empirical", as for `EmpiricalFisher`.
        tokens: For outputs `(B, T, C)`: "separate" columns for each position, T times the work; "sketched", positions
            told apart by random signs (unbiased); "auto": separate up to 256 columns.

    Scale: a sum over the data; B sums, A averages.
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
        weight_and_bias: WeightAndBias = "separate",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        datum: Datum = "token",
        tokens: Tokens = "auto",
        **options: Unpack[Options],
    ) -> None:
        cotangents = Cotangents.chosen(type(self).__name__, fisher, num_samples, generator, datum, tokens)
        objective = Objective(model, likelihood, data, **options)
        self._begin(objective, cotangents, Choice(approx, fallback, weight_and_bias))

    @classmethod
    def of(
        cls,
        objective: Objective,
        cotangents: Cotangents,
        approx: Approx = "expand",
        fallback: Fallback = "diag",
        weight_and_bias: WeightAndBias = "separate",
    ) -> Self:
        """The curvature over an objective that is already there."""
        made = cls.__new__(cls)
        made._begin(objective, cotangents, Choice(approx, fallback, weight_and_bias))
        return made

    def _begin(self, objective: Objective, cotangents: Cotangents, choice: Choice) -> None:
        choice.check(type(self).__name__)
        refuse_indices(type(self).__name__, objective.selection)
        objective.needed_likelihood()
        sums = Sums(objective, cotangents, choice)
        self._fill(self._from(sums), sums)

    def _from(self, sums: Sums) -> Source:
        """Where the blocks come from, given the pass that sums the factors."""
        raise NotImplementedError

    def _guess(self, guess: Expected) -> Expected:
        """What a block will be, given what KFAC's will be."""
        return guess

    def _fill(self, source: Source, sums: Sums, *, watched: bool = True) -> None:
        """Blocks of `source`, for the units that `sums` are of; `watched` until computed, if the network matters."""
        self.source, self._sums, self._is_watched = source, sums, watched
        self.sizes = [unit.size for unit in sums.units]
        selection = sums.objective.selection
        LinearOperator.__init__(
            self, (selection.size, selection.size), selection.dtype, selection.device, layout=sums.objective.layout
        )

    @functools.cached_property
    def blocks(self) -> tuple[LinearOperator, ...]:
        """One for each unit. What a block will be is worked out when it is first asked for."""
        sums, objective = self._sums, self._sums.objective
        guesses = expected(objective.model, objective.selection, sums.units, sums.choice.fallback)
        watch = sums.cotangents.operator(objective) if self._is_watched else None
        return tuple(
            _Block(self.source, number, unit, self._guess(guess), objective.selection, watch)
            for number, (unit, guess) in enumerate(zip(sums.units, guesses, strict=True))
        )

    def release(self) -> None:
        super().release()
        self.source.forget()


class Sums:
    """The statistics of every unit, by one pass over the data; kept until forgotten.

    How a parameter is used shows in the forward alone. Where a batch shows that a weight and its bias make no one
    matrix, or that a parameter of which there are factors has none in this batch, the pass begins again, with the two
    apart, or with an exact block of that parameter: no part of the data is left out, or counted by another rule.
    """

    def __init__(self, objective: Objective, cotangents: Cotangents, choice: Choice) -> None:
        self.objective, self.cotangents, self.choice = objective, cotangents, choice
        self.units = units_of(objective.model, objective.selection, choice.weight_and_bias)
        self.passes = LayerPass(objective, cotangents, narrow=True)
        self._lock = threading.Lock()
        self._apart: set[tuple[int, ...]] = set()
        self._exact: set[tuple[int, ...]] = set()
        self._guessed: set[tuple[int, ...]] = set()
        self._found: list[list[Statistics]] | None = None

    def statistics(self) -> list[list[Statistics]]:
        """Of every unit one, or two where its weight and bias turned out to be apart."""
        with self._lock:
            if self._found is None:
                self._found = self._computed()
        return self._found

    def parts(self) -> list[list[Unit]]:
        """What `statistics` are of."""
        return [unit.apart() if unit.positions in self._apart else [unit.alone()] for unit in self.units]

    def forget(self) -> None:
        """Drop what was computed."""
        self._found = None

    def note(self, number: int) -> str | None:
        """What a reader should know of how a unit's statistics were computed."""
        positions = self.units[number].positions
        notes = [self.passes.note(self.objective.selection.names[i]) for i in positions]
        notes.append("weight and bias apart" if positions in self._apart else None)
        guessed = any(set(part).issubset(positions) for part in self._guessed)
        notes.append("exact, since it is not certain whose some inputs are" if guessed else None)
        return ", ".join(dict.fromkeys(filter(None, notes))) or None

    def _computed(self) -> list[list[Statistics]]:
        while True:
            parts = self.parts()
            found = [[self._empty(part) for part in group] for group in parts]
            if self._summed(parts, found):
                return found

    def _empty(self, part: Unit) -> Statistics:
        like = self.objective.selection.tensors[0]
        return Statistics(part.size, like, self.choice.approx, part.order, self.cotangents.fisher)

    @torch.no_grad()
    def _summed(self, parts: list[list[Unit]], found: list[list[Statistics]]) -> bool:
        """One pass; False where it has to begin again."""
        every = [pair for group, totals in zip(parts, found, strict=True) for pair in zip(group, totals, strict=True)]
        moments = Moments(self.choice.approx)
        self.passes.moments = not self._exact  # an exact block needs the columns themselves
        for step in self.passes:
            used: dict[int, Factors] = {}
            for number, (part, total) in enumerate(every):
                try:
                    factors = part.of(step.factors)
                except ApartError:
                    self._apart.add(part.positions)
                    return False
                if factors is None:
                    continue
                if self._guesses(part, factors, step):
                    self._guessed.add(part.positions)
                exact = not has_pairs(factors) or part.positions in self._exact | self._guessed
                if moments.knows(number) if exact else total.exact is not None:
                    self._exact.add(part.positions)
                    return False
                if exact:
                    assert step.moment is None
                    self._refuse(part)
                    total.add_exact(factors, self.choice.fallback)
                else:
                    used[number] = factors
            factors = None
            step.factors.clear()  # moments free what they have summed
            moments.add(used, step.active, step.first, step.moment)
        for number, pairs in moments.pairs().items():
            every[number][1].pairs = pairs
        return True

    def _guesses(self, part: Unit, factors: Factors, step: Step) -> bool:
        """Whether a mean over inputs would depend on a guess of whose some are: their gradients do not."""
        return (
            not step.guessed.isdisjoint(part.positions)
            and (self.choice.approx == "reduce" or not bool(step.active.all()))
            and any(isinstance(p, Outer | Lookup) for p in factors.parts)
        )

    def _refuse(self, part: Unit) -> None:
        if self.choice.fallback == "raise":
            name = self.objective.selection.names[part.positions[0]]
            open_owners = "not all inputs count alike, and through some goes no gradient: it is open whose they are"
            why = f" ({open_owners})" if part.positions in self._guessed else ""
            raise UnsupportedLayerError(
                f"KFAC has no factors for the parameter {name!r} of {module_of(self.objective.network.module, name)}"
                f"{why}; pass fallback='diag' or 'full' for an exact block there, or leave it out with params=[…]"
            )


class _Block(Deferred):
    """The block of one unit, computed at first need."""

    def __init__(
        self,
        source: Source,
        number: int,
        unit: Unit,
        guess: Expected,
        selection: ParameterSelection,
        watch: LinearOperator | None,
    ) -> None:
        layout, start = {}, 0
        for i, p in zip(unit.positions, unit.sizes, strict=True):
            layout[selection.names[i]], start = slice(start, start + p), start + p
        super().__init__(
            None, guess.kind, (unit.size, unit.size), selection.dtype, selection.device, label=guess.label, watch=watch,
            is_symmetric=True, is_psd=True, layout=layout,
        )  # fmt: skip
        self._source, self._number = source, number

    def _built(self) -> LinearOperator:
        operators = self._source.operators(self._number)
        self.note = self._source.note(self._number)
        return operators[0] if len(operators) == 1 else BlockDiagonal(*operators)


def refuse_indices(who: str, selection: ParameterSelection) -> None:
    """Raise `UnsupportedError` for a selection by flat indices, which cuts through the blocks."""
    if selection.indices is not None:
        raise UnsupportedError(
            f"{who} is a curvature of whole parameters, and params selects single entries by flat index; select by "
            f"name, take {who}(…).submatrix(indices), or use DiagonalGGN or GGN"
        )
