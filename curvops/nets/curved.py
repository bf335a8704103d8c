"""Layers for Hessian products: every second derivative, and none of it computed in each product that can be kept.

y = φ(x) ,   u → φ′(x) u ,   (a, for the cotangent a of that) → (φ′(x) a, φ″(x) u a)

φ′ and φ″ u are known when the graph is built, while PyTorch computes φ″ of a GELU from x in each product, which takes
as long as the matrix products around it. A ReLU has no φ″, where PyTorch fills and adds zeros. Linear layers are in
`linear`, layer norm in `curvednorm`; other layers are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from curvops.nets.adjoint import is_plain, no_further
from curvops.nets.curvednorm import CurvedLayerNorm
from curvops.nets.elementwise import smooth
from curvops.nets.linear import linear
from curvops.nets.normalisation import layer_norm_by
from curvops.nets.rows import Rows


class CurvedLayers(TorchFunctionMode):
    """Runs linear layers and the functions of this module as functions that know their second derivatives.

    Args:
        rows: Where the gradients of linear layers are written; None for memory of their own.
    """

    def __init__(self, rows: Rows | None = None) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return linear(self._rows, *args, **kwargs)
        return _CURVED.get(func, func)(*args, **kwargs)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace or not is_plain([input]):
        return F.relu(input, inplace)
    return _ReLU.apply(input)  # type: ignore[return-value]


class _Smooth(Function):
    """φ(x), from φ and φ′."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, slope(x))
        ctx.slope = slope
        return function(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (x, first) = cotangents, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return u * first, None, None
        point = x.detach().requires_grad_()
        value = ctx.slope(point)
        (second,) = torch.autograd.grad(value, point, torch.ones_like(value))
        return _Slope.apply(u, x, first, second), None, None


class _Slope(Function):
    """`φ′(x) u`, a function of u and x."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second * u)
        return u * first

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        no_further()
        (a,), (first, second_u) = tangents, ctx.saved_tensors
        return a * first, a * second_u if ctx.needs_input_grad[1] else None, None, None


class _ReLU(Function):
    """max(0, x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (y,) = cotangents, ctx.saved_tensors
        return _Masked.apply(u, y.detach()) if torch.is_grad_enabled() else _masked(u, y)


class _Masked(Function):
    """u where y > 0, else zero; a function of u alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return _masked(u, y)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        no_further()
        return _masked(tangents[0], ctx.saved_tensors[0]), None


def _masked(u: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(u, y, 0)


_CURVED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.layer_norm: layer_norm_by(CurvedLayerNorm.apply),
    **smooth(_Smooth.apply),
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
}
