"""An operator from a function: the door for matrices that live elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator
from curvops.operators.formula import Formula, size_text

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


class Closure(LinearOperator):
    """A matrix known by `matvec`, which must be linear and is not differentiated through.

    Args:
        matvec: `(columns,)` → `(rows,)`, or `(columns, K)` → `(rows, K)` when `batched`.
        shape: Rows and columns.
        dtype: Element type of vectors.
        device: Device of vectors.
        rmatvec: The transposed product; not needed when symmetric.
        batched: Whether the functions take columns; otherwise they are called once per column.
        is_symmetric: Whether the matrix is symmetric.
        is_psd: Whether it is positive semidefinite.
        lower_bound: A proven lower bound on the spectrum.
        name: How `repr` calls it.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        batched: bool = False,
        is_symmetric: bool = False,
        is_psd: bool = False,
        lower_bound: float | None = None,
        name: str = "Closure",
    ) -> None:
        super().__init__(shape, dtype, device, is_symmetric=is_symmetric, is_psd=is_psd, lower_bound=lower_bound)
        self.function_, self.adjoint_, self.batched, self.name = matvec, rmatvec, batched, name

    @classmethod
    def from_scipy(cls, operator: ScipyOperator | Any, *, dtype: torch.dtype | None = None, **facts: Any) -> Closure:
        """A SciPy `LinearOperator`, sparse or dense array as an operator on tensors.

        Args:
            operator: Anything that `scipy.sparse.linalg.aslinearoperator` takes.
            dtype: float32 or float64; that of `operator` by default (float64 where it has neither).
            facts: `is_symmetric`, `is_psd`, `lower_bound`, `name`, `device`, as for `Closure`.
        """
        from curvops.linalg.scipy import from_scipy

        matmat, rmatmat = from_scipy(operator)
        if dtype is None:
            dtype = torch.float32 if str(getattr(operator, "dtype", "")) == "float32" else torch.float64
        return cls(matmat, operator.shape, dtype=dtype, rmatvec=rmatmat, batched=True, **facts)

    def _matmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._product, self._adjoint)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._adjoint, self._product)

    def _product(self, V: Tensor) -> Tensor:
        return self._call(self.function_, V, self.shape[0])

    def _adjoint(self, V: Tensor) -> Tensor:
        if self.is_symmetric:
            return self._product(V)
        if self.adjoint_ is None:
            raise UnsupportedError(
                f"{self!r} has no transposed product (gradients need it too); give rmatvec=, or is_symmetric=True."
            )
        return self._call(self.adjoint_, V, self.shape[1])

    def _call(self, function: Callable[[Tensor], Tensor], V: Tensor, rows: int) -> Tensor:
        V = V.detach()
        result = function(V) if self.batched else torch.stack([function(column) for column in V.unbind(1)], 1)
        if tuple(result.shape) != (rows, V.shape[1]) or result.dtype != self.dtype:
            raise ShapeError(
                f"the function of {self!r} returned {result.dtype} of shape {tuple(result.shape)} for {V.shape[1]} "
                f"columns; expected {self.dtype} of shape ({rows}, {V.shape[1]})."
            )
        return result.detach()

    def _formula(self) -> Formula:
        return Formula("leaf", f"{self.name}({size_text(self.shape)})")

    def __reduce__(self) -> Any:
        raise UnsupportedError(f"{self!r} holds a function and cannot be pickled; save the data it is built from.")
