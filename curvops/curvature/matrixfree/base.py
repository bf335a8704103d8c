"""Operators that sum over a data set: the one place where batches are gone through and linearisations kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from curvops.curvature.objective import Objective
from curvops.errors import UnsupportedError
from curvops.memory import Need, columns_within
from curvops.nets.batches import Batch
from curvops.nets.forward import tensors_of
from curvops.nets.graph import Footprint
from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator
from curvops.operators.formula import Formula

Cache = Literal["auto"] | bool

_AT_ONCE = 1024
"""Columns of a dense matrix that are made at a time."""


class Piece(Protocol):
    """One batch's share of an operator, on a kept graph."""

    @property
    def outputs(self) -> Tensor:
        """f of the batch, detached."""
        ...

    @property
    def footprint(self) -> Footprint:
        """What it holds, with what its first product will add, and what a product takes; a walk over the graph."""
        ...

    @property
    def on_tape(self) -> bool | None:
        """Whether its products are replayed; None before it is known."""
        ...

    def release(self) -> None:
        """Drop the graph."""
        ...


class _Kept(NamedTuple):
    batch: Batch
    piece: Any
    size: int


class DataOperator(LinearOperator):
    """An operator over a network and a data set; a subclass writes `_build` for one batch, and its products.

    Memory: half of the budget is for kept linearisations, of the batches that still fit as they come (`cache="auto"`),
    of all (True) or none (False); the others are computed again in each product. A quarter is for the transients of
    many columns, the rest for the graph being built and for vectors. A data set whose batches are all kept is not read
    again.
    """

    objective: Objective

    @classmethod
    def of(cls, objective: Objective, **own: Any) -> Self:
        """The operator over an objective that is already there; `own` are the class's own keywords."""
        operator = cls.__new__(cls)
        operator._begin(objective, **own)
        return operator

    def _begin(
        self,
        objective: Objective,
        *,
        cache: Cache = "auto",
        is_symmetric: bool = True,
        is_psd: bool = False,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if cache not in ("auto", True, False):
            raise ValueError(f'cache={cache!r}: expected "auto", True or False.')
        size = objective.selection.size
        LinearOperator.__init__(
            self, (size, size) if shape is None else shape, objective.selection.dtype, objective.selection.device,
            is_symmetric=is_symmetric, is_psd=is_psd, layout=objective.layout, memory_budget=objective.memory_budget,
        )  # fmt: skip
        self.objective = objective
        self._policy: Cache = cache
        self._linearised: dict[int, _Kept] = {}
        self._all_kept = False
        self._sizes: dict[int, Footprint] = {}
        self._steps: dict[tuple[int, int], int] = {}
        self._generation = objective.generation

    @property
    def keeps(self) -> bool:
        """Whether a pass keeps linearisations (as far as the budget goes) for the next one."""
        return self._policy is not False

    def _own(self) -> dict[str, Any]:
        """The class's own keywords, as `of` takes them."""
        return {"cache": self._policy}

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return type(self).of(self.objective.to(dtype, device), **self._own())

    # ---------------------------------------------------------------- one pass

    def _build(self, batch: Batch) -> Any:
        """The batch's `Piece`; one recorded forward, its outputs checked before targets meet them."""
        raise NotImplementedError

    def _pieces(self) -> Iterator[tuple[Batch, Any]]:
        """Every batch with its piece, in order; the pieces kept are not built again."""
        if (generation := self.objective.refresh()) != self._generation:
            self._forget()
            self._generation = generation
        if self._all_kept:
            yield from ((kept.batch, kept.piece) for kept in self._linearised.values())
            return
        room = self._room()
        for batch in self.objective.batches():
            kept = self._linearised.get(batch.index)
            piece = self._build(batch) if kept is None else kept.piece
            self.objective.observe(batch, piece.outputs)
            yield batch, piece
            if kept is None:
                room -= self._keep(batch, piece, room)
        self._all_kept = len(self._linearised) == self.objective.record.batches

    def _room(self) -> float:
        """Bytes that further kept graphs may take at the start of a pass."""
        if self._policy != "auto":
            return float("inf") if self._policy else -1.0
        held = sum(kept.size for kept in self._linearised.values())
        budget = self.objective.budget()
        if self.objective.memory_budget is None:
            budget += held // 2  # the default is half of what is free, and what is held is no longer free
        return budget // 2 - held

    def _keep(self, batch: Batch, piece: Piece, room: float) -> int:
        """Keep a piece that fits, release one that does not; returns the bytes taken."""
        if batch.index not in self._sizes or room > 0:
            self._sizes[batch.index] = piece.footprint
        size = self._sizes[batch.index].held + self._batch_bytes(batch)
        if size > room:
            piece.release()
            return 0
        self._linearised[batch.index] = _Kept(batch, piece, size)
        return size

    def _batch_bytes(self, batch: Batch) -> int:
        """Bytes of a batch that lives for as long as its graph; in-memory data are the user's and live anyway."""
        if self.objective.source.in_memory:
            return 0
        return sum(t.untyped_storage().nbytes() for t in [*tensors_of(batch.x), batch.y])

    def _sum(self, V: Tensor, product: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """Σ over batches of `product(piece, V)`, columns in chunks that fit into the budget."""
        total: Tensor | None = None
        for batch, piece in self._pieces():
            for start, stop in self._chunks(batch, piece, V.shape[1]):
                part = product(piece, V[:, start:stop])
                if total is None and part.shape == V.shape:
                    # Taken over as it is; a copy only where the network's own functions pass the caller's tensor on.
                    same = part.untyped_storage().data_ptr() == V.untyped_storage().data_ptr()
                    total = part.clone() if same else part
                    continue
                total = torch.zeros_like(V) if total is None else total
                total[:, start:stop] += part
        return torch.zeros_like(V) if total is None else total

    def _chunks(self, batch: Batch, piece: Piece, columns: int) -> Iterator[tuple[int, int]]:
        """Ranges of columns whose transients fit into a quarter of the budget."""
        if columns <= 1:  # nothing to divide, and a product with one vector shall not walk over the graph
            yield from [(0, columns)] * columns
            return
        if batch.index not in self._sizes:
            self._sizes[batch.index] = piece.footprint
        # Decided once, so that a product repeats to the bit however much memory is free by then.
        key = (batch.index, columns)
        if key not in self._steps:
            self._steps[key] = self._columns_at_once(self._sizes[batch.index], columns)
        step = self._steps[key]
        for start in range(0, columns, step):
            yield start, min(start + step, columns)

    def _columns_at_once(self, size: Footprint, columns: int) -> int:
        """A column's transients are taken to be a graph's size, or four parameter vectors where those are larger."""
        per_column = max(size.held, 4 * self._vector_bytes)
        return columns_within(self.objective.budget() // 4, self.device, per_column, columns)

    @property
    def _vector_bytes(self) -> int:
        return self.objective.selection.size * self.dtype.itemsize

    def _product_need(self, columns: int) -> Need:
        """One pass: the graphs that it will keep, one being built, and the columns that run at once."""
        result = columns * self._vector_bytes
        if not self._sizes:
            return Need(2 * result, complete=False)
        batches = self.objective.record.batches or self.objective.source.num_batches or len(self._sizes)
        held = max(size.held for size in self._sizes.values())
        to_keep = (batches - len(self._linearised)) * held
        fitting = 0 if to_keep <= 0 else int(min(to_keep, max(self._room(), 0)))
        passing = 0
        for size in self._sizes.values():
            step = self._columns_at_once(size, columns)
            passing = max(passing, size.passing(step, self._vector_bytes) + (result if step < columns else 0))
        return Need(passing + (held if to_keep > fitting else 0) + (result if batches > 1 else 0), fitting)

    def _forget(self) -> None:
        for kept in self._linearised.values():
            kept.piece.release()
        self._linearised, self._all_kept = {}, False

    # ---------------------------------------------------------------- the operator's side

    def _product(self, V: Tensor) -> Tensor:
        """The product on detached columns."""
        raise NotImplementedError

    def _adjoint(self, V: Tensor) -> Tensor:
        return self._product(V)

    def _matmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._product, self._adjoint)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._adjoint, self._product)

    def _dense(self) -> Tensor:
        dense = by_columns(self._apply, self.shape[1], _AT_ONCE, self.dtype, self.device)
        return averaged(dense) if self.is_symmetric else dense

    def _dense_need(self) -> Need:
        columns = min(_AT_ONCE, self.shape[1])
        held = self.shape[1] + columns
        return self._product_need(columns).beside(self.shape[0] * held * self.dtype.itemsize)

    def _check_content(self) -> None:
        self.objective.refresh()  # an answer from what is kept makes no pass that would look
        self.objective.watch.check_content()

    def _keeps_all(self) -> bool:
        return self._all_kept

    def _watched(self) -> Iterator[LinearOperator]:
        yield self

    def _holds_tensors(self) -> bool:
        return False

    def release(self) -> None:
        super().release()
        self._forget()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            f"{self!r} holds a network and cannot be pickled; save the model's state_dict and build the operator "
            f"again, or save to_dense() or a structured curvature (KFAC, diagonal)."
        )

    def _explain_product(self) -> str:
        kept, batches = len(self._linearised), self.objective.record.batches
        if batches is None:
            mix = f"{kept} batches kept so far" if kept else "nothing kept yet"
        else:
            mix = f"{kept} batches kept, {batches - kept} recomputed in each product"
        tapes = [entry.piece.on_tape for entry in self._linearised.values()]
        mix += f", {tapes.count(True)} replayed from tapes" if True in tapes else ""
        mix += f", {tapes.count(False)} whose calls may differ and are not" if False in tapes else ""
        return (
            f"double backward on one graph per batch, cache={self._policy!r} ({mix}), "
            f"columns together on small graphs and accelerators, else in turn"
        )

    def _formula(self) -> Formula:
        return Formula("leaf", f"{type(self).__name__}({', '.join(self._facts())})")

    def _facts(self) -> list[str]:
        """What `repr` says in the brackets."""
        n = self.objective.num_data
        facts = [f"P={self.objective.selection.size:,}", f"N={'?' if n is None else f'{n:,}'}"]
        if self.objective.likelihood is not None:
            facts.append(self.objective.likelihood.name)
        return facts


def by_columns(
    product: Callable[[Tensor], Tensor], size: int, step: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`product` of the identity of that size, at most `step` of its columns at a time."""
    dense: Tensor | None = None
    for start in range(0, size, step):
        unit = torch.zeros(size, min(step, size - start), dtype=dtype, device=device)
        unit[start : start + unit.shape[1]].fill_diagonal_(1.0)
        block = product(unit)
        if unit.shape[1] == size:
            return block
        if dense is None:
            dense = block.new_empty(len(block), size)
        dense[:, start : start + unit.shape[1]] = block
    return torch.empty(0, 0, dtype=dtype, device=device) if dense is None else dense


def averaged(M: Tensor) -> Tensor:
    """(M + Mᵀ)/2 in place, tile by tile, so that no second matrix is made."""
    rows = 512
    for start in range(0, len(M), rows):
        here = slice(start, start + rows)
        for end in range(start, len(M), rows):
            there = slice(end, end + rows)
            mean = (M[here, there] + M[there, here].T) / 2
            M[here, there], M[there, here] = mean, mean.T
    return M
