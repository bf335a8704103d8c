"""What a block will be, as far as the module that owns the parameter tells; for `repr` before anything is computed.

What it turns out to be is decided by how the forward uses the parameter, not by this guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from curvops.curvature.structured.statistics import Fallback
from curvops.nets.parameters import ParameterSelection, unwrap
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal
from curvops.operators.formula import times_text
from curvops.operators.kronecker import Kronecker

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


class Expected(NamedTuple):
    """Class of the block, and what `repr` prints in its brackets."""

    kind: type[LinearOperator]
    label: str


def expected(model: nn.Module, selection: ParameterSelection, fallback: Fallback = "diag") -> list[Expected]:
    """The blocks that KFAC will probably have, one per parameter."""
    owners = [unwrap(model).get_submodule(name.rpartition(".")[0]) for name in selection.names]
    return [_expected(owner, shape, fallback) for owner, shape in zip(owners, selection.shapes, strict=True)]


def _expected(owner: nn.Module, shape: torch.Size, fallback: Fallback) -> Expected:
    exact = Expected(Dense if fallback == "full" else Diagonal, times_text([shape.numel()]))
    if isinstance(owner, _NORMS):
        return exact
    if len(shape) == 1:
        return Expected(Dense, times_text(shape))
    if isinstance(owner, nn.modules.conv._ConvNd):
        kernel = shape[2:].numel()
        sides = (shape[0], shape[1] * kernel)
        if owner.groups == 1:
            return Expected(Kronecker, times_text(sides))
        inner = (shape[0] // owner.groups, shape[1] * kernel)
        return Expected(BlockDiagonal, f"{owner.groups}: Kronecker({times_text(inner)}), ...")
    return Expected(Kronecker, times_text(shape)) if len(shape) == 2 else exact


def module_of(model: nn.Module, name: str) -> str:
    """Path and type of the module that owns a parameter."""
    path, _, _ = name.rpartition(".")
    return f"module {path or '(the model itself)'!r} ({type(unwrap(model).get_submodule(path)).__name__})"
