"""One pass over the data that sees every layer: the one driver of all structured curvatures.

Batches are cut into chunks of examples and of columns that fit the memory budget; for each, `Step.factors` holds the
per-example gradients of every parameter in factors. What is summed from them is the caller's affair.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from curvops.curvature.matrixfree.cotangents import Columns, Cotangents
from curvops.curvature.objective import Objective
from curvops.errors import NumericalWarning
from curvops.nets.batches import Batch
from curvops.nets.capture import Capture, Layers, Place
from curvops.nets.factors import Factors
from curvops.nets.forward import take
from curvops.nets.likelihood import Likelihood

WORKING_BYTES = 2**28
"""A chunk takes no more than this, however large the budget: larger ones only leave the caches."""

CPU_COLUMN_BYTES = 3 * 2**22
"""On a CPU, as many columns are pulled back in one pass as have transients of no more than this."""

STACK = 3
"""Columns that one product with the inputs of shared weights serves, where that is faster; more gain nothing."""

STACKED_BYTES = 2**25
"""On a CPU, a stack of columns takes no more than this: examples are cut into chunks of which it takes less."""

STACKED_EXAMPLES = 16
"""Fewer examples in a chunk cost more than their stacks save."""

_ROOT = 10
"""How much longer than those of a product R·d² multiplications for a head's root take: 2 to 10 from 32 features up."""


@dataclass(frozen=True)
class Step:
    """Some examples of a batch and some of their columns.

    Attributes:
        factors: Per parameter; None where the gradients are zero.
        active: `(b,)` or `(b, T)`: which data and positions count (False at ignored targets).
        first: Whether these are the first columns of their examples, for the parameters that have factors here.
        last: Whether they are the last.
        hold: Columns of which factors may be held, for a product to serve several steps'.
        outputs: f of the examples.
        moment: Σ g gᵀ `(C, C)` over the examples' positions and all of their columns, where those have been summed
            already: g of the factors, which are the last layer's, is one column of zeros.
        guessed: Parameters where it is guessed of which examples some inputs are, whose gradients are zero.
    """

    factors: list[Factors | None]
    active: Bool[Tensor, "*b"]
    first: bool
    last: bool
    outputs: Tensor
    moment: Tensor | None = None
    hold: int = 1
    guessed: Set[int] = frozenset()


class LayerPass:
    """Passes over an objective's data, layer by layer.

    Args:
        objective: Network, likelihood, data, parameters.
        cotangents: Which columns are pulled back.
        together: Have all columns of an example in one step where memory allows, rather than what suits the caches.
        examples: `columns per example → most examples in a step`; None for what fits.
        report_unused: Warn once of parameters that the outputs do not depend on.
        stacked: A product serves several columns of shared weights: on a CPU, let them be held, of fewer examples; and
            read gradients behind the pooling of a convolution, where they are few.
        narrow: Allow a last layer columns of its own, and the parameters behind it fewer: for what is a sum over the
            columns of each parameter (and a bias's weight) alone.

    Attributes:
        moments: Whether such a last layer may have its columns summed already, see `Step.moment`.
        fallback: Names of the parameters that no layer rule covers, known after a pass.
        sketched: Whether positions of sequences were told apart by random signs.
    """

    def __init__(
        self,
        objective: Objective,
        cotangents: Cotangents,
        *,
        together: bool = False,
        examples: Callable[[int], int] | None = None,
        report_unused: bool = True,
        stacked: bool = False,
        narrow: bool = False,
    ) -> None:
        self.objective, self.cotangents = objective, cotangents
        self._together, self._most, self._narrow = together, examples, narrow
        self.moments = False
        self._stacked = stacked and objective.selection.device.type == "cpu"
        self.layers = Layers(objective.network, objective.selection, few=cotangents.few, pooled=self._stacked)
        self.fallback: tuple[str, ...] = ()
        self.sketched = False
        self._reported = not report_unused
        self._unused: set[int] | None = None
        self._allowed: int | None = None

    def note(self, name: str) -> str | None:
        """What a reader should know of how a parameter was treated; None before a pass, and mostly after it."""
        notes = ["per-example rows"] * (name in self.fallback) + ["tokens sketched"] * self.sketched
        return ", ".join(notes) if notes else None

    def __iter__(self) -> Iterator[Step]:
        """One pass.

        Raises:
            StaleOperatorError: The parameters changed since the objective was built.
            UnsupportedError: Examples that depend on each other.
        """
        self.objective.refresh()
        self._unused = self._allowed = None
        for batch in self.objective.batches():
            outputs: list[Tensor] = []
            yield from self._chunks(batch, outputs)
            self.objective.observe(batch, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        self._report()

    def _chunks(self, batch: Batch, outputs: list[Tensor]) -> Iterator[Step]:
        """The batch's steps; every chunk's outputs are appended to `outputs`."""
        size = batch.y.shape[0]
        self.layers.learn(batch.x, size)
        likelihood = self.objective.likelihood
        room = self._room(size)
        most, start = self._chunk(size, room), 0
        while start < size:
            part = _part(batch, start, min(size, start + most))
            count = part.y.shape[0]
            capture = self.layers.capture(part.x, count)
            try:
                self.objective.check(capture.outputs, part.y)
                self._note(capture.unused, capture.fallback)
                if capture.fallback:
                    self.layers.byte_budget = self._working_bytes()
                with torch.no_grad():
                    columns = self.cotangents.of(likelihood, capture.outputs, part)
                    active = _active(likelihood, capture.outputs, part.y)
                # How many columns there are is known now: a chunk that proves too large is made smaller, once.
                fitting = min(self._examples(room, columns.count), size)
                if fitting < count and self._together:
                    most = fitting
                    continue
                self.sketched |= capture.outputs.dim() == 3 and not columns.apart and self.cotangents.fisher == "exact"
                outputs.append(capture.outputs)
                with torch.no_grad():
                    roots = self._roots(capture, columns)
                for place, some in roots:
                    summed = place == "head" and self.moments and capture.head is not None and capture.head.whole
                    moment = some.root.moment() if summed else None
                    if moment is not None:
                        zero = moment.new_zeros(()).expand(*capture.outputs.shape, 1)
                        factors = capture.factors(zero, place)
                        yield Step(factors, active, True, True, capture.outputs, moment, guessed=capture.guessed)
                        continue
                    # The head's columns are there already; others are pulled back as many at a time as suits.
                    there = place == "head" and not some.apart and some.signs is None
                    number = 1 if there else -(-some.count // self._step(count, room))
                    hold = self._hold(count, room)
                    for i, U in enumerate(some.chunks(-(-some.count // number))):  # steps of one size
                        last = i == number - 1
                        final = last and place == roots[-1][0]
                        factors = capture.factors(U, place, last=final)
                        if final:
                            capture.release()  # what the factors are made of is theirs alone
                        guessed = capture.guessed
                        yield Step(factors, active, i == 0, last, capture.outputs, hold=hold, guessed=guessed)
            finally:
                capture.release()
            start += count

    def _roots(self, capture: Capture, columns: Columns) -> list[tuple[Place, Columns]]:
        """Which columns are pulled back to which parameters."""
        R = columns.root.shape[-1]
        if not self._narrow or R == 1 or (head := capture.head) is None or (d := head.weight.shape[0]) >= R:
            return [("everywhere", columns)]
        behind = sum(p for i, p in enumerate(self.objective.selection.sizes) if i not in head.parameters)
        # A column less saves a product per parameter and row; the roots, in double precision, run far below its speed.
        if (R - d) * behind <= _ROOT * R * d**2:
            return [("everywhere", columns)]
        return [("head", columns), ("body", columns.through(head))]

    def _working_bytes(self) -> int:
        """What a chunk may take; asked for once in a pass, whose chunks shall not follow what else is going on."""
        if self._allowed is None:
            self._allowed = max(1, min(self.objective.budget() // 4, WORKING_BYTES))
        return self._allowed

    def _room(self, size: int) -> int:
        """Columns of an example that fit at one time, for a batch of `size`."""
        each, objective = max(1, self.layers.bytes_per_example), self.objective
        # On a CPU columns are pulled back as many at a time as suits the caches, so that what is free matters to large
        # batches alone; and to ask for it takes as long as a small module's forward.
        asks = self._together or objective.memory_budget is not None or objective.selection.device.type != "cpu"
        few = not asks and STACK * size * each <= CPU_COLUMN_BYTES
        return max(1, (CPU_COLUMN_BYTES if few else self._working_bytes()) // each)

    def _chunk(self, size: int, room: int) -> int:
        """Examples in a chunk, as far as is known before their columns."""
        stackable = STACKED_BYTES // max(1, STACK * self.layers.bytes_per_example)
        if not self._stacked or not STACKED_EXAMPLES <= stackable < size:
            return min(size, room)
        return min(room, -(-size // -(-size // stackable)))  # chunks of one size

    def _examples(self, room: int, columns: int) -> int:
        """Examples in a step, so that all of their columns fit."""
        fitting = max(1, room // columns)
        return fitting if self._most is None else min(fitting, self._most(columns))

    def _step(self, examples: int, room: int) -> int:
        """Columns pulled back in one go: what fits; on a CPU no more than pays, since its caches are small."""
        within = room // examples
        if self.objective.selection.device.type == "cpu" and not self._together:
            within = min(within, CPU_COLUMN_BYTES // max(1, examples * self.layers.bytes_per_example))
        return max(1, within)

    def _hold(self, examples: int, room: int) -> int:
        """Columns of which factors may be held."""
        fits = STACK * examples * self.layers.bytes_per_example <= STACKED_BYTES
        return STACK if self._stacked and fits and STACK * examples <= room else 1

    def _note(self, unused: list[int], fallback: list[int]) -> None:
        """Remember what concerns the whole pass: fallbacks of any of its chunks, what none of them uses."""
        names = self.objective.selection.names
        found = {*self.fallback, *(names[i] for i in fallback)}
        self.fallback = tuple(name for name in names if name in found)
        self._unused = set(unused) if self._unused is None else self._unused.intersection(unused)

    def _report(self) -> None:
        names = self.objective.selection.names
        if self._unused and not self._reported:
            self._reported = True
            unused = ", ".join(names[i] for i in sorted(self._unused))
            warnings.warn(
                f"the outputs do not depend on {unused}; the curvature there is zero", NumericalWarning, stacklevel=2
            )


def _active(likelihood: Likelihood | None, f: Tensor, y: Tensor) -> Tensor:
    if likelihood is None:
        return torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device)
    return likelihood.active(f, y)


def _part(batch: Batch, start: int, stop: int) -> Batch:
    x = batch.x if stop - start == len(batch.y) else take(batch.x, start, stop, len(batch.y))
    return Batch(batch.index, batch.position + start, x, batch.y[start:stop])
