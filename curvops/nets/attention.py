"""Scaled dot-product attention, its adjoint and its tangents: four matrix products each.

S = s Q Kᵀ (+ mask) ,   A = softmax(S) ,   y = A V ,   D g = A ∘ (g − ⟨A, g⟩)   the softmax's derivative, symmetric

u → (s (D uVᵀ) K, s (D uVᵀ)ᵀ Q, Aᵀ u) ,   (dQ, dK, dV) → D(s (dQ Kᵀ + Q dKᵀ)) V + A dV
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from curvops.nets.adjoint import batched, constants, is_plain, once, plus, unviewed, zeros


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `F.scaled_dot_product_attention`."""
    fixed = attn_mask is None or not attn_mask.requires_grad
    heads = query.dim() > 2 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not (is_plain([query, key, value]) and fixed and heads) or dropout_p != 0.0 or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
    return Attention.apply(query, key, value, attn_mask, is_causal, scale)  # type: ignore[return-value]


class Attention(Function):
    """`softmax(s Q Kᵀ + mask) V`. Saved with one axis for all heads: `(heads, T, E)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Tensor:
        # The formula that PyTorch itself differentiates, rows that are masked throughout included.
        y, A = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, 0.0, is_causal, None, scale=scale)
        s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        ctx.save_for_backward(_heads(q) * s, _heads(k) * s, _heads(v), _heads(A))
        ctx.shapes = (q.shape, k.shape, v.shape)
        return unviewed(y)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (u,), (q, k, v, A), wanted = cotangents, constants(ctx), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            adjoint: Any = _AttentionAdjoint.apply(u, q, k, v, A, ctx.shapes, wanted)
        else:
            u = _heads(u)
            dS = _softmax(u @ v.mT, A) if wanted[0] or wanted[1] else None
            adjoint = (
                (dS @ k).view(ctx.shapes[0]) if wanted[0] and dS is not None else None,
                (dS.mT @ q).view(ctx.shapes[1]) if wanted[1] and dS is not None else None,
                (A.mT @ u).view(ctx.shapes[2]) if wanted[2] else None,
            )
        return (*adjoint, None, None, None)


class _AttentionAdjoint(Function):
    """`u → (s (D uVᵀ) K, s (D uVᵀ)ᵀ Q, Aᵀ u)`, recorded at u = 0."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, q: Tensor, k: Tensor, v: Tensor, A: Tensor, shapes: Any, wanted: Any) -> Any:
        ctx.save_for_backward(q, k, v, A)
        ctx.set_materialize_grads(False)
        ctx.shape = u.shape
        return tuple(zeros(u, shape) if want else None for shape, want in zip(shapes, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        once()
        dq, dk, dv = (None if t is None else _heads(t) for t in tangents)
        q, k, v, A = constants(ctx)
        dS = None if dq is None else dq @ k.mT
        if dk is not None:
            dS = _with_product(dS, q, dk.mT)
        dy = None if dS is None else _softmax(dS, A) @ v
        if dv is not None:
            dy = _with_product(dy, A, dv)
        return None if dy is None else dy.view(ctx.shape), None, None, None, None, None, None


def _heads(t: Tensor) -> Tensor:
    return t.reshape(-1, *t.shape[-2:])


def _softmax(g: Tensor, A: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(g, A, -1, A.dtype)


def _with_product(sum_: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`sum_ + a b`, in place where that is possible."""
    if sum_ is None or batched(sum_, a, b):
        return plus(sum_, a @ b)
    return sum_.baddbmm_(a, b)
