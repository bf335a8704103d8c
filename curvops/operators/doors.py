"""Doors that open above: what an operator becomes in another library, entered here by the module that knows both.

Imports run one way, so an operator cannot import an adapter of `curvops.interop`; the adapter enters itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from curvops.errors import UnsupportedError

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_DOORS: dict[str, Callable[..., Any]] = {}


def enter(library: str, door: Callable[..., Any]) -> None:
    """Make `door(operator, **options)` the way of every operator into `library`."""
    _DOORS[library] = door


def through(library: str, operator: LinearOperator, **options: Any) -> Any:
    """The operator as `library` knows it.

    Raises:
        UnsupportedError: No adapter has entered itself.
    """
    if library not in _DOORS:
        raise UnsupportedError(f"no door to {library} is open for {operator!r}; there are {sorted(_DOORS)}.")
    return _DOORS[library](operator, **options)
