"""Layers whose adjoint is differentiated once more, in its cotangent alone: what a Jacobian product needs, no more.

Double backward gets `J v` by differentiating `u → Jᵀu` in u. PyTorch's double backward of a convolution or a BatchNorm
computes the derivatives in its input and its weight as well, wanted or not, which doubles the work. Here the adjoint of
a layer holds input and weight as constants:

    y = W x + b ,   u → (Wᵀ u, u xᵀ, u) ,   (dx, dW, db) → W dx + dW x + db

The adjoint's values are never needed, only its graph, which is recorded at u = 0: there every value is zero, and
nothing is computed for it. Second derivatives in x and W do not exist on such a graph: it is for Jacobians; Hessians
run on PyTorch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from curvops.errors import UnsupportedError
from curvops.nets.linear import is_plain, linear_adjoint
from curvops.nets.matmul import matmul

_Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""stride, padding, dilation, groups"""


class LeanLayers(TorchFunctionMode):
    """Runs `F.linear`, `F.conv1d … 3d` and `F.batch_norm` by running statistics as the functions of this module.

    Where no gradient is needed, or in a form that they do not cover, PyTorch's own run.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return _convolution(func, _CONVOLUTIONS[func], *args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _lean(input, weight, bias) or weight.dim() != 2:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)  # type: ignore[return-value]


def _convolution(
    stock: Callable[..., Tensor],
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    # An unbatched image, or padding that need not be symmetric: PyTorch's own layer, which is right but not lean.
    if not _lean(input, weight, bias) or isinstance(padding, str) or input.dim() != dimensions + 2:
        return stock(input, weight, bias, stride, padding, dilation, groups)
    per_axis = [tuple(s) if len(s) > 1 else tuple(s) * dimensions for s in map(_sequence, (stride, padding, dilation))]
    return _Convolution.apply(input, weight, bias, (*per_axis, groups))  # type: ignore[return-value]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    buffers = running_mean is not None and running_var is not None
    if training or not buffers or weight is None or bias is None or not _lean(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[return-value]


def _sequence(value: int | Sequence[int]) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value


def _lean(*tensors: Tensor | None) -> bool:
    return is_plain([t for t in tensors if t is not None])


_CONVOLUTIONS: dict[Callable[..., Tensor], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Linear(Function):
    """`x Wᵀ + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W if ctx.needs_input_grad[0] else None)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, W = _constants(ctx)
        if torch.is_grad_enabled():
            return _LinearAdjoint.apply(u, x, W, ctx.needs_input_grad[2])
        return linear_adjoint(u, x, W, ctx.needs_input_grad[2])


class _LinearAdjoint(Function):
    """`u → (u W, uᵀ x, Σ u)`, recorded at u = 0."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor | None, W: Tensor | None, bias: bool) -> Any:
        ctx.save_for_backward(x, W)
        ctx.set_materialize_grads(False)
        ctx.shape = u.shape
        return (
            None if W is None else _zeros(u, (*u.shape[:-1], W.shape[1])),
            None if x is None else _zeros(u, (u.shape[-1], x.shape[-1])),
            _zeros(u, u.shape[-1:]) if bias else None,
        )

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        _once()
        dx, dW, db = tangents
        x, W = _constants(ctx)
        dy = None
        if dx is not None:
            assert W is not None
            dy = matmul(dx, W.t())
        if dW is not None:
            assert x is not None
            dy = _sum(dy, matmul(x, dW.t()))
        if db is not None:
            dy = db.expand(ctx.shape) if dy is None else dy + db
        return dy, None, None, None


class _Convolution(Function):
    """`W * x + b` with `settings`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, settings: _Settings) -> Tensor:
        # Shapes of both are needed on either way; keeping the weight costs nothing, keeping the input does.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        ctx.settings, ctx.shape, ctx.bias = settings, x.shape, ctx.needs_input_grad[2]
        return _convolve(x, W, b, settings)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, W = _constants(ctx)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias)
        if torch.is_grad_enabled():
            adjoint: Any = _ConvolutionAdjoint.apply(u, x, W, ctx.shape, ctx.settings, wanted)
        else:
            adjoint = _convolution_adjoint(u, x, W, ctx.shape, ctx.settings, wanted)
        return (*adjoint, None)


class _ConvolutionAdjoint(Function):
    """The correlations of the cotangent u with W and with x, and its sums; recorded at u = 0."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor | None, W: Tensor, shape: torch.Size, settings: _Settings, wanted: Any
    ) -> Any:
        ctx.save_for_backward(x, W)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, u.shape
        return (
            _zeros(u, shape) if wanted[0] else None,
            _zeros(u, W.shape) if wanted[1] else None,
            _zeros(u, W.shape[:1]) if wanted[2] else None,
        )

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        _once()
        dx, dW, db = tangents
        x, W = _constants(ctx)
        dy = None
        if dx is not None:
            assert W is not None
            dy = _convolve(dx, W, None, ctx.settings)
        if dW is not None:
            assert x is not None
            dy = _sum(dy, _convolve(x, dW, None, ctx.settings))
        if db is not None:
            column = db.reshape(-1, *([1] * (len(ctx.shape) - 2)))
            dy = column.expand(ctx.shape) if dy is None else dy + column
        return dy, None, None, None, None, None


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
            adjoint = torch.ops.aten.native_batch_norm_backward(
                u, x, weight, mean, var, None, None, False, ctx.eps, list(wanted)
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
        return tuple(_zeros(u, shape) if want else None for shape, want in zip(shapes, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        _once()
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


def _convolve(x: Tensor, W: Tensor, b: Tensor | None, settings: _Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, W, b, stride, padding, dilation, False, (0,) * len(stride), groups)


def _convolution_adjoint(
    u: Tensor, x: Tensor | None, W: Tensor, shape: torch.Size, settings: _Settings, wanted: Any
) -> Any:
    stride, padding, dilation, groups = settings
    sizes = [W.shape[0]] if wanted[2] else None
    return torch.ops.aten.convolution_backward(
        u, W.new_empty(1).expand(shape) if x is None else x, W, sizes,
        stride, padding, dilation, False, [0] * len(stride), groups, list(wanted),
    )  # fmt: skip


def _constants(ctx: Any) -> tuple[Any, Any]:
    """Input and weight cut off the graph; reading them checks that nobody has written to them since."""
    x, W = ctx.saved_tensors
    return (None if x is None else x.detach()), (None if W is None else W.detach())


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros that take the memory of one number."""
    return like.new_zeros(1).expand(shape)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _once() -> None:
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "this graph is for products with a Jacobian and differentiates no further; take HessianProduct for second "
            "derivatives"
        )
