"""Per-example gradients of one parameter along K cotangents, in factors, and what can be had without multiplying out.

A parameter's gradient for example n and cotangent k is a sum over its parts (its uses) and over positions t:

    Outer    G_kn = Σ_t g_knt a_ntᵀ        Lookup   G_kn = Σ_t e_{i_nt} g_kntᵀ
    Shift    G_kn = Σ_t g_knt              Direct   G_kn itself

Letters: K cotangents, B examples, T positions, G groups, I and O inputs and outputs per group, p entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from curvops.nets.pooled import Pooled

CHUNK = 2**22
"""Entries of a temporary that holds per-example gradients."""

FEW = 64
"""Inputs below which their products with the outputs are faster with the outputs last."""

SQUARED = 2**18
"""Entries of products, and of the columns they are made of, whose squares are summed at once: what caches hold."""

SQUARED_ON_ACCELERATORS = 2**24
"""The same where calls, rather than caches, are what costs."""


class Made:
    """A tensor that is made when it is asked for, and kept until it is dropped: patches are many times their image.

    Args:
        shape, dtype: Its own.
        make: Makes it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.nbytes = self.shape.numel() * dtype.itemsize
        self._make = make
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """It."""
        if self._value is None:
            self._value = self._make()
        return self._value

    def drop(self) -> None:
        """Free it; who asks again has it made again."""
        self._value = None


@dataclass(frozen=True)
class Outer:
    """`a` (B, T, G, I), `g` (K, B, T, G, O); the parameter is `(G, O, I)`, or `(G, I, O)` where flipped.

    The inputs are a, or what it is made of.
    """

    inputs: Float[Tensor, "B T G I"] | Made
    g: Float[Tensor, "K B T G O"]
    flipped: bool = False

    @property
    def a(self) -> Float[Tensor, "B T G I"]:
        return self.inputs if isinstance(self.inputs, Tensor) else self.inputs.value()

    @property
    def positions(self) -> int:
        return self.g.shape[2]

    @property
    def share(self) -> float:
        """Of the outputs, how many have a gradient."""
        return 1.0

    def examples(self, rows: slice) -> Outer:
        return Outer(self.a[rows], self.g[:, rows], self.flipped)

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        K, B, T, G, O = self.g.shape
        # One product per example and group with the columns side by side, so that `a` is read once.
        g = self.g.permute(1, 3, 0, 4, 2).reshape(B * G, K * O, T)
        a = self.a.transpose(1, 2).reshape(B * G, T, -1)
        rows = torch.bmm(g, a).reshape(B, G, K, O, -1)  # (B, G, K, O, I)
        rows = rows.permute(2, 0, 1, 4, 3) if self.flipped else rows.permute(2, 0, 1, 3, 4)
        return rows.flatten(2)

    def squares(self, *others: Outer) -> Float[Tensor, " p"]:
        """Σ_kn G_kn², over the columns of `others` too, which are of the same examples and multiply the same a."""
        columns = [g for part in (self, *others) for g in part.g]  # (B, T, G, O) each
        if self.positions == 1:
            return self.squared_product(sum((g[:, 0].square() for g in columns[1:]), columns[0][:, 0].square()))
        B, T, G, O = columns[0].shape
        I = self.a.shape[-1]
        few, most = I < FEW, SQUARED if columns[0].device.type == "cpu" else SQUARED_ON_ACCELERATORS
        total = None
        # So little at a time that products are squared before they leave the caches; and the columns side by side, so
        # that `a` is read once.
        for some in slices(len(columns), G * O * (T + I), most):
            sums = None  # of as many examples, apart, as are multiplied at once
            for rows in slices(B, len(columns[some]) * G * O * (T + I), most):
                a = self.a[rows].permute(0, 2, 3, 1).flatten(0, 1)  # (B·G, I, T)
                g = _side_by_side([g[rows] for g in columns[some]])  # (B·G, T, K·O)
                products = torch.bmm(a, g) if few else torch.bmm(g.mT, a.mT)
                if sums is None:
                    sums = products.square_()
                else:
                    sums[: len(products)].addcmul_(products, products)
            assert sums is not None
            axis = 2 if few else 1
            sums = sums.unflatten(0, (-1, G)).sum(0).unflatten(axis, (-1, O)).sum(axis)
            total = sums if total is None else total.add_(sums)
        assert total is not None
        return (total if few == self.flipped else total.mT).reshape(-1)

    def squared_product(self, g_squared: Float[Tensor, "B G O"]) -> Float[Tensor, " p"]:
        """Σ_n g²_n (a²_n)ᵀ, for one position and squares summed over the columns."""
        a = self.a[:, 0].square()
        left, right = (a, g_squared) if self.flipped else (g_squared, a)
        if left.shape[1] == 1:
            return (left[:, 0].T @ right[:, 0]).reshape(-1)
        return torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1)).reshape(-1)


@dataclass(frozen=True)
class Lookup:
    """`index` (B, T) into `size` rows, `g` (K, B, T, O); the parameter is `(size, O)`."""

    index: Int64[Tensor, "B T"]
    g: Float[Tensor, "K B T O"]
    size: int

    @property
    def positions(self) -> int:
        return self.index.shape[1]

    def examples(self, rows: slice) -> Lookup:
        return Lookup(self.index[rows], self.g[:, rows], self.size)

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        K, B, T, O = self.g.shape
        slot = (torch.arange(B, device=self.index.device)[:, None] * self.size + self.index).reshape(-1)
        table = self.g.new_zeros(K, B * self.size, O).index_add_(1, slot, self.g.reshape(K, B * T, O))
        return table.reshape(K, B, self.size * O)

    def squares(self) -> Float[Tensor, " p"]:
        rows, g = self.occupied()
        table = g.new_zeros(self.size, g.shape[-1])
        return table.index_add_(0, rows, g.square().sum(0)).reshape(-1)

    def occupied(self) -> tuple[Int64[Tensor, " U"], Float[Tensor, "K U O"]]:
        """The table row of each pair (example, row looked up), and its gradient: all that is not zero."""
        K, B, T, O = self.g.shape
        slot = (torch.arange(B, device=self.index.device)[:, None] * self.size + self.index).reshape(-1)
        pairs, where = slot.unique(return_inverse=True)
        summed = self.g.new_zeros(K, len(pairs), O).index_add_(1, where, self.g.reshape(K, B * T, O))
        return pairs % self.size, summed


@dataclass(frozen=True)
class Shift:
    """`g` (K, B, T, O); the parameter is `(O,)`."""

    g: Float[Tensor, "K B T O"]

    @property
    def positions(self) -> int:
        return self.g.shape[2]

    def examples(self, rows: slice) -> Shift:
        return Shift(self.g[:, rows])

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        return self.g.sum(2)

    def squares(self) -> Float[Tensor, " p"]:
        return self.multiplied_out().square().sum((0, 1))

    def squared_product(self, g_squared: Float[Tensor, "B 1 O"]) -> Float[Tensor, " p"]:
        """Σ_n g²_n, for one position and squares summed over the columns."""
        return g_squared.sum(0).reshape(-1)


@dataclass(frozen=True)
class Direct:
    """`rows` (K, B, p): the gradients themselves."""

    rows: Float[Tensor, "K B p"]

    @property
    def positions(self) -> int:
        return 1

    def examples(self, rows: slice) -> Direct:
        return Direct(self.rows[:, rows])

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        return self.rows

    def squares(self) -> Float[Tensor, " p"]:
        return self.rows.square().sum((0, 1))


Part: TypeAlias = "Outer | Pooled | Lookup | Shift | Direct"


def outputs_of(part: Outer | Lookup | Shift) -> Float[Tensor, "K B T G O"]:
    """g, with an axis for the groups."""
    return part.g if isinstance(part, Outer) else part.g.unsqueeze(3)


def operand_key(t: Tensor | Made) -> object:
    """What tells an operand from the others that are alive."""
    if isinstance(t, Made):
        return id(t)
    return t.data_ptr(), t.shape, t.squeeze().stride()  # axes of one entry have any stride


def _side_by_side(columns: Sequence[Float[Tensor, "B T G O"]]) -> Float[Tensor, "BG T KO"]:
    """The columns' outputs beside each other, in the order of axes that they have in memory; one is not copied."""
    if len(columns) == 1:
        return columns[0].transpose(1, 2).flatten(0, 1)
    if columns[0].stride(1) > 1:
        return torch.cat([g.transpose(1, 2) for g in columns], 3).flatten(0, 1)
    return torch.cat([g.permute(0, 2, 3, 1) for g in columns], 2).flatten(0, 1).mT


class Factors:
    """The parts of one parameter over one batch.

    Args:
        size: p, entries of the parameter.
        parts: Its uses; those of one kind and shape are joined, each use's positions being further positions.
    """

    def __init__(self, size: int, parts: list[Part]) -> None:
        self.size = size
        self.parts = _joined(parts)

    @property
    def columns(self) -> int:
        """K."""
        part = self.parts[0]
        return part.rows.shape[0] if isinstance(part, Direct) else part.g.shape[0]

    @property
    def batch(self) -> int:
        """B."""
        part = self.parts[0]
        return part.rows.shape[1] if isinstance(part, Direct) else part.g.shape[1]

    def per_example(self) -> Float[Tensor, "K B p"]:
        """The per-example gradients. O(K·B·p) memory, O(K·B·T·p) operations."""
        total = self.parts[0].multiplied_out()
        for part in self.parts[1:]:
            total = total + part.multiplied_out()
        return total

    def squares(self) -> Float[Tensor, " p"]:
        """Σ_kn G_kn², entry by entry: the diagonal of Σ_kn vec(G) vec(G)ᵀ.

        O(B·p) operations without weight sharing, O(K·B·T·p) with it, in chunks; O(K·B·T·O) memory beside them.
        """
        if len(self.parts) == 1:
            return self.parts[0].squares()
        return _chunked_squares(self, self.columns * self.size)

    def examples(self, rows: slice) -> Factors:
        """The factors of some of the examples."""
        return Factors(self.size, [part.examples(rows) for part in self.parts])

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        return self.per_example()

    @property
    def positions(self) -> int:
        """T, positions of all uses together."""
        return sum(part.positions for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, with those that are not made yet."""
        held = [t for part in self.parts for t in vars(part).values() if isinstance(t, Tensor | Made)]
        return sum(t.nbytes for t in held)

    @property
    def is_cheap(self) -> bool:
        """Whether inner products of gradients are had without multiplying out, or the gradients are no larger."""
        return self.single is not None or all(isinstance(part, Direct | Shift) for part in self.parts)

    @property
    def single(self) -> Outer | Shift | None:
        """The one part of a parameter without weight sharing, positions or groups; None otherwise."""
        if len(self.parts) != 1:
            return None
        part = self.parts[0]
        if isinstance(part, Outer):
            return part if part.positions == 1 and part.g.shape[3] == 1 else None
        return part if isinstance(part, Shift) and part.positions == 1 else None


def _joined(parts: list[Part]) -> list[Part]:
    if len(parts) == 1:
        return parts
    groups: dict[object, list[Part]] = {}
    for part in parts:
        if isinstance(part, Outer):
            key: object = (Outer, part.inputs.shape[2:], part.g.shape[3:], part.flipped)
        elif isinstance(part, Direct):
            key = Direct
        else:
            key = (type(part), part.g.shape[3:])
        groups.setdefault(key, []).append(part)
    return [_join(group) if len(group) > 1 else group[0] for group in groups.values()]


def _join(parts: list[Part]) -> Part:
    first = parts[0]
    if isinstance(first, Direct):
        return Direct(torch.stack([part.rows for part in parts if isinstance(part, Direct)]).sum(0))
    g = torch.cat([part.g for part in parts if not isinstance(part, Direct)], 2)
    if isinstance(first, Outer):
        return Outer(torch.cat([part.a for part in parts if isinstance(part, Outer)], 1), g, first.flipped)
    if isinstance(first, Lookup):
        return Lookup(torch.cat([part.index for part in parts if isinstance(part, Lookup)], 1), g, first.size)
    return Shift(g)


def _chunked_squares(factors: Factors, per_example: int) -> Tensor:
    total = None
    for rows in slices(factors.batch, per_example):
        G = factors.examples(rows).multiplied_out().flatten(0, 1)
        square = G.square_().sum(0)
        total = square if total is None else total.add_(square)
    assert total is not None
    return total


def slices(B: int, per_example: int, chunk: int = CHUNK) -> Iterator[slice]:
    """B examples in groups of which `per_example` entries each make no more than a chunk."""
    step = max(1, chunk // max(1, per_example))
    for start in range(0, B, step):
        yield slice(start, min(B, start + step))
