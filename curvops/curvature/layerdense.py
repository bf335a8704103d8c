"""Dense matrices from the layers' factors: the GGN itself, and its Gram matrix in function space.

Without weight sharing both cost as if the network had one output: `Σ_k g_k h_kᵀ` and inner products of inputs are made
once for all columns. With it, per-example gradients are multiplied out, and column products may be cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.cotangents import Cotangents
from curvops.curvature.layerpass import LayerPass, Step
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.nets.capture import DependentExamplesError
from curvops.nets.factors import Factors, add_block, gram

TILE = 2048
"""Rows of a tile of the Gram matrix."""


def dense_from_layers(curvature: GaussNewton) -> Float[Tensor, "P P"] | None:
    """The dense matrix of `Σ Jᵀ Λ J`, or None where column products are expected to be cheaper or no root is known.

    Cost: one pass and 2·N·P² operations without weight sharing, 2·N·K·P² with K = C (or T·C) columns otherwise.
    """
    cotangents = Cotangents.like(curvature)
    if cotangents is None:
        return None
    objective = curvature.objective
    sizes = objective.selection.sizes
    full = objective.selection.full_size
    M = torch.zeros(full, full, dtype=curvature.dtype, device=curvature.device)
    with torch.no_grad():
        try:
            for step in LayerPass(objective, cotangents, together=True, report_unused=False):
                if not _pays(step, sizes):
                    return None
                add_blocks(M, step.factors, sizes)
        except DependentExamplesError:
            return None
    symmetrised(M)
    indices = objective.selection.indices
    return M if indices is None else M[indices][:, indices]


def gram_from_layers(curvature: GaussNewton, budget: int) -> Float[Tensor, "n n"] | None:
    """The dense Gram matrix `B Bᵀ`, rows in the order of the data; None where factors do not help or do not fit.

    Args:
        curvature: `BᵀB`.
        budget: Bytes that the factors of all data, kept side by side, and the tiles may take beside the result.

    Cost: one pass and N²(Σ I + C² Σ O) operations over the layers, without a vector of P entries.
    """
    cotangents = Cotangents.like(curvature)
    if cotangents is None or curvature.objective.selection.indices is not None:
        return None
    steps: list[Step] = []
    kept = 0
    with torch.no_grad():
        passes = LayerPass(curvature.objective, cotangents, together=True, examples=_tile_examples, report_unused=False)
        try:
            for step in passes:
                kept += sum(f.nbytes for f in step.factors if f is not None)
                if not (step.first and step.last) or kept > budget // 2 or not _all_single(step):
                    return None
                steps.append(step)
        except DependentExamplesError:
            return None
        return _tiled(steps)


def add_blocks(M: Tensor, factors: Sequence[Factors | None], sizes: Sequence[int]) -> None:
    """Σ_kn vec(G_kn) vec(G_kn)ᵀ of some parameters taken together, added to the upper blocks of M in place."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    for i, left in enumerate(factors):
        for j in range(i, len(factors)):
            right = factors[j]
            if left is not None and right is not None:
                rows, columns = slice(offsets[i], offsets[i] + sizes[i]), slice(offsets[j], offsets[j] + sizes[j])
                add_block(M[rows, columns], left, right)


def symmetrised(M: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle M holds, in place where that is possible."""
    return M.triu_().add_(M.triu(1).T)


def _tile_examples(columns: int) -> int:
    return max(1, TILE // columns)


def _tiled(steps: Sequence[Step]) -> Tensor:
    """Tiles of the upper triangle, each the sum over the parameters, and their mirror images."""
    rows = [next(f.batch * f.columns for f in step.factors if f is not None) for step in steps]
    ends = torch.tensor(rows).cumsum(0).tolist()
    like = steps[0].outputs
    G = torch.empty(ends[-1], ends[-1], dtype=like.dtype, device=like.device)
    for i, one in enumerate(steps):
        here = slice(ends[i] - rows[i], ends[i])
        for j in range(i, len(steps)):
            there = slice(ends[j] - rows[j], ends[j])
            tile = torch.zeros(rows[i], rows[j], dtype=like.dtype, device=like.device)
            for left, right in zip(one.factors, steps[j].factors, strict=True):
                if left is not None and right is not None:
                    tile += gram(left, right).reshape(rows[i], rows[j])
            G[here, there] = tile if j > i else (tile + tile.T) / 2
            if j > i:
                G[there, here] = tile.T
    return G


def _all_single(step: Step) -> bool:
    return any(f is not None for f in step.factors) and all(f is None or f.is_cheap for f in step.factors)


def _pays(step: Step, sizes: Sequence[int]) -> bool:
    """Whether blocks from factors cost less than column products.

    A block without weight sharing costs 2 p q per example, one with it 2 K p q; a column product about 8 p T per
    example and parameter, that is 8 P Σ p T in all.
    """
    P = sum(sizes)
    present = [(f, p) for f, p in zip(step.factors, sizes, strict=True) if f is not None]
    shared = sum(p for f, p in present if f.single is None)
    columns = max((f.columns for f, _ in present), default=1)
    blocks = 2 * (P - shared) ** 2 + 2 * columns * (P**2 - (P - shared) ** 2)
    return blocks <= 8 * P * sum(p * f.positions for f, p in present)
