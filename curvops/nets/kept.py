"""A graph that is kept, and passes over it with one or many columns: what every product on it shares."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from curvops.errors import CurvopsError, ShapeError, UnsupportedError
from curvops.nets.forward import Network, explained_product
from curvops.nets.parameters import ParameterSelection
from curvops.nets.patches import recording, tracked_only, unhooked
from curvops.nets.rows import Rows, settle
from curvops.nets.tape import Pass, Replay

Engine = Literal["double_backward"]

_T = TypeVar("_T")

_SMALL = 2**20
"""Bytes of a graph below which a pass is mostly calls, and K columns share them. Above, on a processor, the columns of
a vectorised pass drive each other out of the caches, and one after the other is faster. Accelerators vectorise."""

_LIGHT = 2**23
"""Parameters times rows of outputs, up to which the same holds: above, a column's arithmetic takes longer than its
calls (about a millisecond), and stacks of matrix products run at half the speed of single ones."""


class Kept:
    """A kept graph: selection, column batching, memory, release."""

    def __init__(self, network: Network, selection: ParameterSelection, engine: Engine) -> None:
        if engine != "double_backward":
            raise UnsupportedError(f"engine={engine!r} is unknown; there is 'double_backward'")
        self.selection = selection
        self.engine: Engine = engine
        self.batched: bool | None = None
        """Whether K columns run in one vectorised pass; None before the first product with K > 1 has decided."""
        self._network = network
        self._into = Rows(selection)
        self._released = False
        self._recomputes = False
        self._replayed: tuple[object, Replay] | None = None

    def _check(self, v: Tensor, shape: tuple[int, ...], what: str) -> None:
        if self._released:
            raise CurvopsError(f"this {type(self).__name__} was released; build it again")
        if v.shape[:-1] != shape or v.ndim != len(shape) + 1:
            raise ShapeError(f"{what}: expected {(*shape, 'K')}, got {tuple(v.shape)}")
        like = self.selection.tensors[0]
        if v.dtype != like.dtype or v.device != like.device:
            raise ShapeError(f"{what}: expected {like.dtype} on {like.device}, got {v.dtype} on {v.device}")

    def _column(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """`autograd.grad` on the kept graph; None for zero."""
        return self._guarded(
            lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
        )

    def _grad(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, last: bool = False
    ) -> list[Tensor | None]:
        """The same for K cotangents, each `(K, *output.shape)`; answers `(K, *input.shape)` or None.

        Args:
            last: No other pass follows: what the graph keeps may be freed on the way.
        """

        def run() -> list[Tensor | None]:
            if cotangents[0].shape[0] == 1 or self._takes_turns():
                return _looped(outputs, inputs, cotangents, last=last)
            if self.batched is None:
                return self._probe(outputs, inputs, cotangents)
            return _vectorised(outputs, inputs, cotangents, last=last)

        return self._guarded(run)

    def _fill(self, row: Tensor, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """One pass to the selected parameters, into `row` `(P,)`: nothing of its size is held beside."""
        selection = self.selection
        if selection.indices is not None or row.is_inference():  # the pass runs outside inference mode
            row.copy_(selection.join_row(self._column(outputs, selection.tensors, cotangents)))
            return
        with self._into.filling(row) as parts:
            settle(parts, self._column(outputs, selection.tensors, cotangents))

    def _by_columns(self, V: Tensor, what: object, run: Pass, *, in_place: bool) -> Tensor:
        """`run` on each column of V `(P, K)`, into its place in the result; on one that comes often, from a tape.

        Args:
            what: Tells one such product from others.
            in_place: The result may be written over the column, which `run` has read by then.
        """
        if self._replayed is None or self._replayed[0] != what:
            self._replayed = what, Replay()
        replay = run if self._recomputes else functools.partial(self._replayed[1], run)
        if V.shape[1] == 1:
            rows = V.new_empty(1, len(V))
            replay(V[:, 0].contiguous(), rows[0])
            return rows.T
        rows = V.T.clone(memory_format=torch.contiguous_format)
        for row in rows:
            replay(row if in_place else row.clone(), row)
        return rows.T

    @property
    def on_tape(self) -> bool | None:
        """Whether products are replayed; False where a pass may make other calls, None before it is known."""
        return None if self._replayed is None else self._replayed[1].replays

    @property
    def graph_bytes(self) -> int:
        """Bytes that the kept graphs hold."""
        raise NotImplementedError

    @property
    def _work(self) -> int:
        """Parameters times rows of outputs, where columns run through the whole network."""
        return 0

    @property
    def _together(self) -> int:
        """Bytes of a graph up to which columns share a pass."""
        return _SMALL

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector of parameters."""
        return self.selection.size * self.selection.tensors[0].element_size()

    def _in_turn(self) -> bool:
        """Whether columns run one after the other, as far as is known before one pass has tried to run them at once."""
        if self.batched is None:
            on_processor = self.selection.tensors[0].device.type == "cpu"
            return on_processor and (self._work > _LIGHT or self.graph_bytes > self._together)
        return not self.batched

    def _takes_turns(self) -> bool:
        """As `_in_turn`, and from now on, so that the graph is walked over once."""
        if self.batched is None and self._in_turn():
            self.batched = False
        return self.batched is False

    def _guarded(self, run: Callable[[], _T]) -> _T:
        """A pass over the graph with autograd on and the user's hooks silent; RuntimeErrors explained."""
        try:
            with recording(), unhooked(self.selection.tensors):
                if not self._recomputes:
                    try:
                        return run()
                    except CheckpointError:
                        # Checkpointed parts run their forward again, which must then see what the first one saw.
                        self._recomputes = True
                with (
                    self._network.differentiable(),
                    tracked_only(self._network.module.modules(), self.selection.tensors),
                ):
                    return run()
        except RuntimeError as error:
            raise explained_product(error) from error

    def _probe(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Try the vectorised pass once; fall back to the loop, for good, where an operation has no batching rule."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = _vectorised(outputs, inputs, cotangents)
            except CheckpointError:
                raise
            except RuntimeError:
                result = None
        # PyTorch warns where it loops inside one operation: then the plain loop costs the same and cannot err.
        self.batched = result is not None and not any("performance drop" in str(w.message) for w in caught)
        return result if self.batched and result is not None else _looped(outputs, inputs, cotangents)


def _vectorised(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, last: bool = False
) -> list[Tensor | None]:
    options: dict[str, Any] = {"retain_graph": not last, "allow_unused": True, "is_grads_batched": True}
    return list(torch.autograd.grad(outputs, inputs, cotangents, **options))


def _looped(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, last: bool = False
) -> list[Tensor | None]:
    columns = cotangents[0].shape[0]

    def column(k: int) -> Sequence[Tensor | None]:
        kept = not last or k < columns - 1
        return torch.autograd.grad(outputs, inputs, [c[k] for c in cotangents], retain_graph=kept, allow_unused=True)

    if columns == 1:
        return [None if g is None else g.unsqueeze(0) for g in column(0)]
    whole: list[Tensor | None] = [None] * len(inputs)

    def put(k: int, found: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(found):
            place = whole[i]
            if place is None and g is not None:
                place = whole[i] = g.new_empty(columns, *g.shape)
                place[:k].zero_()
            if place is not None:
                place[k].zero_() if g is None else place[k].copy_(g)  # half the cost of `place[k] = g`

    for k in range(columns):
        put(k, column(k))  # of one column at a time, the results are held beside the whole
    return whole
