"""Linear layers with every derivative that a Hessian product needs, on the matrix products of `matmul`.

y = x Wᵀ + b ,   u → (u W, uᵀ x, Σ u) ,
(a, B, c) → (a Wᵀ + x Bᵀ + c, u B, uᵀ a)   the derivative of the adjoint in (u, x, W)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from curvops.nets.adjoint import batched, is_plain, no_further, unviewed
from curvops.nets.matmul import matmul, with_product
from curvops.nets.rows import Rows


def linear(rows: Rows | None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, twice differentiable and no further; gradients are written to `rows`."""
    if not is_plain([input, weight, bias]) or weight.dim() != 2:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, rows)  # type: ignore[return-value]


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
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, rows: Rows | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.rows, ctx.places = rows, None if rows is None else (rows.place(W), rows.place(b))
        return unviewed(F.linear(x, W, b))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,) = cotangents
        x, W = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_Adjoint.apply(u, x, W, wanted), None  # type: ignore[misc]
        places = claimed(ctx, u)
        return *linear_adjoint(u, x if wanted[1] else None, W if wanted[0] else None, wanted[2], *places), None


def claimed(ctx: Any, u: Tensor) -> Any:
    """Where weight and bias of a layer have their gradients written, if anywhere."""
    if ctx.rows is None or batched(u):
        return None, None
    return tuple(ctx.rows.claim(place) for place in ctx.places)


class _Adjoint(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, W: Tensor, wanted: Any) -> Any:
        ctx.save_for_backward(u, x, W)
        ctx.set_materialize_grads(False)
        return linear_adjoint(u, x if wanted[1] else None, W if wanted[0] else None, wanted[2])

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        no_further()
        a, B, c = tangents
        u, x, W = ctx.saved_tensors
        du = c if B is None else with_product(c, x, B.t())
        if a is not None:
            du = with_product(du, a, W.t(), in_place=B is not None)
        if a is None and B is None and c is not None:
            du = c.expand(u.shape)
        dx = matmul(u, B) if B is not None and ctx.needs_input_grad[1] else None
        dW = None
        if a is not None and ctx.needs_input_grad[2]:
            dW = matmul(u.reshape(-1, u.shape[-1]).t(), a.reshape(-1, a.shape[-1]))
        return du, dx, dW, None
