"""How much memory a kept autograd graph holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_ALIVE = 4
"""Saved tensors whose like a pass holds at one time, measured over convolutions, residuals and attention."""


class Footprint(NamedTuple):
    """Memory of a kept graph, and of a pass over it.

    Attributes:
        held: Bytes that stay.
        working: Bytes that a pass with one column takes and frees.
        copies: Vectors that each column of a pass with several adds, where columns run in turn.
        together: Whether they run in one pass, each with its own transients.
    """

    held: int
    working: int
    copies: float = 1.0
    together: bool = False

    def passing(self, columns: int, vector: int) -> int:
        """Bytes that a pass with so many columns of `vector` bytes takes and frees, its result included."""
        one = max(2 * vector, self.working)
        if columns <= 1 or self.together:
            return columns * one
        return one + int(self.copies * columns * vector)


def graph_bytes(roots: Sequence[Tensor], model: nn.Module) -> int:
    """Bytes that the graph behind `roots` holds beyond the model's own; see `footprint`."""
    return footprint(roots, model).held


def footprint(roots: Sequence[Tensor], model: nn.Module, inputs: Sequence[Tensor] = ()) -> Footprint:
    """Bytes of the tensors saved in the graph behind `roots`, each storage once; the model's and `inputs` excluded.

    Read from the graph's nodes after the fact: hooks on saved tensors would switch off autograd's check for values
    overwritten in place. Tensors saved under hooks (checkpointing, offloading) and those of custom functions that
    do not expose them are not counted.

    Cost: one visit per node.
    """
    own = {t.untyped_storage().data_ptr() for t in inputs}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values())
        own.update(t.untyped_storage().data_ptr() for t in held if t is not None)
    seen: set[Any] = set()
    storages: dict[int, int] = {}
    pending = [t.grad_fn for t in roots if t.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    sizes = sorted(storages.values(), reverse=True)
    return Footprint(sum(sizes), sum(sizes[:_ALIVE]))


@functools.lru_cache(maxsize=256)
def _names_saved(kind: type) -> tuple[str, ...]:
    """Under which names nodes of one kind show the tensors that they saved: numbers and shapes have no raw twin."""
    names = dir(kind)
    raw = {name.removeprefix("_raw_") for name in names if name.startswith("_raw_saved_")}
    return tuple(name for name in names if name.lstrip("_") in raw)


def _saved(node: Any) -> Iterator[Tensor]:
    for name in _names_saved(type(node)):
        try:
            value = getattr(node, name)
        except RuntimeError:  # Freed, or overwritten in place: not held for a later product.
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor):
                yield item
