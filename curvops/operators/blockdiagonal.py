"""Square blocks of any sizes along the diagonal; every verb block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import Layout, LinearOperator, Scalar
from curvops.operators.deferred import Deferred
from curvops.operators.dense import as_operator, dense_copy, dense_route
from curvops.operators.diagonal import Diagonal, Identity
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class BlockDiagonal(LinearOperator):
    """`diag(A₁, …, A_L)` of square operators or tensors of any sizes.

    Args:
        blocks: The blocks, in order.
        layout: Where each named parameter lies in a vector, so that `add_diagonal` takes a dict.
    """

    def __init__(self, *blocks: Tensor | LinearOperator, layout: Layout | None = None) -> None:
        if not blocks:
            raise ShapeError("BlockDiagonal expects at least one block, got none.")
        self.blocks = tuple(as_operator(block) for block in blocks)
        for block in self.blocks:
            if block.shape[0] != block.shape[1]:
                raise ShapeError(
                    f"BlockDiagonal expects square blocks; {block!r} is {block.shape[0]} x {block.shape[1]}."
                )
        if len({(block.dtype, block.device) for block in self.blocks}) > 1:
            raise ShapeError("BlockDiagonal expects blocks of one dtype on one device.")
        self.sizes = [block.shape[0] for block in self.blocks]
        size = sum(self.sizes)
        super().__init__((size, size), self.blocks[0].dtype, self.blocks[0].device, layout=layout)

    @property
    def is_symmetric(self) -> bool:
        return all(block.is_symmetric for block in self.blocks)

    @property
    def is_psd(self) -> bool:
        return all(block.is_psd for block in self.blocks)

    @property
    def lower_bound(self) -> float | None:
        bounds = [block.lower_bound for block in self.blocks]
        known = [bound for bound in bounds if bound is not None]
        return min(known) if len(known) == len(bounds) else None

    @property
    def layout(self) -> Layout | None:
        return self._layout  # a block's own names would not cover the whole vector

    def __reduce__(self) -> Any:
        """A subclass that computes its blocks from a network travels as the blocks: nothing of the network does."""
        travels: LinearOperator = self
        if any(isinstance(block, Deferred) for block in self.blocks):
            travels = BlockDiagonal(*self.blocks, layout=self._layout)
            travels.memory_budget = self.memory_budget
        return object.__new__, (type(travels),), travels.__getstate__()

    def _matmat(self, V: Tensor) -> Tensor:
        return torch.cat([block._apply(part) for block, part in self._split(V)])

    def _rmatmat(self, V: Tensor) -> Tensor:
        return torch.cat([block._rapply(part) for block, part in self._split(V)])

    def _exact(self, verb_name: str) -> str | None:
        if verb_name == "dense":
            return "block by block"
        routes = [block._exact(verb_name) or dense_route(block) for block in self.blocks]
        if any(route is None for route in routes):
            return None
        return f"block by block: {', '.join(dict.fromkeys(str(route) for route in routes))}"

    def _has_spectral(self) -> bool:
        return all(block._has_spectral() for block in self.blocks)

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        parts = [_full(block._spectral()) for block in self.blocks]
        return Eigen(BlockDiagonal(*(part.Q for part in parts)), torch.cat([part.values for part in parts]))

    def _solve(self, B: Tensor) -> Tensor:
        return torch.cat([block._solve(part) for block, part in self._split(B, "solve")])

    def _logdet(self) -> Tensor:
        return torch.stack([block._logdet() for block in self._closed("logdet")]).sum()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        signs, logs = zip(*(block._slogdet() for block in self._closed("slogdet")), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def _diagonal(self) -> Tensor:
        return torch.cat([block._diagonal() for block in self._closed("diagonal")])

    def _trace(self) -> Tensor:
        return torch.stack([block._trace() for block in self._closed("trace")]).sum()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return torch.cat([block._function(f, part) for block, part in self._split(V, "function")])

    def _inverse_root(self, E: Tensor) -> Tensor:
        return torch.cat([block._inverse_root(part) for block, part in self._split(E, "sample")])

    def _power_apply(self, power: float, V: Tensor) -> Tensor:
        return torch.cat([block._power_apply(power, part) for block, part in self._split(V, "function")])

    def _dense(self) -> Tensor:
        return torch.block_diag(*(block._dense() for block in self.blocks))

    def _transpose(self) -> LinearOperator:
        return BlockDiagonal(*(block.T for block in self.blocks), layout=self._layout)

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return BlockDiagonal(*(factor * block for block in self.blocks), layout=self._layout)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        parts = self._parts_of(other)
        if parts is None:
            return None
        sums = (block + part for block, part in zip(self.blocks, parts, strict=True))
        return BlockDiagonal(*sums, layout=self._layout or other.layout)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        parts = self._parts_of(other)
        if parts is None:
            return None
        products = (block @ part for block, part in zip(self.blocks, parts, strict=True))
        return BlockDiagonal(*products, layout=self._layout)

    def _inverse(self) -> LinearOperator:
        return BlockDiagonal(*(block.inverse() for block in self.blocks), layout=self._layout)

    def _hadamard_square(self) -> LinearOperator:
        return BlockDiagonal(*(block._hadamard_square() for block in self.blocks))

    def _children(self) -> tuple[LinearOperator, ...]:
        return self.blocks

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return BlockDiagonal(*(block._to(dtype, device) for block in self.blocks), layout=self._layout)

    def _formula(self) -> Formula:
        return Formula("group", "BlockDiagonal", tuple(block._formula() for block in self.blocks))

    def _split(self, V: Tensor, verb_name: str = "matvec") -> Iterator[tuple[LinearOperator, Tensor]]:
        blocks = self.blocks if verb_name == "matvec" else self._closed(verb_name)
        return zip(blocks, V.split(self.sizes), strict=True)

    def _closed(self, verb_name: str) -> tuple[LinearOperator, ...]:
        """The blocks, each with a closed form for a verb: its own, or that of a dense copy."""
        return tuple(block if block._exact(verb_name) else dense_copy(block) for block in self.blocks)

    def _parts_of(self, other: LinearOperator) -> list[LinearOperator] | None:
        """`other` cut into diagonal blocks of our sizes, or None where it has entries outside them."""
        if isinstance(other, Identity):
            return [Identity(size, self.dtype, self.device, other.scale) for size in self.sizes]
        if isinstance(other, Diagonal):
            return [Diagonal(part) for part in other.d.split(self.sizes)]
        if isinstance(other, BlockDiagonal):
            return _regroup(other, self.sizes)
        return None


def _regroup(operator: BlockDiagonal, sizes: list[int]) -> list[LinearOperator] | None:
    """The blocks gathered into groups of the given sizes, where the cuts fall between blocks."""
    ends = list(accumulate(sizes))
    if not set(ends) <= set(accumulate(operator.sizes)):
        return None
    groups: list[list[LinearOperator]] = [[] for _ in ends]
    group, position = 0, 0
    for block in operator.blocks:
        groups[group].append(block)
        position += block.shape[0]
        group += position == ends[group]
    return [_one(blocks) for blocks in groups]


def _one(blocks: list[LinearOperator]) -> LinearOperator:
    """Neighbouring blocks as one operator; equal multiples of the identity stay one."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    if isinstance(first, Identity):
        alike = (isinstance(b, Identity) and _is_same(b.scale, first.scale) for b in blocks)
        if all(alike):
            return Identity(sum(b.shape[0] for b in blocks), first.dtype, first.device, first.scale)
    return BlockDiagonal(*blocks)


def _is_same(a: Scalar, b: Scalar) -> bool:
    """The same tensor, or equal numbers; equal tensors may be told apart by gradients."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _full(part: Eigen) -> Eigen:
    """A decomposition with a square Q: a thin one is completed, since blocks must be square."""
    from curvops.operators.eigen import Eigen

    if not part.thin:
        return part
    values, vectors = torch.linalg.eigh(part._dense())
    return Eigen(vectors, values)
