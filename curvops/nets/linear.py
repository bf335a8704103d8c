"""Linear layers with every derivative that a Hessian product needs, on the matrix products of `matmul`.

y = x Wᵀ + b ,   u → (u W, uᵀ x, Σ u) ,
(a, B, c) → (a Wᵀ + x Bᵀ + c, u B, uᵀ a)   the derivative of the adjoint in (u, x, W)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from curvops.errors import UnsupportedError
from curvops.nets.adjoint import is_plain
from curvops.nets.matmul import matmul, onednn_is_faster


class FastLinear(TorchFunctionMode):
    """Runs `F.linear` as the functions of this module, where `matmul` may be faster than PyTorch's product."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and onednn_is_faster():
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_plain([input, weight, bias]) or weight.dim() != 2 or weight.dtype != torch.float32:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)  # type: ignore[return-value]


def linear_adjoint(
    u: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    bias: bool,
    to_weight: Tensor | None = None,
    to_bias: Tensor | None = None,
) -> Any:
    """`(u W, uᵀ x, Σ u)`, summed over all axes but the last; None where x or W is.

    The last two are written to the tensors that are given for them.
    """
    rows = u.reshape(-1, u.shape[-1])
    return (
        None if W is None else matmul(u, W),
        None if x is None else matmul(rows.t(), x.reshape(-1, x.shape[-1]), out=to_weight),
        torch.sum(rows, 0, out=to_bias) if bias else None,
    )


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, W = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _Adjoint.apply(u, x, W, wanted)
        return linear_adjoint(u, x if wanted[1] else None, W if wanted[0] else None, wanted[2])


class _Adjoint(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, W: Tensor, wanted: Any) -> Any:
        ctx.save_for_backward(u, x, W)
        ctx.set_materialize_grads(False)
        return linear_adjoint(u, x if wanted[1] else None, W if wanted[0] else None, wanted[2])

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError("this graph is for Hessian products and differentiates no further")
        a, B, c = tangents
        u, x, W = (t.detach() for t in ctx.saved_tensors)
        terms = [] if a is None else [matmul(a, W.t())]
        if B is not None:
            terms.append(matmul(x, B.t()))
        du = sum(terms[1:], terms[0]) if terms else None
        if c is not None:
            du = c.expand(u.shape) if du is None else du + c
        dx = matmul(u, B) if B is not None and ctx.needs_input_grad[1] else None
        dW = None
        if a is not None and ctx.needs_input_grad[2]:
            dW = matmul(u.reshape(-1, u.shape[-1]).t(), a.reshape(-1, a.shape[-1]))
        return du, dx, dW, None
