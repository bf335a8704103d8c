"""Shapes in annotations are checked while tests run: jaxtyping's import hook with a checker of shapes alone.

Other annotations are pyright's business: many are protocols or names that exist for type checkers only.
"""

from __future__ import annotations

import re
import types
from typing import Any

from beartype import BeartypeConf, beartype

_SHAPES = re.compile(r"\b(Float|Int|Bool|Integer|Shaped|Vector|Columns|VectorOrColumns)\b")


def check(function: Any) -> Any:
    """`function` with those of its annotations checked that name a shape; anything else as it is."""
    if not isinstance(function, types.FunctionType):
        return function
    shapes = {name: hint for name, hint in function.__annotations__.items() if _SHAPES.search(str(hint))}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
