"""One pass over the data that sees every layer: the one driver of all structured curvatures.

Batches are cut into chunks of examples and of columns that fit the memory budget; for each, `Step.factors` holds the
per-example gradients of every parameter in factors. What is summed from them is the caller's affair.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from curvops.curvature.cotangents import Cotangents
from curvops.curvature.objective import Objective
from curvops.errors import NumericalWarning
from curvops.nets.batches import Batch
from curvops.nets.capture import Layers
from curvops.nets.factors import Factors
from curvops.nets.forward import take

WORKING_BYTES = 2**28
"""A chunk takes no more than this, however large the budget: larger ones only leave the caches."""

CPU_COLUMN_BYTES = 2**23
"""On a CPU, columns whose transients exceed this are pulled back one by one."""


@dataclass(frozen=True)
class Step:
    """Some examples of a batch and some of their columns.

    Attributes:
        factors: Per parameter; None where the gradients are zero.
        active: `(b,)` or `(b, T)`: which data and positions count (False at ignored targets).
        first: Whether these are the first columns of their examples.
        last: Whether they are the last.
        outputs: f of the examples.
    """

    factors: list[Factors | None]
    active: Bool[Tensor, "*b"]
    first: bool
    last: bool
    outputs: Tensor


class LayerPass:
    """Passes over an objective's data, layer by layer.

    Args:
        objective: Network, likelihood, data, parameters.
        cotangents: Which columns are pulled back.

    Attributes:
        fallback: Names of the parameters that no layer rule covers, known after a pass.
        sketched: Whether positions of sequences were told apart by random signs.
    """

    def __init__(self, objective: Objective, cotangents: Cotangents) -> None:
        self.objective, self.cotangents = objective, cotangents
        self.layers = Layers(objective.network, objective.selection, byte_budget=self._budget())
        self.fallback: tuple[str, ...] = ()
        self.sketched = False
        self._reported = False

    def __iter__(self) -> Iterator[Step]:
        """One pass.

        Raises:
            StaleOperatorError: The parameters changed since the objective was built.
            UnsupportedError: Examples that depend on each other.
        """
        self.objective.refresh()
        for batch in self.objective.batches():
            outputs = []
            for step in self._chunks(batch):
                if step.first:
                    outputs.append(step.outputs)
                yield step
            self.objective.observe(batch, torch.cat(outputs))

    def _chunks(self, batch: Batch) -> Iterator[Step]:
        size = batch.y.shape[0]
        self.layers.learn(batch.x, size)
        likelihood = self.objective.needed_likelihood()
        room = max(1, self._budget() // max(1, self.layers.bytes_per_example))
        examples, start = 1, 0
        while start < size:
            # The number of columns is known once the outputs are: the first chunk is cautious, the next ones are not.
            stop = min(size, start + (examples if start else min(size, room)))
            part = Batch(batch.index, batch.position + start, take(batch.x, start, stop, size), batch.y[start:stop])
            capture = self.layers.capture(part.x, stop - start)
            try:
                self.objective.check(capture.outputs, part.y)
                self._report(capture.unused, capture.fallback)
                with torch.no_grad():
                    columns = self.cotangents.of(likelihood, capture.outputs, part)
                    active = likelihood.active(capture.outputs, part.y)
                self.sketched |= capture.outputs.dim() == 3 and not columns.apart and self.cotangents.fisher == "exact"
                examples = max(1, room // columns.count)
                groups = list(columns.chunks(self._step(stop - start, room)))
                for i, U in enumerate(groups):
                    yield Step(capture.factors(U), active, i == 0, i == len(groups) - 1, capture.outputs)
            finally:
                capture.release()
            start = stop

    def _step(self, examples: int, room: int) -> int:
        """Columns pulled back in one go: what fits; on a CPU no more than pays, since its caches are small."""
        within = room // examples
        if self.objective.selection.device.type == "cpu":
            within = min(within, CPU_COLUMN_BYTES // max(1, examples * self.layers.bytes_per_example))
        return max(1, within)

    def _budget(self) -> int:
        return max(1, min(self.objective.budget() // 4, WORKING_BYTES))

    def _report(self, unused: list[int], fallback: list[int]) -> None:
        names = self.objective.selection.names
        self.fallback = tuple(names[i] for i in fallback)
        if unused and not self._reported:
            self._reported = True
            warnings.warn(
                f"the outputs do not depend on {', '.join(names[i] for i in unused)}; the curvature there is zero",
                NumericalWarning,
                stacklevel=2,
            )
