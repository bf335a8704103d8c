"""Normalisation, its adjoint and its tangents in fused kernels.

y = γ x̂ + β ,   x̂ = (x − μ)/σ

Layer norm, with the projection `N dx = (dx − mean(dx) − x̂ mean(x̂ dx))/σ`, which is symmetric:

u → (N (γ u), Σ x̂ u, Σ u) ,   (dx, dγ, dβ) → γ N dx + x̂ dγ + dβ

BatchNorm by running statistics: `N dx = dx/σ`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from curvops.nets.adjoint import constants, is_plain, once, zeros


def layer_norm_by(apply: Callable[..., Any]) -> Callable[..., Tensor]:
    """`F.layer_norm` by `apply(x, weight, bias, axes, eps)`, where a layer of ours may run."""

    def layer_norm(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        if not is_plain([input, weight, bias]) or (weight is None and bias is not None):
            return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
        return apply(input, weight, bias, list(normalized_shape), eps)

    return layer_norm


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `F.batch_norm`."""
    buffers = running_mean is not None and running_var is not None
    known = buffers and weight is not None and bias is not None and not training
    # The kernel behind our backward divides by zero where there is no entry: none of the batch was sent here.
    if not known or input.numel() == 0 or not is_plain([input, weight, bias]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[return-value]


class LayerNorm(Function):
    """`γ (x − μ)/σ + β` over the last axes, with μ and σ of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: list[int], eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, axes, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.axes, ctx.eps = axes, eps
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (x, weight, mean, rstd), wanted = cotangents, constants(ctx), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            adjoint: Any = _LayerNormAdjoint.apply(u, x, weight, mean, rstd, ctx.axes, ctx.eps, wanted)
        else:
            # Without a weight PyTorch's kernel wants no bias either.
            bias = None if weight is None else weight
            adjoint = torch.ops.aten.native_layer_norm_backward(u, x, ctx.axes, mean, rstd, weight, bias, list(wanted))
        return (*adjoint, None, None)


class _LayerNormAdjoint(Function):
    """`u → (N (γ u), Σ x̂ u, Σ u)`, recorded at u = 0."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, axes: list[int], eps: float,
        wanted: Any,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.eps = axes, eps
        shapes = (u.shape, axes, axes)
        return tuple(zeros(u, shape) if want else None for shape, want in zip(shapes, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        dx, dweight, dbias = tangents
        x, weight, mean, rstd = constants(ctx)
        dy = None
        if dweight is not None:
            dy = F.layer_norm(x, ctx.axes, dweight, dbias, ctx.eps)
        elif dbias is not None:
            dy = dbias.expand(x.shape)
        if dx is not None:
            only = [True, False, False]
            Ndx = torch.ops.aten.native_layer_norm_backward(dx, x, ctx.axes, mean, rstd, None, None, only)[0]
            if weight is None:
                dy = Ndx if dy is None else dy + Ndx
            else:
                dy = Ndx * weight if dy is None else torch.addcmul(dy, Ndx, weight)
        return dy, None, None, None, None, None, None, None


class _BatchNorm(Function):
    """`γ (x − μ)/σ + β` per channel, μ and σ² = var + ε constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mean, var)
        ctx.eps, ctx.shape = eps, x.shape
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, weight, mean, var = (None if t is None else t.detach() for t in ctx.saved_tensors)
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            adjoint: Any = _BatchNormAdjoint.apply(u, x, weight, mean, var, ctx.eps, wanted)
        else:
            x = u if x is None else x
            # The kernels of accelerators read the statistics as the forward saved them, those of processors anew.
            saved = (None, None) if u.device.type == "cpu" else (mean, (var + ctx.eps).rsqrt())
            adjoint = torch.ops.aten.native_batch_norm_backward(
                u, x, weight, mean, var, *saved, False, ctx.eps, list(wanted)
            )
        return (*adjoint, None, None, None)


class _BatchNormAdjoint(Function):
    """`u → (γ/σ u, Σ u (x − μ)/σ, Σ u)`, recorded at u = 0."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor | None, weight: Tensor, mean: Tensor, var: Tensor, eps: float, wanted: Any
    ) -> Any:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.shape = eps, u.shape
        shapes = (u.shape, weight.shape, weight.shape)
        return tuple(zeros(u, shape) if want else None for shape, want in zip(shapes, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        dx, dweight, dbias = tangents
        x, weight, mean, var = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()

        def channels(t: Tensor) -> Tensor:
            return t.reshape(-1, *([1] * (len(ctx.shape) - 2)))

        constant, dy = dbias, None
        if dweight is not None:
            constant = -mean * rstd * dweight if constant is None else constant - mean * rstd * dweight
        if constant is not None:
            dy = channels(constant).expand(ctx.shape)
        if dx is not None:
            scale = channels(weight * rstd)
            dy = dx * scale if dy is None else torch.addcmul(dy, dx, scale)
        if dweight is not None:
            assert dy is not None
            dy = torch.addcmul(dy, x, channels(rstd * dweight))
        return dy, None, None, None, None, None, None
