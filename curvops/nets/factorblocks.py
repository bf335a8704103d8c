"""Products of two parameters' per-example gradients, from their factors: the block of a curvature, and inner products.

Letters as in `factors`; p and q are the entries of the two parameters, Q and J the outputs and inputs of the second.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.nets.factors import Direct, Factors, Outer, Shift, slices


def block(left: Factors, right: Factors) -> Float[Tensor, "p q"]:
    """Σ_kn vec(G_kn) vec(H_kn)ᵀ, the block of two parameters; see `add_block`."""
    part = left.parts[0]
    like = part.rows if isinstance(part, Direct) else part.g
    total = like.new_zeros(left.size, right.size)
    add_block(total, left, right)
    return total


def add_block(total: Float[Tensor, "p q"], left: Factors, right: Factors) -> None:
    """Add Σ_kn vec(G_kn) vec(H_kn)ᵀ to `total` in place.

    Without weight sharing 2·B·p·q operations, whatever K: with M_n = Σ_k g_kn h_knᵀ the entry for outputs (o, o') and
    inputs (i, i') is Σ_n M_n[o, o'] a_n[i] b_n[i'], one product of an (O O') x B and a B x (I I') matrix. Otherwise
    2·K·B·p·q by the multiplied-out gradients. Temporaries are chunked over the examples and the outputs.
    """
    a, b = left.single, right.single
    if a is not None and b is not None and left.columns > 1:
        _add_single_block(total, a, b)
        return
    for rows in slices(left.batch, left.columns * (left.size + right.size)):
        G = left.examples(rows).per_example().flatten(0, 1)
        H = G if right is left else right.examples(rows).per_example().flatten(0, 1)
        total += G.T @ H


def gram(left: Factors, right: Factors) -> Float[Tensor, "B K D L"]:
    """⟨G_kn, H_lm⟩ for the B·K gradients of some examples and the D·L of others, of the same parameter.

    Without weight sharing the elementwise product of the inputs' and the output derivatives' inner products:
    O(BD(I + KLO)) operations; otherwise O(KBLD·p).
    """
    a, b = left.single, right.single
    if isinstance(a, Outer) and isinstance(b, Outer):
        inputs = a.a.flatten(1) @ b.a.flatten(1).T
        return _inner(a.g.flatten(2), b.g.flatten(2)).mul_(inputs[:, None, :, None])
    G = left.per_example()
    return _inner(G, G if right is left else right.per_example())


def _inner(G: Tensor, H: Tensor) -> Tensor:
    """`(K, B, p)` and `(L, D, p)` → `(B, K, D, L)`."""
    rows, columns = G.transpose(0, 1), H.transpose(0, 1)
    return (rows.flatten(0, 1) @ columns.flatten(0, 1).T).reshape(*rows.shape[:2], *columns.shape[:2])


def _add_single_block(total: Tensor, a: Outer | Shift, b: Outer | Shift) -> None:
    ones = a.g.new_ones(a.g.shape[1], 1)
    x = a.a.flatten(1) if isinstance(a, Outer) else ones
    y = b.a.flatten(1) if isinstance(b, Outer) else ones
    O, Q, I, J = a.g.shape[-1], b.g.shape[-1], x.shape[1], y.shape[1]
    # The block as (O, I, Q, J), whichever of its axes comes first in memory.
    view = (
        total.unflatten(1, (J, Q)).transpose(1, 2) if isinstance(b, Outer) and b.flipped else total.unflatten(1, (Q, J))
    )
    flipped = isinstance(a, Outer) and a.flipped
    view = view.unflatten(0, (I, O)).transpose(0, 1) if flipped else view.unflatten(0, (O, I))
    for rows in slices(len(x), max(O * Q, I * J)):
        g, h = a.g[:, rows].flatten(2), b.g[:, rows].flatten(2)  # (K, B, O), (K, B, Q)
        M = torch.bmm(g.permute(1, 2, 0), h.transpose(0, 1))  # (B, O, Q)
        inputs = (x[rows].unsqueeze(2) * y[rows].unsqueeze(1)).flatten(1)  # (B, I·J)
        for outputs in slices(O, Q * I * J):
            entries = M[:, outputs].flatten(1).T @ inputs
            view[outputs] += entries.reshape(-1, Q, I, J).transpose(1, 2)
