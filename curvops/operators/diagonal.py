"""Diagonal matrices: a vector, a multiple of the identity, and nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError, UnsupportedError
from curvops.operators import formula
from curvops.operators.base import LinearOperator, Scalar, number
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class Diagonal(LinearOperator):
    """`diag(d)` for a vector d `(P,)`; every verb O(P)."""

    def __init__(self, d: Tensor) -> None:
        if not isinstance(d, Tensor) or d.dim() != 1:
            raise ShapeError(f"Diagonal expects a vector (P,), got {_described(d)}.")
        super().__init__((len(d), len(d)), d.dtype, d.device, is_symmetric=True)
        self.d = d

    @property
    def lower_bound(self) -> float:
        return float(self.d.detach().min()) if len(self.d) else 0.0

    @property
    def is_psd(self) -> bool:
        return self.lower_bound >= 0

    def _matmat(self, V: Tensor) -> Tensor:
        return self.d[:, None] * V

    def _has_spectral(self) -> bool:
        return True

    def _exact(self, verb_name: str) -> str | None:
        return "elementwise"

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        return Eigen(Identity(self.shape[0], self.dtype, self.device), self.d)

    def _diagonal(self) -> Tensor:
        return self.d.clone()

    def _dense(self) -> Tensor:
        return torch.diag(self.d)

    def _holds_tensors(self) -> bool:
        return True

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return Diagonal(factor * self.d)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        d = diagonal_of(other)
        return None if d is None else Diagonal(self.d + d)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        d = diagonal_of(other)
        return None if d is None else Diagonal(self.d * d)

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator | None:
        return Diagonal(self.d[rows]) if torch.equal(rows, columns) else None

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Diagonal(self.d.to(device, dtype))

    def _bound_is_free(self) -> bool:
        return False


class Identity(LinearOperator):
    """`scale · I`; the scale may be a 0-dim tensor that gradients reach."""

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        scale: Scalar = 1.0,
    ) -> None:
        super().__init__((size, size), dtype, device, is_symmetric=True)
        self.scale = scale

    @property
    def lower_bound(self) -> float:
        return number(self.scale)

    @property
    def is_psd(self) -> bool:
        return self.lower_bound >= 0

    def _matmat(self, V: Tensor) -> Tensor:
        return self.scale * V

    def _has_spectral(self) -> bool:
        return True

    def _exact(self, verb_name: str) -> str | None:
        return "multiple of the identity"

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        return Eigen(Identity(self.shape[0], self.dtype, self.device), self._diagonal())

    def _diagonal(self) -> Tensor:
        return self.scale * torch.ones(self.shape[0], dtype=self.dtype, device=self.device)

    def _dense(self) -> Tensor:
        return self.scale * torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _holds_tensors(self) -> bool:
        return True

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return Identity(self.shape[0], self.dtype, self.device, factor * self.scale)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Identity):
            return Identity(self.shape[0], self.dtype, self.device, self.scale + other.scale)
        d = diagonal_of(other)
        return None if d is None else Diagonal(self.scale + d)

    def _times(self, other: LinearOperator) -> LinearOperator:
        return self.scale * other

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator | None:
        if not torch.equal(rows, columns):
            return None
        return Identity(len(rows), self.dtype, self.device, self.scale)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        scale = self.scale.to(device, dtype) if isinstance(self.scale, Tensor) else self.scale
        return Identity(self.shape[0], dtype, device, scale)

    def _formula(self) -> Formula:
        return Formula("scaled", formula.scalar_text(self.scale), (Formula("leaf", "I"),))

    def _hadamard_square(self) -> LinearOperator:
        return Identity(self.shape[0], self.dtype, self.device, self.scale * self.scale)


class Zero(LinearOperator):
    """The matrix of zeros, which `A - A` simplifies to."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        square = shape[0] == shape[1]
        super().__init__(shape, dtype, device, is_symmetric=square, is_psd=square)

    def _matmat(self, V: Tensor) -> Tensor:
        return 0.0 * V.sum(0) + V.new_zeros(self.shape[0], 1)  # a gradient of zeros, as a dense matrix gives

    def _rmatmat(self, V: Tensor) -> Tensor:
        return 0.0 * V.sum(0) + V.new_zeros(self.shape[1], 1)

    def _exact(self, verb_name: str) -> str | None:
        return "zero matrix" if verb_name == "dense" or self.is_symmetric else None

    def _solve(self, B: Tensor) -> Tensor:
        if bool((B.detach() != 0).any()):
            raise NotPositiveDefiniteError(
                f"solve with {self!r}: no solution exists for a right-hand side other than 0."
            )
        return torch.zeros_like(B)

    def _logdet(self) -> Tensor:
        raise NotPositiveDefiniteError(f"logdet of {self!r}: it is singular; add a diagonal first.")

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return zero, zero - torch.inf

    def _diagonal(self) -> Tensor:
        return torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)

    def _trace(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return f(self._trace()) * V

    def _power_apply(self, power: float, V: Tensor) -> Tensor:
        if power < 0:
            raise NotPositiveDefiniteError(f"power {power} of {self!r}: it is singular; add a diagonal first.")
        return torch.zeros_like(V)

    def _dense(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def _holds_tensors(self) -> bool:
        return True

    def _transpose(self) -> LinearOperator:
        return Zero((self.shape[1], self.shape[0]), self.dtype, self.device)

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return self

    def _plus(self, other: LinearOperator) -> LinearOperator:
        return other

    def _times(self, other: LinearOperator) -> LinearOperator:
        return Zero((self.shape[0], other.shape[1]), self.dtype, self.device)

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        return Zero((len(rows), len(columns)), self.dtype, self.device)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Zero(self.shape, dtype, device)

    def _formula(self) -> Formula:
        return Formula("leaf", "0")


def diagonal_of(operator: LinearOperator) -> Tensor | None:
    """The diagonal `(P,)` of an operator that is diagonal by type, otherwise None."""
    from curvops.operators.blockdiagonal import BlockDiagonal

    if isinstance(operator, Diagonal):
        return operator.d
    if isinstance(operator, Identity):
        return operator._diagonal()
    if isinstance(operator, BlockDiagonal):
        parts = [diagonal_of(block) for block in operator.blocks]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    return None


def is_diagonal(operator: LinearOperator) -> bool:
    """Whether the operator is known to be diagonal, also where its entries are not computed yet."""
    from curvops.operators.deferred import Deferred

    if isinstance(operator, Deferred):
        return issubclass(operator.kind, Diagonal | Identity)
    return isinstance(operator, Diagonal | Identity)


def is_zero(scalar: Scalar) -> bool:
    """Whether a scalar is the number 0 and nothing that gradients could reach."""
    return not isinstance(scalar, Tensor) and scalar == 0


def damping(delta: Scalar | Mapping[str, Scalar], operator: LinearOperator) -> LinearOperator:
    """δ as a diagonal operator that fits `operator`: scalar, `(P,)` tensor, or dict name → scalar or tensor."""
    if isinstance(delta, Mapping):
        return _named_damping(delta, operator)
    size, dtype, device = operator.shape[0], operator.dtype, operator.device
    if isinstance(delta, Tensor):
        delta = delta.to(device, dtype)
    finite = bool(torch.isfinite(delta.detach()).all()) if isinstance(delta, Tensor) else math.isfinite(delta)
    if not finite:
        raise DataError(f"add_diagonal: δ holds NaN or Inf; expected finite numbers for {operator!r}.")
    if not isinstance(delta, Tensor) or delta.dim() == 0:
        return Identity(size, dtype, device, delta)
    if tuple(delta.shape) != (size,):
        raise ShapeError(
            f"add_diagonal: δ has shape {tuple(delta.shape)}, expected a scalar, ({size},) or a dict from "
            f"parameter name to scalar or tensor for {operator!r}."
        )
    return Diagonal(delta)


def _named_damping(delta: Mapping[str, Scalar], operator: LinearOperator) -> LinearOperator:
    from curvops.operators.blockdiagonal import BlockDiagonal

    layout = operator.layout
    if layout is None:
        raise UnsupportedError(
            f"add_diagonal: got a dict, and {operator!r} does not know parameter names; pass a scalar or a (P,) tensor."
        )
    if set(delta) != set(layout):
        missing, unknown = sorted(set(layout) - set(delta)), sorted(set(delta) - set(layout))
        raise ShapeError(
            f"add_diagonal: the dict misses {missing} and does not know {unknown}; expected {list(layout)}."
        )
    blocks = []
    for name, where in layout.items():
        value, size = delta[name], where.stop - where.start
        part = Identity(size, operator.dtype, operator.device)
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.numel() != size:
                raise ShapeError(f"add_diagonal: δ[{name!r}] has {value.numel()} entries, expected {size} or a scalar.")
            value = value.reshape(-1)
        blocks.append(damping(value, part))
    return BlockDiagonal(*blocks, layout=layout)


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
