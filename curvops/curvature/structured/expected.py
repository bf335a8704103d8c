"""What a block will be, as far as the module that owns the parameter tells; for `repr` before anything is computed.

What it turns out to be is decided by how the forward uses the parameter, not by this guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from curvops.curvature.structured.statistics import Fallback
from curvops.curvature.structured.units import Unit
from curvops.nets.parameters import ParameterSelection, unwrap
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal
from curvops.operators.formula import times_text
from curvops.operators.kronecker import Kronecker
from curvops.operators.permuted import Permuted

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


class Expected(NamedTuple):
    """Class of the block, what `repr` prints in its brackets, and the block's size as text."""

    kind: type[LinearOperator]
    label: str
    size: str


def expected(model: nn.Module, selection: ParameterSelection, units: list[Unit], fallback: Fallback) -> list[Expected]:
    """The blocks that KFAC will probably have, one per unit."""
    guesses = []
    modules = dict(unwrap(model).named_modules(remove_duplicate=False))
    for unit in units:
        i = unit.positions[0]
        owner = modules.get(selection.names[i].rpartition(".")[0])  # none if it was taken out of the model since
        shape = selection.shapes[i]
        if unit.is_joint:
            shape = torch.Size((shape[0], shape[1:].numel() + 1))
        kind, label = _expected(owner, shape, fallback)
        if unit.is_joint:
            kind, label = Permuted, f"{kind.__name__}({label})"
        guesses.append(Expected(kind, label, times_text([unit.size])))
    return guesses


def _expected(owner: nn.Module | None, shape: torch.Size, fallback: Fallback) -> tuple[type[LinearOperator], str]:
    exact = Dense if fallback == "full" else Diagonal, times_text([shape.numel()])
    if isinstance(owner, _NORMS):
        return exact
    if len(shape) == 1:
        return Dense, times_text(shape)
    if isinstance(owner, nn.modules.conv._ConvNd):
        kernel = shape[2:].numel()
        sides = (shape[0], shape[1] * kernel)
        if owner.groups == 1:
            return Kronecker, times_text(sides)
        inner = (shape[0] // owner.groups, shape[1] * kernel)
        return BlockDiagonal, f"{owner.groups}: Kronecker({times_text(inner)}), ..."
    return (Kronecker, times_text(shape)) if len(shape) == 2 else exact


def module_of(model: nn.Module, name: str) -> str:
    """Path and type of the module that owns a parameter."""
    path, _, _ = name.rpartition(".")
    return f"module {path or '(the model itself)'!r} ({type(unwrap(model).get_submodule(path)).__name__})"
