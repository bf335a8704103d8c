"""Elementwise functions whose derivative costs as much as many products: it is computed once and kept.

y = φ(x) ,   u → φ′(x) u ,   dx → φ′(x) dx

Kept in the place of x, it takes no more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from curvops.nets.adjoint import constants, is_plain, once, zeros


def smooth(apply: Callable[..., Any]) -> dict[Callable[..., Tensor], Callable[..., Tensor]]:
    """PyTorch's smooth activations → the same by `apply(x, φ, φ′)`, where a layer of ours may run."""

    def gelu(input: Tensor, approximate: str = "none") -> Tensor:
        if not is_plain([input]):
            return F.gelu(input, approximate=approximate)

        def slope(x: Tensor) -> Tensor:
            return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)

        return apply(input, lambda x: F.gelu(x, approximate=approximate), slope)

    def silu(input: Tensor, inplace: bool = False) -> Tensor:
        if inplace or not is_plain([input]):
            return F.silu(input, inplace)

        def slope(x: Tensor) -> Tensor:
            p = x.sigmoid()
            return p * (1 + x * (1 - p))

        return apply(input, F.silu, slope)

    return {F.gelu: gelu, F.silu: silu}


class Elementwise(Function):
    """φ(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(derivative(x))
        return function(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (slope,) = cotangents, constants(ctx)
        return (_Scaled.apply(u, slope) if torch.is_grad_enabled() else u * slope), None, None


class _Scaled(Function):
    """`u → φ′ u`, recorded at u = 0."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return zeros(u, u.shape)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        return tangents[0] * constants(ctx)[0], None
