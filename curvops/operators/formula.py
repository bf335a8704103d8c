"""One formula tree per operator, and its renderers: the algebraic line of `repr` and the tree of `describe()`.

A node is made of facts alone, so rendering computes nothing. Only Latin-1 signs are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["leaf", "group", "sum", "scaled", "product", "transpose", "inverse", "selection", "function"]

_SHOWN = 8  # blocks of a group that one line names
_BINDING = {
    "leaf": 4,
    "group": 4,
    "inverse": 4,
    "selection": 4,
    "function": 4,
    "transpose": 3,
    "product": 2,
    "scaled": 2,
    "sum": 1,
}


@dataclass(frozen=True)
class Formula:
    """A node of the formula tree.

    Attributes:
        kind: How the children combine.
        text: The name of a leaf or of a group of blocks, or the scalar in front of a scaled node.
        children: The operands.
        notes: Facts printed in brackets behind the line ("not computed", provenance), and one per line in the tree.
    """

    kind: Kind
    text: str = ""
    children: Sequence[Formula] = ()
    notes: tuple[str, ...] = field(default=())


def line(node: Formula) -> str:
    """The formula in one line, notes of all nodes behind it, each once."""
    notes = list(dict.fromkeys(_notes(node)))
    return _algebra(node) + (f" [{'; '.join(notes)}]" if notes else "")


def tree(node: Formula, indent: str = "") -> str:
    """The formula as an indented tree, one node a line."""
    here = {
        "sum": "Sum",
        "product": "Product",
        "transpose": "Transpose",
        "inverse": "Inverse",
        "scaled": f"{node.text} times",
        "selection": f"Submatrix {node.text}",
        "group": f"{node.text} of {len(node.children)}",
    }.get(node.kind, node.text)
    notes = f" [{'; '.join(node.notes)}]" if node.notes else ""
    return "\n".join([indent + here + notes, *(tree(child, indent + "  ") for child in node.children)])


def scalar_text(value: float | Tensor) -> str:
    """A scalar as the formula prints it: `1.0`, `0.001`, `2.5e-08`."""
    number = float(value.detach()) if isinstance(value, Tensor) else float(value)
    text = f"{number:.4g}"
    return text if any(sign in text for sign in ".en") else f"{text}.0"


def size_text(shape: Sequence[int | None]) -> str:
    """A shape as the formula prints it: `1,210×64`, `16` for 16×16, `?` where it takes a forward pass to know."""
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] is not None:
        return f"{shape[0]:,}"
    return times_text(shape)


def times_text(shape: Sequence[int | None]) -> str:
    """Sizes with a multiplication sign between them: `64×16`, also where they are equal."""
    return "×".join("?" if n is None else f"{n:,}" for n in shape)


def dtype_text(dtype: torch.dtype) -> str:
    """`float64` for `torch.float64`."""
    return str(dtype).removeprefix("torch.")


def _notes(node: Formula) -> list[str]:
    return [*node.notes, *(note for child in node.children for note in _notes(child))]


def _algebra(node: Formula) -> str:
    children = node.children
    if node.kind == "leaf":
        return node.text
    if node.kind == "group":
        shown = [_algebra(child) for child in children[:_SHOWN]] + ["..."] * (len(children) > _SHOWN)
        return f"{node.text}({len(children)}: {', '.join(shown)})"
    if node.kind == "inverse":
        return f"inverse({_algebra(children[0])})"
    if node.kind == "function":
        return f"{node.text}({_algebra(children[0])})"
    if node.kind == "selection":
        return f"{_operand(children[0], 4)}[{node.text}]"
    if node.kind == "transpose":
        return f"{_operand(children[0], 4)}.T"
    if node.kind == "scaled" and node.text == "-1.0" and children[0].text != "I":
        return f"-{_operand(children[0], 3)}"
    if node.kind == "scaled":
        return f"{node.text}·{_operand(children[0], 3)}"
    if node.kind == "product":
        return " @ ".join(_operand(child, 3) for child in children)
    terms = [_operand(child, 1) for child in children]
    return terms[0] + "".join(f" - {term[1:]}" if term.startswith("-") else f" + {term}" for term in terms[1:])


def _operand(node: Formula, binding: int) -> str:
    text = _algebra(node)
    return text if _BINDING.get(node.kind, 4) >= binding else f"({text})"
