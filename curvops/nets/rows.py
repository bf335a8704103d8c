"""Gradients of one pass over a graph, written by the layers straight to their places in one flat vector.

A pass otherwise makes every parameter's gradient in memory of its own, and copies all of them into the vector: for a
network of large matrices that is a tenth of the pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvops.nets.parameters import ParameterSelection


class Rows:
    """Where the selected parameters' gradients go; open for one pass at a time, and for the thread that opened it.

    Passes on accelerators run in threads of their own, find it closed, and are copied.
    """

    def __init__(self, selection: ParameterSelection) -> None:
        self.selection = selection
        self._place = {id(t): i for i, t in enumerate(selection.tensors)} if selection.indices is None else {}
        self._free: dict[int, Tensor] = {}
        self._thread: int | None = None
        self._lock = threading.Lock()

    def place(self, tensor: Tensor | None) -> int | None:
        """The parameter's number, or None for a tensor that is none of the selected."""
        return None if tensor is None else self._place.get(id(tensor))

    def claim(self, place: int | None) -> Tensor | None:
        """The part of the open vector for a parameter, to be written by whoever asks first; None for others.

        Of a parameter that is used twice the second gradient is added to the first elsewhere, by autograd.
        """
        if place is None or self._thread != threading.get_ident():
            return None
        return self._free.pop(place, None)

    @contextmanager
    def filling(self, row: Tensor) -> Iterator[list[Tensor]]:
        """Open the vector `row` `(P,)` for a pass; gives the parts, in the order of the parameters."""
        parts = self.selection.split_row(row)
        mine = self._lock.acquire(blocking=False)
        try:
            if mine:
                self._free, self._thread = dict(enumerate(parts)), threading.get_ident()
            yield parts
        finally:
            if mine:
                self._free, self._thread = {}, None
                self._lock.release()


def settle(parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Copy those gradients that are not in their places yet; None is zero."""
    with torch.no_grad():
        for part, grad in zip(parts, grads, strict=True):
            if grad is None:
                part.zero_()
            elif grad.data_ptr() != part.data_ptr() or grad.stride() != part.stride():
                part.copy_(grad)
