"""The tensors that an operator is made of, and the same operator made of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from curvops.curvature.matrixfree.base import DataOperator
from curvops.operators import Closure, Deferred, LinearOperator


def tensors_of(operators: Sequence[LinearOperator]) -> list[Tensor]:
    """The floating-point tensors that operators of the algebra are made of, each once, in a fixed order."""
    found: dict[int, Tensor] = {}
    for operator in operators:
        found.update((id(tensor), tensor) for tensor in _walk(operator))
    return list(found.values())


def _walk(operator: LinearOperator) -> Iterator[Tensor]:
    if _is_closed(operator):
        return
    for value in vars(operator).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, LinearOperator):
                yield from _walk(part)


def swapped(operator: LinearOperator, swap: dict[int, Tensor]) -> LinearOperator:
    """The operator with other tensors in the places of some; what holds none of those is shared, not copied."""

    def other(value: Any) -> Any:
        if isinstance(value, Tensor):
            return swap.get(id(value), value)
        if isinstance(value, LinearOperator):
            return swapped(value, swap)
        if isinstance(value, tuple | list) and any(isinstance(part, LinearOperator) for part in value):
            parts = [other(part) for part in value]
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
        return value

    if _is_closed(operator):
        return operator
    held = vars(operator)
    changed = {name: new for name, value in held.items() if (new := other(value)) is not value}
    if not changed:
        return operator
    twin = object.__new__(type(operator))
    vars(twin).update({**held, "_cache": {}, "_count": 0, **changed})
    return twin


def _is_closed(operator: LinearOperator) -> bool:
    """Whether autograd ends at an operator: networks, functions, and what is computed from them."""
    return isinstance(operator, DataOperator | Deferred | Closure)
