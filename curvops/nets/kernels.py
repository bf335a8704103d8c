"""Layers whose adjoint is differentiated once more, in its cotangent alone: what a Jacobian product needs, no more.

Double backward gets `J v` by differentiating `u → Jᵀu` in u. PyTorch's double backward of a convolution or of a
normalisation computes the derivatives in its input and its weight as well, wanted or not, which doubles the work. Here
the adjoint of a layer holds input and weight as constants:

    y = W x + b ,   u → (Wᵀ u, u xᵀ, u) ,   (dx, dW, db) → W dx + dW x + db

The adjoint's values are never needed, only its graph, which is recorded at u = 0: there every value is zero, and
nothing is computed for it. Second derivatives in x and W do not exist on such a graph: it is for Jacobians; Hessians
run on PyTorch's own layers. Linear layers and convolutions are here, the others in the modules that are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from curvops.nets.adjoint import batched, constants, is_plain, once, plus, unviewed, zeros
from curvops.nets.attention import attention
from curvops.nets.elementwise import Elementwise, smooth
from curvops.nets.linear import claimed, linear_adjoint
from curvops.nets.matmul import with_product
from curvops.nets.normalisation import LayerNorm, batch_norm, layer_norm_by
from curvops.nets.rows import Rows

_Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""stride, padding, dilation, groups"""


class LeanLayers(TorchFunctionMode):
    """Runs the layers of `_LEAN`, linear layers and convolutions as functions of this library.

    Where no gradient is needed, or in a form that they do not cover, PyTorch's own run.

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
            return _linear(self._rows, *args, **kwargs)
        if func in _CONVOLUTIONS:
            return _convolution(func, _CONVOLUTIONS[func], *args, **kwargs)
        return _LEAN.get(func, func)(*args, **kwargs)


class LeanFunctions(TorchFunctionMode):
    """Runs what has no parameters, and a derivative that is dear, as functions of this library: attention, GELU, SiLU.

    For graphs that many cotangents pass over, and whose layers must be PyTorch's own.

    Attributes:
        hooks: Whether what ran put a hook on a tensor, which may change gradients on their way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooks = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.hooks = self.hooks or func is Tensor.register_hook
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def _linear(rows: Rows | None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_plain([input, weight, bias]) or weight.dim() != 2:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, rows)  # type: ignore[return-value]


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
    if not is_plain([input, weight, bias]) or isinstance(padding, str) or input.dim() != dimensions + 2:
        return stock(input, weight, bias, stride, padding, dilation, groups)
    per_axis = [tuple(s) if len(s) > 1 else tuple(s) * dimensions for s in map(_sequence, (stride, padding, dilation))]
    return _Convolution.apply(input, weight, bias, (*per_axis, groups))  # type: ignore[return-value]


def _sequence(value: int | Sequence[int]) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value


_CONVOLUTIONS: dict[Callable[..., Tensor], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_FUNCTIONS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    **smooth(Elementwise.apply),
    F.scaled_dot_product_attention: attention,
}
_LEAN: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm_by(LayerNorm.apply),
    **_FUNCTIONS,
}


class _Linear(Function):
    """`x Wᵀ + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, rows: Rows | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W if ctx.needs_input_grad[0] else None)
        ctx.rows, ctx.places = rows, None if rows is None else (rows.place(W), rows.place(b))
        return unviewed(F.linear(x, W, b))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, W = constants(ctx)
        if torch.is_grad_enabled():
            return *_LinearAdjoint.apply(u, x, W, ctx.needs_input_grad[2]), None  # type: ignore[misc]
        return *linear_adjoint(u, x, W, ctx.needs_input_grad[2], *claimed(ctx, u)), None


class _LinearAdjoint(Function):
    """`u → (u W, uᵀ x, Σ u)`, recorded at u = 0."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor | None, W: Tensor | None, bias: bool) -> Any:
        ctx.save_for_backward(x, W)
        ctx.set_materialize_grads(False)
        ctx.shape = u.shape
        return (
            None if W is None else zeros(u, (*u.shape[:-1], W.shape[1])),
            None if x is None else zeros(u, (u.shape[-1], x.shape[-1])),
            zeros(u, u.shape[-1:]) if bias else None,
        )

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        dx, dW, db = tangents
        x, W = constants(ctx)
        dy = db
        if dW is not None:
            assert x is not None
            dy = with_product(dy, x, dW.t())
        if dx is not None:
            assert W is not None
            dy = with_product(dy, dx, W.t(), in_place=dW is not None)
        if dW is None and dx is None and db is not None:
            dy = db.expand(ctx.shape)
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
        x, W = constants(ctx)
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
            zeros(u, shape) if wanted[0] else None,
            zeros(u, W.shape) if wanted[1] else None,
            zeros(u, W.shape[:1]) if wanted[2] else None,
        )

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        dx, dW, db = tangents
        x, W = constants(ctx)
        dy = None
        if dx is not None:
            assert W is not None
            dy = _convolve(dx, W, None, ctx.settings)
        if dW is not None:
            assert x is not None
            # The bias goes along, which saves a pass over the outputs.
            along = None if batched(dW, db) else db
            dy = plus(dy, _convolve(x, dW, along, ctx.settings))
            db = db if along is None else None
        if db is not None:
            column = db.reshape(-1, *([1] * (len(ctx.shape) - 2)))
            dy = column.expand(ctx.shape) if dy is None else dy + column
        return dy, None, None, None, None, None


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
