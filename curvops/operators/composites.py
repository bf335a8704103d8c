"""Sums, multiples, products and transposes as operators; `arithmetic` makes them, where nothing simpler will do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.memory import Need, in_turn
from curvops.operators.base import LinearOperator, Scalar, number
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal, Identity, diagonal_of, is_diagonal
from curvops.operators.formula import Formula, scalar_text
from curvops.operators.lowrank import WOODBURY, LowRank, LowRankPlusDiagonal

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class Sum(LinearOperator):
    """`A₁ + A₂ + …`; closed forms where the terms share an eigenbasis or are low rank with a diagonal."""

    def __init__(self, *terms: LinearOperator) -> None:
        self.terms = terms
        budgets = [term.memory_budget for term in terms if term.memory_budget is not None]
        super().__init__(
            terms[0].shape, terms[0].dtype, terms[0].device, memory_budget=min(budgets) if budgets else None
        )

    @property
    def is_symmetric(self) -> bool:
        return all(term.is_symmetric for term in self.terms)

    @property
    def is_psd(self) -> bool:
        bound = self.lower_bound
        return self.is_symmetric and bound is not None and bound >= 0

    @property
    def lower_bound(self) -> float | None:
        bounds = [term.lower_bound for term in self.terms]
        known = [bound for bound in bounds if bound is not None]
        return math.fsum(known) if len(known) == len(bounds) else None

    def _matmat(self, V: Tensor) -> Tensor:
        result = self.terms[0]._apply(V)
        for term in self.terms[1:]:
            result = result + term._apply(V)
        return result

    def _rmatmat(self, V: Tensor) -> Tensor:
        result = self.terms[0]._rapply(V)
        for term in self.terms[1:]:
            result = result + term._rapply(V)
        return result

    def _exact(self, verb_name: str) -> str | None:
        if verb_name in ("trace", "diagonal", "dense"):
            routes = [term._exact(verb_name) for term in self.terms]
            return None if any(route is None for route in routes) else "term by term"
        if all(is_diagonal(term) for term in self.terms):
            return "elementwise"
        shifted = self._shifted()
        if verb_name in WOODBURY and self._woodbury_parts() is not None:
            return WOODBURY[verb_name]
        return None if shifted is None else f"{shifted[0]._exact('function')}, shifted"

    def _has_spectral(self) -> bool:
        return all(is_diagonal(term) for term in self.terms) or self._shifted() is not None

    def _spectral(self) -> Eigen:
        if all(is_diagonal(term) for term in self.terms):
            return Diagonal(self._diagonal())._spectral()
        shifted = self._shifted()
        assert shifted is not None
        operator, identity = shifted
        return operator._spectral()._shift(identity.scale)

    def _solve(self, B: Tensor) -> Tensor:
        return self._closed_form()._solve(B)

    def _logdet(self) -> Tensor:
        return self._closed_form()._logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self._closed_form()._slogdet()

    def _inverse_root(self, E: Tensor) -> Tensor:
        return self._closed_form()._inverse_root(E)

    def _diagonal(self) -> Tensor:
        return torch.stack([term._diagonal() for term in self.terms]).sum(0)

    def _trace(self) -> Tensor:
        return torch.stack([term._trace() for term in self.terms]).sum()

    def _dense_need(self) -> Need:
        full = [term for term in self.terms if diagonal_of(term) is None]
        return in_turn(term._dense_need() for term in full).beside(self.shape[0] * self.shape[1] * self.dtype.itemsize)

    def _dense(self) -> Tensor:
        result = self.terms[0]._dense()
        for term in self.terms[1:]:
            d = diagonal_of(term)
            result = result + term._dense() if d is None else result.diagonal_scatter(result.diagonal() + d)
        return result

    def _transpose(self) -> LinearOperator:
        return Sum(*(term.T for term in self.terms))

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        first, *others = (term.submatrix(rows, columns) for term in self.terms)
        return sum(others, start=first)

    def _children(self) -> tuple[LinearOperator, ...]:
        return self.terms

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Sum(*(term._to(dtype, device) for term in self.terms))

    def _formula(self) -> Formula:
        return Formula("sum", children=tuple(term._formula() for term in self.terms))

    def _shifted(self) -> tuple[LinearOperator, Identity] | None:
        """The pair (A with an eigendecomposition, multiple of the identity), when the sum is one."""
        if len(self.terms) != 2:
            return None
        for operator, other in (self.terms, self.terms[::-1]):
            if isinstance(other, Identity) and operator._has_spectral():
                return operator, other
        return None

    def _woodbury_parts(self) -> tuple[LowRank, Tensor] | None:
        """The pair (low rank, positive diagonal), when the sum is one."""
        if len(self.terms) != 2:
            return None
        for operator, other in (self.terms, self.terms[::-1]):
            d = diagonal_of(other)
            positive = d is not None and bool((d.detach() > 0).all())
            if isinstance(operator, LowRank) and operator.rank < operator.shape[0] and d is not None and positive:
                return operator, d
        return None

    def _closed_form(self) -> LinearOperator:
        parts = self._woodbury_parts()
        # With δI the determinant lemma is also cheaper to differentiate than an eigendecomposition of equal values.
        return self._spectral() if parts is None else LowRankPlusDiagonal(*parts)


class Scaled(LinearOperator):
    """`c · A` with c a float or a 0-dim tensor that gradients reach."""

    def __init__(self, factor: Scalar, operator: LinearOperator) -> None:
        # Its shape is the operator's, which may take a forward pass to find.
        super().__init__((0, 0), operator.dtype, operator.device, memory_budget=operator.memory_budget)
        self.factor, self.operator = factor, operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    @property
    def is_psd(self) -> bool:
        return self.operator.is_psd and number(self.factor) >= 0

    @property
    def lower_bound(self) -> float | None:
        bound = self.operator.lower_bound
        return None if bound is None or number(self.factor) < 0 else number(self.factor) * bound

    def _matmat(self, V: Tensor) -> Tensor:
        return self.factor * self.operator._apply(V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return self.factor * self.operator._rapply(V)

    def _exact(self, verb_name: str) -> str | None:
        return self.operator._exact(verb_name)

    def _has_spectral(self) -> bool:
        return self.operator._has_spectral()

    def _spectral(self) -> Eigen:
        return self.operator._spectral()._scaled(self.factor)  # type: ignore[return-value]

    def _solve(self, B: Tensor) -> Tensor:
        return self.operator._solve(B) / self.factor

    def _logdet(self) -> Tensor:
        if self._has_spectral() or number(self.factor) <= 0:
            return self._spectral()._logdet()
        return self.operator._logdet() + self.shape[0] * self._log_factor()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = self.operator._slogdet()
        flip = -1.0 if number(self.factor) < 0 and self.shape[0] % 2 else 1.0
        return flip * sign, logabs + self.shape[0] * self._log_factor()

    def _diagonal(self) -> Tensor:
        return self.factor * self.operator._diagonal()

    def _trace(self) -> Tensor:
        return self.factor * self.operator._trace()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self.operator._function(lambda x: f(self.factor * x), V)

    def _inverse_root(self, E: Tensor) -> Tensor:
        return self.operator._inverse_root(E) / self._root()

    def _dense(self) -> Tensor:
        return self.factor * self.operator._dense_kept()

    def _gram(self) -> LinearOperator | None:
        gram = self.operator._gram() if number(self.factor) > 0 else None
        return None if gram is None else gram * self.factor

    def _factor(self) -> LinearOperator | None:
        factor = self.operator._factor() if number(self.factor) > 0 else None
        return None if factor is None else factor * self._root()

    def _weighs_parameters(self) -> bool:
        return number(self.factor) > 0 and self.operator._weighs_parameters()

    def _weighted_gram(self, weights: Tensor) -> Tensor | None:
        gram = self.operator._weighted_gram(weights) if number(self.factor) > 0 else None
        return None if gram is None else self.factor * gram

    def _root(self) -> Scalar:
        return self.factor.sqrt() if isinstance(self.factor, Tensor) else math.sqrt(self.factor)

    def _transpose(self) -> LinearOperator:
        return self.operator.T * self.factor

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        return self.operator.submatrix(rows, columns) * self.factor

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        factor = self.factor.to(device, dtype) if isinstance(self.factor, Tensor) else self.factor
        return Scaled(factor, self.operator._to(dtype, device))

    def _formula(self) -> Formula:
        return Formula("scaled", scalar_text(self.factor), (self.operator._formula(),))

    def _known_shape(self) -> tuple[int | None, int | None]:
        return self.operator._known_shape()

    def _log_factor(self) -> Tensor:
        return torch.as_tensor(self.factor, dtype=self.dtype, device=self.device).abs().log()


class Product(LinearOperator):
    """`A₁ @ A₂ @ …`; solves and determinants factor by factor where every factor is square."""

    def __init__(self, *factors: LinearOperator) -> None:
        self.factors = factors
        budgets = [factor.memory_budget for factor in factors if factor.memory_budget is not None]
        super().__init__(
            self._known_shape(), factors[0].dtype, factors[0].device, memory_budget=min(budgets) if budgets else None
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.factors[0].shape[0], self.factors[-1].shape[1])

    def _known_shape(self) -> tuple[int | None, int | None]:
        return (self.factors[0]._known_shape()[0], self.factors[-1]._known_shape()[1])

    @property
    def is_symmetric(self) -> bool:
        mirrored = zip(self.factors, reversed(self.factors), strict=True)
        return all(_is_transpose(left, right) for left, right in mirrored)

    @property
    def is_psd(self) -> bool:
        middle = self.factors[len(self.factors) // 2] if len(self.factors) % 2 else None
        return self.is_symmetric and (middle is None or middle.is_psd)

    @property
    def lower_bound(self) -> float | None:
        return 0.0 if self.is_psd else None

    def _matmat(self, V: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            V = factor._apply(V)
        return V

    def _rmatmat(self, V: Tensor) -> Tensor:
        for factor in self.factors:
            V = factor._rapply(V)
        return V

    def _exact(self, verb_name: str) -> str | None:
        if verb_name in ("solve", "slogdet"):
            shapes = [factor._known_shape() for factor in self.factors]
            square = all(rows == columns and rows is not None for rows, columns in shapes)
            return "factor by factor" if square and all(f._exact(verb_name) for f in self.factors) else None
        return None

    def _solve(self, B: Tensor) -> Tensor:
        for factor in self.factors:
            B = factor._solve(B)
        return B

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        signs, logs = zip(*(factor._slogdet() for factor in self.factors), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def _transpose(self) -> LinearOperator:
        return Product(*(factor.T for factor in reversed(self.factors)))

    def _children(self) -> tuple[LinearOperator, ...]:
        return self.factors

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Product(*(factor._to(dtype, device) for factor in self.factors))

    def _formula(self) -> Formula:
        return Formula("product", children=tuple(factor._formula() for factor in self.factors))


class Transpose(LinearOperator):
    """`Aᵀ`."""

    def __init__(self, operator: LinearOperator) -> None:
        # Its shape is the operator's, which may take a forward pass to find.
        super().__init__((0, 0), operator.dtype, operator.device, memory_budget=operator.memory_budget)
        self.operator = operator

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.operator.shape
        return (columns, rows)

    def _known_shape(self) -> tuple[int | None, int | None]:
        rows, columns = self.operator._known_shape()
        return (columns, rows)

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator._rapply(V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return self.operator._apply(V)

    def _exact(self, verb_name: str) -> str | None:
        return self.operator._exact(verb_name) if verb_name in ("slogdet", "trace", "diagonal", "dense") else None

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self.operator._slogdet()

    def _diagonal(self) -> Tensor:
        return self.operator._diagonal()

    def _trace(self) -> Tensor:
        return self.operator._trace()

    def _dense(self) -> Tensor:
        return self.operator._dense().T

    def _transpose(self) -> LinearOperator:
        return self.operator

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Transpose(self.operator._to(dtype, device))

    def _formula(self) -> Formula:
        return Formula("transpose", children=(self.operator._formula(),))


def _is_transpose(left: LinearOperator, right: LinearOperator) -> bool:
    if left is right:
        return left.is_symmetric
    if isinstance(left, Dense) and isinstance(right, Dense):
        return _is_transposed_view(left.M, right.M)
    pairs = ((left, right), (right, left))
    return any(isinstance(a, Transpose) and a.operator is b for a, b in pairs)


def _is_transposed_view(M: Tensor, N: Tensor) -> bool:
    """Whether N is M's memory read the other way round."""
    mirrored = M.shape == N.shape[::-1] and M.stride() == N.stride()[::-1]
    return mirrored and M.data_ptr() == N.data_ptr()
