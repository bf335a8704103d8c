"""The inverse as an operator: its products are solves, its closed forms those of the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator, number
from curvops.operators.composites import Scaled
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal, Identity
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


def invert(operator: LinearOperator) -> LinearOperator:
    """`operator⁻¹`: an inverse of an inverse and scalars simplify, nothing is computed."""
    if isinstance(operator, Inverse):
        return operator.operator
    if isinstance(operator, Scaled):
        return invert(operator.operator) * (1.0 / operator.factor)
    if isinstance(operator, Identity) and number(operator.scale) != 0:
        return Identity(operator.shape[0], operator.dtype, operator.device, 1.0 / operator.scale)
    if isinstance(operator, Diagonal) and bool((operator.d.detach() != 0).all()):
        return Diagonal(1.0 / operator.d)
    simpler = operator._inverse()
    return Inverse(operator) if simpler is None else simpler


class Inverse(LinearOperator):
    """`A⁻¹`; a product is a solve to A's default tolerance (a pseudo-inverse where A is singular and PSD)."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device, memory_budget=operator.memory_budget)
        self.operator = operator

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    @property
    def is_psd(self) -> bool:
        return self.operator.is_psd

    @property
    def lower_bound(self) -> float | None:
        return 0.0 if self.is_psd else None

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator.solve(V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        if self.is_symmetric:
            return self._matmat(V)
        return linear_map(V, self.operator.T.solve, self.operator.solve)

    def _exact(self, verb_name: str) -> str | None:
        if verb_name == "solve":
            return "product with the operator itself"
        if verb_name in ("logdet", "slogdet"):
            return self.operator._exact(verb_name)
        if self._has_spectral() and verb_name != "dense":
            return "eigendecomposition of the operator itself"
        return None

    def _has_spectral(self) -> bool:
        return self.operator._has_spectral()

    def _spectral(self) -> Eigen:
        return self.operator._spectral()._power(-1.0)

    def _solve(self, B: Tensor) -> Tensor:
        return self.operator._apply(B)

    def _logdet(self) -> Tensor:
        return -self.operator._logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = self.operator._slogdet()
        return sign, -logabs

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self.operator._function(lambda x: f(1.0 / x), V)

    def _inverse_root(self, E: Tensor) -> Tensor:
        return self.operator._spectral()._power(0.5)._matmat(E)

    def _dense(self) -> Tensor:
        matrix = self.operator.to_dense()
        if not self.is_symmetric:
            return torch.linalg.inv(matrix)
        return Dense(matrix, is_symmetric=True)._solve(torch.eye(len(matrix), dtype=self.dtype, device=self.device))

    def _diagonal(self) -> Tensor:
        return self._spectral()._diagonal()

    def _holds_tensors(self) -> bool:
        return self.operator._holds_tensors()

    def _transpose(self) -> LinearOperator:
        return Inverse(self.operator.T)

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Inverse(self.operator._to(dtype, device))

    def _formula(self) -> Formula:
        return Formula("inverse", children=(self.operator._formula(),))
