"""The same matrix with its entries in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import LinearOperator, Scalar
from curvops.operators.diagonal import Diagonal, Identity, diagonal_of
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class Permuted(LinearOperator):
    """`A[order][:, order] = Π A Πᵀ` for an order of all entries: every verb is A's, between two gathers of O(P).

    Args:
        operator: A, square.
        order: `(P,)` integers, each of 0 … P − 1 once: entry i here is entry `order[i]` of A.
    """

    def __init__(self, operator: LinearOperator, order: Tensor) -> None:
        rows, columns = operator.shape
        # as_tensor would carry a tensor off to torch's default device
        order = order.to(operator.device) if isinstance(order, Tensor) else torch.tensor(order, device=operator.device)
        if rows != columns:
            raise ShapeError(f"Permuted expects a square operator; {operator!r} is {rows} x {columns}.")
        if order.is_floating_point() or not torch.equal(order.sort().values, torch.arange(rows, device=order.device)):
            raise ShapeError(f"Permuted expects each of 0 … {rows - 1} once, got {order.dtype} {tuple(order.shape)}.")
        super().__init__((rows, rows), operator.dtype, operator.device, memory_budget=operator.memory_budget)
        self.operator, self.order, self.inverse_order = operator, order, order.argsort()

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    @property
    def is_psd(self) -> bool:
        return self.operator.is_psd

    @property
    def lower_bound(self) -> float | None:
        return self.operator.lower_bound

    @property
    def layout(self) -> None:
        return None  # A's names are of A's order

    def _matmat(self, V: Tensor) -> Tensor:
        return self._between(self.operator._apply, V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return self._between(self.operator._rapply, V)

    def _exact(self, verb_name: str) -> str | None:
        return self.operator._exact(verb_name)

    def _has_spectral(self) -> bool:
        return self.operator._has_spectral()

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen
        from curvops.operators.submatrix import Submatrix

        part = self.operator._spectral()
        every = torch.arange(len(part.values), device=self.device)
        return Eigen(Submatrix(part.Q, self.order, every), part.values, part.rest, floor=part.floor)

    def _solve(self, B: Tensor) -> Tensor:
        return self._between(self.operator._solve, B)

    def _logdet(self) -> Tensor:
        return self.operator._logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self.operator._slogdet()

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal()[self.order]

    def _trace(self) -> Tensor:
        return self.operator._trace()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self._between(lambda X: self.operator._function(f, X), V)

    def _inverse_root(self, E: Tensor) -> Tensor:
        return self.operator._inverse_root(E)[self.order]

    def _power_apply(self, power: float, V: Tensor) -> Tensor:
        return self._between(lambda X: self.operator._power_apply(power, X), V)

    def _hadamard_square(self) -> LinearOperator:
        return Permuted(self.operator._hadamard_square(), self.order)

    def _dense(self) -> Tensor:
        return self.operator._dense()[self.order][:, self.order]

    def _transpose(self) -> LinearOperator:
        return Permuted(self.operator.T, self.order)

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return Permuted(factor * self.operator, self.order)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        part = self._part_of(other)
        return None if part is None else Permuted(self.operator + part, self.order)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        part = self._part_of(other)
        return None if part is None else Permuted(self.operator @ part, self.order)

    def _inverse(self) -> LinearOperator:
        return Permuted(self.operator.inverse(), self.order)

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        return self.operator.submatrix(self.order[rows], self.order[columns])

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Permuted(self.operator._to(dtype, device), self.order.to(device))

    def _formula(self) -> Formula:
        return Formula("function", "Permuted", (self.operator._formula(),))

    def _between(self, product: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return product(V[self.inverse_order])[self.order]

    def _part_of(self, other: LinearOperator) -> LinearOperator | None:
        """`other` in A's order, where it keeps its structure there."""
        if isinstance(other, Identity):
            return other
        d = diagonal_of(other)
        if d is not None:
            return Diagonal(d[self.inverse_order])
        same = isinstance(other, Permuted) and torch.equal(other.order, self.order)
        return other.operator if same else None  # type: ignore[union-attr]
