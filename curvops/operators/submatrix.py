"""Selected rows and columns of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import LinearOperator
from curvops.operators.formula import Formula, times_text
from curvops.operators.permuted import Permuted


def select(operator: LinearOperator, rows: Tensor, columns: Tensor) -> LinearOperator:
    """`operator[rows][:, columns]`, in the operator's own structure where it has one."""
    rows = _checked(rows, operator.shape[0], "row", operator)
    columns = _checked(columns, operator.shape[1], "column", operator)
    simpler = operator._submatrix(rows, columns)
    if simpler is not None:
        return simpler
    whole = len(rows) == operator.shape[0] == operator.shape[1] and torch.equal(rows, columns)
    return Permuted(operator, rows) if whole else Submatrix(operator, rows, columns)


class Submatrix(LinearOperator):
    """`A[rows][:, columns]`: scatter, multiply, gather; a product costs one of A's."""

    def __init__(self, operator: LinearOperator, rows: Tensor, columns: Tensor) -> None:
        super().__init__(
            (len(rows), len(columns)), operator.dtype, operator.device, memory_budget=operator.memory_budget
        )
        self.operator, self.rows, self.columns = operator, rows, columns
        self.principal = torch.equal(rows, columns)

    @property
    def is_symmetric(self) -> bool:
        return self.principal and self.operator.is_symmetric

    @property
    def is_psd(self) -> bool:
        return self.principal and self.operator.is_psd

    @property
    def lower_bound(self) -> float | None:
        return self.operator.lower_bound if self.principal else None  # Cauchy interlacing

    @property
    def layout(self) -> None:
        return None  # the selected entries need not fill whole parameters

    def _matmat(self, V: Tensor) -> Tensor:
        full = V.new_zeros(self.operator.shape[1], V.shape[1]).index_copy(0, self.columns, V)
        return self.operator._apply(full)[self.rows]

    def _rmatmat(self, V: Tensor) -> Tensor:
        full = V.new_zeros(self.operator.shape[0], V.shape[1]).index_copy(0, self.rows, V)
        return self.operator._rapply(full)[self.columns]

    def _exact(self, verb_name: str) -> str | None:
        inherited = verb_name in ("diagonal", "trace") and self.principal
        return self.operator._exact("diagonal") if inherited else None

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal()[self.rows]

    def _trace(self) -> Tensor:
        return self._diagonal().sum()

    def _hadamard_square(self) -> LinearOperator:
        return Submatrix(self.operator._hadamard_square(), self.rows, self.columns)

    def _transpose(self) -> LinearOperator:
        return Submatrix(self.operator.T, self.columns, self.rows)

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        return select(self.operator, self.rows[rows], self.columns[columns])

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Submatrix(self.operator._to(dtype, device), self.rows.to(device), self.columns.to(device))

    def _formula(self) -> Formula:
        return Formula("selection", times_text((len(self.rows), len(self.columns))), (self.operator._formula(),))


def _checked(indices: Tensor, size: int, kind: str, operator: LinearOperator) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = torch.as_tensor(indices)
    if indices.dtype == torch.bool and tuple(indices.shape) == (size,):
        indices = indices.nonzero()[:, 0]
    if indices.dim() != 1 or indices.is_floating_point() or not len(indices):
        raise ShapeError(f"submatrix: {kind} indices must be a non-empty vector of integers; got {indices.dtype}, "
                         f"shape {tuple(indices.shape)}.")  # fmt: skip
    indices = indices.to(operator.device, torch.long)
    if int(indices.min()) < 0 or int(indices.max()) >= size:
        raise ShapeError(f"submatrix: {kind} indices must lie in 0..{size - 1} for {operator!r}.")
    if len(indices.unique()) != len(indices):
        raise ShapeError(f"submatrix: {kind} indices repeat; each may be selected once.")
    return indices
