"""Kronecker products of two or more factors.

K = F₁ ⊗ F₂ ⊗ … ,   K vec(X) = vec(F₁ X F₂ᵀ) for two factors and row-major vec
K⁻¹ = F₁⁻¹ ⊗ F₂⁻¹ ,   log|det K| = Σᵢ (P / nᵢ) log|det Fᵢ| ,   Fᵢ = Qᵢ Λᵢ Qᵢᵀ  ⇒  K = (⊗Qᵢ) (⊗Λᵢ) (⊗Qᵢ)ᵀ
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import LinearOperator
from curvops.operators.dense import as_operator, dense_copy, dense_route
from curvops.operators.formula import Formula, times_text

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class Kronecker(LinearOperator):
    """`F₁ ⊗ F₂ ⊗ …` of tensors or operators; products O(P Σ nᵢ), decompositions O(Σ nᵢ³).

    A sum with a multiple of the identity, a scalar factor and powers keep the closed forms, through the factors'
    eigendecompositions, computed at first need.
    """

    def __init__(self, *factors: Tensor | LinearOperator) -> None:
        if len(factors) < 1:
            raise ShapeError("Kronecker expects at least one factor, got none.")
        self.factors = tuple(as_operator(factor) for factor in factors)
        if len({(f.dtype, f.device) for f in self.factors}) > 1:
            raise ShapeError(f"Kronecker: factors of {[(f.dtype, str(f.device)) for f in self.factors]}; expected one.")
        shape = (math.prod(f.shape[0] for f in self.factors), math.prod(f.shape[1] for f in self.factors))
        super().__init__(shape, self.factors[0].dtype, self.factors[0].device)

    @property
    def is_symmetric(self) -> bool:
        return all(factor.is_symmetric for factor in self.factors)

    @property
    def is_psd(self) -> bool:
        return all(factor.is_psd for factor in self.factors)

    @property
    def lower_bound(self) -> float | None:
        bounds = [factor.lower_bound for factor in self.factors]
        if any(bound is None or bound < 0 for bound in bounds):
            return None
        return math.prod(bound for bound in bounds if bound is not None)

    def _matmat(self, V: Tensor) -> Tensor:
        return mode_products([factor._apply for factor in self.factors], self._sizes(1), V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return mode_products([factor._rapply for factor in self.factors], self._sizes(0), V)

    def _exact(self, verb_name: str) -> str | None:
        if verb_name == "dense":
            return "Kronecker product of the factors"
        if not all(factor.shape[0] == factor.shape[1] for factor in self.factors):
            return None
        every_factor = all(factor._exact(verb_name) for factor in self.factors)
        if verb_name in ("diagonal", "trace") and every_factor:
            return f"Kronecker product of the factors' {verb_name}s"
        if self._has_spectral():
            return "Kronecker eigendecomposition"
        return "factor by factor" if verb_name in ("solve", "slogdet") and every_factor else None

    def _has_spectral(self) -> bool:
        return self.is_symmetric and all(factor._has_spectral() or dense_route(factor) for factor in self.factors)

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        closed = (factor if factor._has_spectral() else dense_copy(factor) for factor in self.factors)
        parts = [factor._spectral() for factor in closed]
        values = parts[0].values
        for part in parts[1:]:
            values = torch.kron(values, part.values)
        return Eigen(Kronecker(*(part.Q for part in parts)), values)

    def _solve(self, B: Tensor) -> Tensor:
        if self._has_spectral():
            return self._spectral()._solve(B)
        return mode_products([factor._solve for factor in self.factors], self._sizes(0), B)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign = torch.ones((), dtype=self.dtype, device=self.device)
        logabs = torch.zeros((), dtype=self.dtype, device=self.device)
        for factor in self.factors:
            copies = self.shape[0] // factor.shape[0]
            factor_sign, factor_log = factor._slogdet()
            sign, logabs = sign * factor_sign**copies, logabs + copies * factor_log
        return sign, logabs

    def _diagonal(self) -> Tensor:
        diagonal = self.factors[0]._diagonal()
        for factor in self.factors[1:]:
            diagonal = torch.kron(diagonal, factor._diagonal())
        return diagonal

    def _trace(self) -> Tensor:
        return torch.stack([factor._trace() for factor in self.factors]).prod()

    def _dense(self) -> Tensor:
        product = self.factors[0]._dense()
        for factor in self.factors[1:]:
            # torch.kron (2.14) refuses factors of some memory layouts.
            pairs = product[:, None, :, None] * factor._dense()[None, :, None, :]
            product = pairs.reshape(product.shape[0] * factor.shape[0], -1)
        return product

    def _transpose(self) -> LinearOperator:
        return Kronecker(*(factor.T for factor in self.factors))

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Kronecker) or len(other.factors) != len(self.factors):
            return None
        if self._sizes(1) != other._sizes(0):
            return None
        return Kronecker(*(mine @ theirs for mine, theirs in zip(self.factors, other.factors, strict=True)))

    def _hadamard_square(self) -> LinearOperator:
        return Kronecker(*(factor._hadamard_square() for factor in self.factors))

    def _children(self) -> tuple[LinearOperator, ...]:
        return self.factors

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Kronecker(*(factor._to(dtype, device) for factor in self.factors))

    def _formula(self) -> Formula:
        notes = dict.fromkeys(note for factor in self.factors for note in factor._formula().notes)
        if all(factor.shape[0] == factor.shape[1] for factor in self.factors):
            sizes = times_text([factor.shape[0] for factor in self.factors])
        else:
            sizes = ", ".join(times_text(factor.shape) for factor in self.factors)
        return Formula("leaf", f"Kronecker({sizes})", notes=tuple(notes))

    def _sizes(self, axis: int) -> list[int]:
        return [factor.shape[axis] for factor in self.factors]


def mode_products(products: list[Callable[[Tensor], Tensor]], sizes: list[int], V: Tensor) -> Tensor:
    """Apply the i-th map along the i-th mode of V `(∏ sizes, K)` seen as a tensor of shape `(*sizes, K)`."""
    X, columns = V, V.shape[1]
    for product, size in zip(products, sizes, strict=True):
        # The leading mode is multiplied and then moved behind the others, so that after the last one all are in order.
        rest = X.numel() // (size * columns)
        X = product(X.reshape(size, rest * columns))
        X = X.reshape(X.shape[0], rest, columns).transpose(0, 1)
    return X.reshape(-1, columns)
