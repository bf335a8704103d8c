"""Dense matrices from the layers' factors: the GGN itself, and its Gram matrix in function space.

Without weight sharing both cost as if the network had one output: `Σ_k g_k h_kᵀ` and inner products of inputs are made
once for all columns. With it, per-example gradients are multiplied out, and column products may be cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.matrixfree.layerpass import LayerPass, Step
from curvops.nets.factors import Factors, Outer, add_block
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
    sides: list[_Side] = []
    kept = 0
    passes = LayerPass(curvature.objective, cotangents, together=True, examples=_tile_examples, report_unused=False)
    try:
        with torch.no_grad():
            for step in passes:
                kept += sum(f.nbytes for f in step.factors if f is not None)
                if not (step.first and step.last) or kept > budget // 2 or not _is_cheap(step):
                    return None
                sides.append(_Side.of(step))
    except DependentExamplesError:
        return None
    # A parameter that some examples do not reach would leave its group; products do not mind.
    alike = all(side.groups.keys() == sides[0].groups.keys() for side in sides)
    return _tiled(sides) if alike else None


@dataclass(frozen=True)
class _Group:
    """Parameters with the same output derivatives, a weight and its bias: `rows` (B·K, O), and the weight's inputs.

    A parameter without inputs (None) has the rows themselves as its gradients.
    """

    rows: Tensor
    inputs: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Side:
    """The gradients of some examples, B of them with K columns each, in factors."""

    size: tuple[int, int]
    groups: dict[tuple[int, ...], _Group]

    @classmethod
    def of(cls, step: Step) -> _Side:
        """Parameters are grouped by the tensor of their output derivatives."""
        shared: dict[object, list[int]] = {}
        for i, factors in enumerate(step.factors):
            if factors is not None:
                single = factors.single
                shared.setdefault(i if single is None else single.g.data_ptr(), []).append(i)
        groups = {}
        size = (len(step.outputs), 0)
        for members in shared.values():
            present = [f for i in members if (f := step.factors[i]) is not None]
            size = (present[0].batch, present[0].columns)
            part = present[0].single
            g = present[0].per_example() if part is None else part.g.flatten(2)
            inputs = tuple(f.single.a.flatten(1) if isinstance(f.single, Outer) else None for f in present)
            groups[tuple(members)] = _Group(g.transpose(0, 1).flatten(0, 1), inputs)
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


def _tiled(sides: Sequence[_Side]) -> Tensor:
    """Tiles of the upper triangle, each the sum over the parameters, and their mirror images."""
    ends = torch.tensor([side.rows for side in sides]).cumsum(0).tolist()
    like = next(group.rows for side in sides for group in side.groups.values())
    G = torch.empty(ends[-1], ends[-1], dtype=like.dtype, device=like.device)
    for i, one in enumerate(sides):
        here = slice(ends[i] - one.rows, ends[i])
        for j in range(i, len(sides)):
            there = slice(ends[j] - sides[j].rows, ends[j])
            tile = _tile(one, sides[j], like)
            G[here, there] = tile if j > i else (tile + tile.T) / 2
            if j > i:
                G[there, here] = tile.T
    return G


def _tile(left: _Side, right: _Side, like: Tensor) -> Tensor:
    """Inner products of the gradients of two sides, `(B·K, D·L)`."""
    tile = like.new_zeros(left.rows, right.rows)
    per_example = tile.view(*left.size, *right.size)
    for members in left.groups:
        one, two = left.groups[members], right.groups[members]
        derivatives = one.rows @ two.rows.T
        weight = like.new_zeros(left.size[0], right.size[0])
        for a, b in zip(one.inputs, two.inputs, strict=True):
            weight += 1.0 if a is None or b is None else a @ b.T
        per_example.addcmul_(derivatives.view_as(per_example), weight[:, None, :, None])
    return tile


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
