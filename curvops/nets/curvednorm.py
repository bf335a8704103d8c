"""Layer norm with its second derivatives in a dozen kernels, where PyTorch takes six dozen.

y = γ x̂ + β ,   x̂ = (x − μ) r ,   r = (var + ε)^-½ ,   ⟨·⟩ the mean over a row's D entries

N dx = r (dx − ⟨dx⟩ − x̂ ⟨x̂ dx⟩) = dx̂ ,  symmetric ,   dr = −r² ⟨x̂ dx⟩

The adjoint, with g = γ u, is u → (N g, Σ x̂ u, Σ u). For cotangents (a, b, c) of its three parts, with p = N g, its
derivative in u is γ N a + x̂ b + c, in γ it is Σ u N a, and in x

N (b u) − r ⟨x̂ g⟩ N a − r ⟨x̂ a⟩ p − r ⟨a p⟩ x̂ ,

as (a, N g) = D r (⟨a g⟩ − ⟨a⟩⟨g⟩ − ⟨x̂ a⟩⟨x̂ g⟩) depends on x through r and x̂ alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from curvops.nets.adjoint import no_further, plus

_backward = torch.ops.aten.native_layer_norm_backward


class CurvedLayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: list[int], eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, axes, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.axes, ctx.eps = axes, eps
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (x, weight, mean, rstd), wanted = cotangents, ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            adjoint: Any = _Adjoint.apply(u, x, weight, mean, rstd, ctx.axes, ctx.eps, wanted)
        else:
            adjoint = _backward(u, x, ctx.axes, mean, rstd, weight, weight, list(wanted))
        return (*adjoint, None, None)


class _Adjoint(Function):
    """`u → (N (γ u), Σ x̂ u, Σ u)`, a function of u, x and γ."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, axes: list[int], eps: float,
        wanted: Any,
    ) -> Any:  # fmt: skip
        parts = _backward(u, x, axes, mean, rstd, weight, weight, list(wanted))
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.eps = axes, eps
        kept = (None, None)
        if wanted[0]:
            within = tuple(range(-len(axes), 0))
            inner = (F.layer_norm(x, axes, eps=eps) * (u if weight is None else weight * u)).mean(within, keepdim=True)
            kept = (parts[0].clone(), rstd * inner)
        ctx.save_for_backward(u, x, weight, mean, rstd, *kept)
        return tuple(part if want else None for part, want in zip(parts, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        no_further()
        a, b, c = tangents
        u, x, weight, mean, rstd, p, r_xg = ctx.saved_tensors
        axes, only = ctx.axes, [True, False, False]
        _, to_x, to_weight = ctx.needs_input_grad[:3]

        def N(dx: Tensor) -> Tensor:
            return _backward(dx, x, axes, mean, rstd, None, None, only)[0]

        du = dx = dweight = None
        if b is not None:
            du = F.layer_norm(x, axes, b, c, ctx.eps)
        elif c is not None:
            du = c.expand(u.shape)
        if b is not None and to_x:
            dx = N(b * u)
        if a is not None:
            Na = N(a)
            du = plus(du, Na) if weight is None else weight * Na if du is None else torch.addcmul(du, Na, weight)
            if to_weight:
                before = tuple(range(u.dim() - len(axes)))
                dweight = (u * Na).sum(before) if before else u * Na
            if to_x:
                within = tuple(range(-len(axes), 0))
                x_hat = F.layer_norm(x, axes, eps=ctx.eps)
                r_xa = rstd * (x_hat * a).mean(within, keepdim=True)
                r_ap = rstd * (a * p).mean(within, keepdim=True)
                along = r_xg * Na
                dx = -along if dx is None else dx - along
                dx = torch.addcmul(torch.addcmul(dx, r_xa, p, value=-1), r_ap, x_hat, value=-1)
        return du, dx, dweight, None, None, None, None, None
