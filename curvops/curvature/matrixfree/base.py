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
        """Bytes that it holds."""
        ...

    def release(self) -> None:
        """Drop the graph."""
        ...


class DataOperator(LinearOperator):
    """An operator over a network and a data set; a subclass writes `_build` for one batch, and its products.

    Keeps the linearisation of as many batches as fit into half of the memory budget (`cache="auto"`), all of them
    (True) or none (False); the others are computed again in each product. A data set whose batches are all kept is not
    read again.
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
        self._kept: dict[int, tuple[Batch, Any]] = {}
        self._all_kept = False

    def _own(self) -> dict[str, Any]:
        """The class's own keywords, as `of` takes them."""
        return {"cache": self._policy}

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return type(self).of(self.objective.to(dtype, device), **self._own())

    # ---------------------------------------------------------------- one pass

    def _build(self, batch: Batch) -> Any:
        """The batch's `Piece`; one forward, which autograd records."""
        raise NotImplementedError

    def _pieces(self) -> Iterator[tuple[Batch, Any]]:
        """Every batch with its piece, in order; the pieces kept are not built again."""
        if self.objective.watch.check():
            self._forget()  # written in place with equal content: autograd would refuse the kept graphs
        if self._all_kept:
            yield from self._kept.values()
            return
        for batch in self.objective.batches():
            known = self._kept.get(batch.index)
            piece = self._build(batch) if known is None else known[1]
            self.objective.observe(batch, piece.outputs)
            yield batch, piece
            if known is None and self._may_keep(piece):
                self._kept[batch.index] = (batch, piece)
            elif known is None:
                piece.release()
        self._all_kept = len(self._kept) == self.objective.record.batches

    def _may_keep(self, piece: Any) -> bool:
        if self._policy != "auto":
            return bool(self._policy)
        held = sum(kept.graph_bytes for _, kept in self._kept.values())
        return 2 * (held + piece.graph_bytes) <= self.objective.budget() + held

    def _sum(self, V: Tensor, product: Any) -> Tensor:
        """Σ over batches of `product(piece, V)`, columns in chunks that fit into the budget."""
        total = torch.zeros_like(V)
        for _, piece in self._pieces():
            for start, stop in self._chunks(piece, V.shape[1]):
                total[:, start:stop] += product(piece, V[:, start:stop])
        return total

    def _chunks(self, piece: Piece, columns: int) -> Iterator[tuple[int, int]]:
        """Ranges of columns whose transients, of about a graph's size each, fit into a quarter of the budget."""
        budget = self.objective.budget() // 4
        per_column = max(piece.graph_bytes, 4 * self.objective.selection.size * self.dtype.itemsize)
        step = columns_within(budget, self.device, per_column, max(columns, 1))
        for start in range(0, columns, step):
            yield start, min(start + step, columns)

    def _forget(self) -> None:
        for _, piece in self._kept.values():
            piece.release()
        self._kept, self._all_kept = {}, False

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
        # One column chunk at a time, so that the identity is never held beside the result.
        size = self.shape[1]
        step = max(1, min(size, 1024))
        blocks = []
        for start in range(0, size, step):
            unit = torch.zeros(size, min(step, size - start), dtype=self.dtype, device=self.device)
            unit[torch.arange(start, start + unit.shape[1]), torch.arange(unit.shape[1])] = 1.0
            blocks.append(self._apply(unit))
        dense = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        return (dense + dense.T) / 2 if self.is_symmetric else dense

    def _check_content(self) -> None:
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
            f"{self!r} holds a network and cannot be pickled; save the model's state_dict and build the operator again, "
            f"or save to_dense() or a structured curvature (KFAC, diagonal)."
        )

    def _explain_product(self) -> str:
        kept = f"{len(self._kept)} batches kept" if self._kept else "nothing kept yet"
        return f"double backward on one graph per batch, cache={self._policy!r} ({kept})"

    def _formula(self) -> Formula:
        return Formula("leaf", f"{type(self).__name__}({', '.join(self._facts())})")

    def _facts(self) -> list[str]:
        """What `repr` says in the brackets."""
        n = self.objective.num_data
        facts = [f"P={self.objective.selection.size:,}", f"N={'?' if n is None else f'{n:,}'}"]
        if self.objective.likelihood is not None:
            facts.append(self.objective.likelihood.name)
        return facts
