"""Dense matrices from the layers' factors: the GGN itself, and its Gram matrix in function space.

Without weight sharing both cost as if the network had one output: `Σ_k g_k h_kᵀ` and inner products of inputs are made
once for all columns. With it, per-example gradients are multiplied out, and column products may be cheaper.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.matrixfree.layerpass import LayerPass, Step
from curvops.nets.factorblocks import add_block
from curvops.nets.factors import Factors, Outer, operand_key, outputs_of
from curvops.nets.mixing import DependentExamplesError

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


def gram_from_layers(
    curvature: GaussNewton, budget: int, weights: Float[Tensor, " L"] | None = None
) -> Float[Tensor, "n n"] | None:
    """The dense Gram matrix `B Bᵀ`, rows in the order of the data; None where factors do not help or do not fit.

    Args:
        curvature: `BᵀB`.
        budget: Bytes that the factors of all data, kept side by side, and the tiles may take beside the result.
        weights: One for each of the L parameter tensors: `B W Bᵀ`, W constant on each; gradients reach them.

    Cost: one pass and N²(Σ I + C² Σ O) operations over the layers, without a vector of P entries; as much again for the
        gradient of the weights.
    """
    sides = sides_from_layers(curvature, budget)
    if sides is None:
        return None
    if weights is None or not (torch.is_grad_enabled() and weights.requires_grad):
        return _tiled(sides, weights)
    result: Tensor = _WeightedGram.apply(weights, sides)  # type: ignore[assignment]
    return result


def sides_from_layers(curvature: GaussNewton, budget: int) -> list[Side] | None:
    """The rows of B in factors, side by side in the order of the data; None where factors do not help or do not fit.

    Args:
        curvature: `BᵀB`.
        budget: Twice the bytes that the factors of all data may take.
    """
    cotangents = Cotangents.like(curvature)
    if cotangents is None or curvature.objective.selection.indices is not None:
        return None
    sides: list[Side] = []
    kept = 0
    passes = LayerPass(curvature.objective, cotangents, together=True, examples=_tile_examples, report_unused=False)
    try:
        with torch.no_grad():
            for step in passes:
                kept += sum(f.nbytes for f in step.factors if f is not None)
                if not (step.first and step.last) or kept > budget // 2 or not _is_cheap(step):
                    return None
                sides.append(Side.of(step))
    except DependentExamplesError:
        return None
    # A parameter that some examples do not reach would leave its group; products do not mind.
    alike = all(side.groups.keys() == sides[0].groups.keys() for side in sides)
    return sides if alike else None


def factors_are_cheap(curvature: GaussNewton) -> bool:
    """Whether inner products of rows of B are had from the layers' factors; looks at a few data once, and remembers."""
    known = curvature._cache.get("factors are cheap")
    if known is None:
        known = curvature._cache["factors are cheap"] = _look(curvature)
    return known


def _look(curvature: GaussNewton) -> bool:
    cotangents = Cotangents.like(curvature)
    if cotangents is None or curvature.objective.selection.indices is not None:
        return False
    with torch.no_grad():
        try:
            steps = iter(LayerPass(curvature.objective, cotangents, together=True, examples=_few, report_unused=False))
            step = next(steps)
            steps.close()  # type: ignore[attr-defined]
        except DependentExamplesError:
            return False
    return step.first and step.last and _is_cheap(step)


def _few(columns: int) -> int:
    return 2


@dataclass(frozen=True)
class Group:
    """Parameters with the same output derivatives, a weight and its bias: `rows` (B·K, O), and the weight's inputs.

    A parameter without inputs (None) has the rows themselves as its gradients.
    """

    rows: Tensor
    inputs: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Side:
    """The gradients of some examples, B of them with K columns each, in factors."""

    size: tuple[int, int]
    groups: dict[tuple[int, ...], Group]

    @classmethod
    def of(cls, step: Step) -> Side:
        """Parameters are grouped by the tensor of their output derivatives."""
        shared: dict[object, list[int]] = {}
        for i, factors in enumerate(step.factors):
            if factors is not None:
                single = factors.single
                shared.setdefault(i if single is None else operand_key(outputs_of(single)), []).append(i)
        groups = {}
        size = (len(step.outputs), 0)
        for members in shared.values():
            present = [f for i in members if (f := step.factors[i]) is not None]
            size = (present[0].batch, present[0].columns)
            part = present[0].single
            g = present[0].per_example() if part is None else part.g.flatten(2)
            inputs = tuple(f.single.a.flatten(1) if isinstance(f.single, Outer) else None for f in present)
            groups[tuple(members)] = Group(g.transpose(0, 1).flatten(0, 1), inputs)
        return cls(size, groups)

    @property
    def rows(self) -> int:
        """B·K."""
        return self.size[0] * self.size[1]


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
    """The symmetric matrix whose upper triangle M holds, in place; tile by tile, so that no second matrix is made."""
    rows = 512
    for start in range(0, M.shape[0], rows):
        stop = min(start + rows, M.shape[0])
        M[start:stop, :start] = M[:start, start:stop].T
        tile = M[start:stop, start:stop]
        tile.copy_(tile.triu() + tile.triu(1).T)
    return M


def _tile_examples(columns: int) -> int:
    return max(1, TILE // columns)


def _tiled(sides: Sequence[Side], weights: Tensor | None) -> Tensor:
    """Tiles of the upper triangle, each the sum over the parameters, and their mirror images."""
    like = next(group.rows for side in sides for group in side.groups.values())
    n = sum(side.rows for side in sides)
    G = torch.empty(n, n, dtype=like.dtype, device=like.device)
    for one, here, two, there in _pairs(sides):
        product = tile(one, two, weights)
        G[here, there] = product if one is not two else (product + product.T) / 2
        if one is not two:
            G[there, here] = product.T
    return G


def _pairs(sides: Sequence[Side]) -> Iterator[tuple[Side, slice, Side, slice]]:
    """Every pair of the upper triangle with its rows and columns."""
    ends = list(itertools.accumulate(side.rows for side in sides))
    places = [slice(end - side.rows, end) for side, end in zip(sides, ends, strict=True)]
    for i, one in enumerate(sides):
        for j in range(i, len(sides)):
            yield one, places[i], sides[j], places[j]


class _WeightedGram(torch.autograd.Function):
    """`B W Bᵀ` as a function of the weights; the gradient goes over the tiles again, and keeps none of them."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, sides: Sequence[Side]) -> Tensor:
        ctx.sides, ctx.weights = sides, weights.detach()
        return _tiled(sides, ctx.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gradient = torch.zeros_like(ctx.weights)
        for one, here, two, there in _pairs(ctx.sides):
            mirrored = grads[0][there, here].T
            part = grads[0][here, there] + mirrored
            part = part if one is not two else part / 2
            for members in one.groups:
                left, right = one.groups[members], two.groups[members]
                shares = (left.rows @ right.rows.T).mul_(part).view(*one.size, *two.size).sum((1, 3))
                for i, a, b in zip(members, left.inputs, right.inputs, strict=True):
                    gradient[i] += shares.sum() if a is None or b is None else (shares * (a @ b.T)).sum()
        return gradient, None


def tile(left: Side, right: Side, weights: Tensor | None = None) -> Float[Tensor, "r s"]:
    """Inner products of the gradients of two sides, `(B·K, D·L)`, each parameter's share times its weight."""
    like = next(iter(left.groups.values())).rows
    result = like.new_zeros(left.rows, right.rows)
    per_example = result.view(*left.size, *right.size)
    for members in left.groups:
        one, two = left.groups[members], right.groups[members]
        derivatives = one.rows @ two.rows.T
        weight = like.new_zeros(left.size[0], right.size[0])
        for i, a, b in zip(members, one.inputs, two.inputs, strict=True):
            share = 1.0 if a is None or b is None else a @ b.T
            weight += share if weights is None else weights[i] * share
        per_example.addcmul_(derivatives.view_as(per_example), weight[:, None, :, None])
    return result


def own_blocks(side: Side, weights: Tensor | None = None) -> Float[Tensor, "B K K"]:
    """Inner products of the gradients of each example, the diagonal blocks of `tile(side, side)`. O(B·K²·Σ O)."""
    like = next(iter(side.groups.values())).rows
    blocks = like.new_zeros(side.size[0], side.size[1], side.size[1])
    for members, group in side.groups.items():
        rows = group.rows.view(*side.size, -1)
        weight = like.new_zeros(side.size[0])
        for i, a in zip(members, group.inputs, strict=True):
            share = like.new_ones(()) if a is None else a.square().sum(1)
            weight += share if weights is None else weights[i] * share
        blocks += weight[:, None, None] * (rows @ rows.transpose(1, 2))
    return blocks


def _is_cheap(step: Step) -> bool:
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
