"""How much memory a kept autograd graph holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


def graph_bytes(roots: Sequence[Tensor], model: nn.Module) -> int:
    """Bytes of the tensors saved in the graph behind `roots`, each storage once, the model's own excluded.

    Read from the graph's nodes after the fact: hooks on saved tensors would switch off autograd's check for values
    overwritten in place. Tensors saved under hooks (checkpointing, offloading) and those of custom functions that
    do not expose them are not counted.

    Cost: one visit per node.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
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
    return sum(storages.values())


def _saved(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if not name.startswith("_saved_") and name != "saved_tensors":
            continue
        try:
            value = getattr(node, name)
        except RuntimeError:  # Freed, or overwritten in place: not held for a later product.
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor):
                yield item
