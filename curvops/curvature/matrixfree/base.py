"""Operators that sum over a data set: the one place where batches are gone through and linearisations kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from curvops.curvature.objective import Objective
from curvops.errors import UnsupportedError
from curvops.memory import columns_within
from curvops.nets.batches import Batch
from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator
from curvops.operators.formula import Formula

Cache = Literal["auto"] | bool


class Piece(Protocol):
    """One batch's share of an operator, on a kept graph."""

    @property
    def outputs(self) -> Tensor:
        """f of the batch, detached."""
        ...

    @property
    def graph_bytes(self) -> int:
        """Bytes that it holds, with those that its first product will add; costs a walk over the graph."""
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
        self._sizes: dict[int, int] = {}
        self._generation = objective.refresh()

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
        if room <= 0:
            piece.release()
            return 0
        size = self._sizes[batch.index] = piece.graph_bytes
        if size > room:
            piece.release()
            return 0
        self._linearised[batch.index] = _Kept(batch, piece, size)
        return size

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
        """Ranges of columns whose transients fit into a quarter of the budget.

        A column's transients are taken to be a graph's size, or four parameter vectors where those are larger.
        """
        if columns <= 1:  # nothing to divide, and a product with one vector shall not walk over the graph
            yield from [(0, columns)] * columns
            return
        if batch.index not in self._sizes:
            self._sizes[batch.index] = piece.graph_bytes
        per_column = max(self._sizes[batch.index], 4 * self.objective.selection.size * self.dtype.itemsize)
        step = columns_within(self.objective.budget() // 4, self.device, per_column, columns)
        for start in range(0, columns, step):
            yield start, min(start + step, columns)

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
        dense = by_columns(self._apply, self.shape[1], 1024, self.dtype, self.device)
        return (dense + dense.T) / 2 if self.is_symmetric else dense

    def _check_content(self) -> None:
        self.objective.refresh()  # an answer from what is kept makes no pass that would look
        self.objective.watch.check_content()

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
        kept = f"{len(self._linearised)} batches kept" if self._linearised else "nothing kept yet"
        return (
            f"double backward on one graph per batch, cache={self._policy!r} ({kept}); "
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
    blocks = []
    for start in range(0, size, step):
        unit = torch.zeros(size, min(step, size - start), dtype=dtype, device=device)
        unit[start : start + unit.shape[1]].fill_diagonal_(1.0)
        blocks.append(product(unit))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
