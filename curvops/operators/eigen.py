"""Matrices known by an eigendecomposition: every verb in closed form.

A = Q diag(λ) Qᵀ                    Q square orthogonal (dense, Kronecker, block-diagonal or the identity)
A = Q diag(λ − ρ) Qᵀ + ρ I          Q thin orthonormal (P, r): eigenvalue ρ on the complement of its range
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.operators.base import LinearOperator, Scalar, number
from curvops.operators.diagonal import Identity
from curvops.operators.formula import Formula, size_text


class Eigen(LinearOperator):
    """`Q diag(λ) Qᵀ` with orthonormal columns Q.

    Products cost two products with Q; logdet and trace O(r). Damping and powers act on λ, so that one decomposition
    serves every δ and every power.

    Args:
        Q: `(P, r)` tensor or operator with orthonormal columns (not checked).
        values: `(r,)` eigenvalues in the order of Q's columns.
        rest: Eigenvalue on the complement of Q's range when r < P (0 by default).
        floor: A proven lower bound on the spectrum, where the values themselves have rounding.
    """

    def __init__(
        self, Q: Tensor | LinearOperator, values: Tensor, rest: Scalar = 0.0, *, floor: float | None = None
    ) -> None:
        from curvops.operators.dense import as_operator

        self.Q = as_operator(Q)
        size, rank = self.Q.shape
        if tuple(values.shape) != (rank,):
            raise ShapeError(f"Eigen: Q is {size} x {rank}, so values must be ({rank},); got {tuple(values.shape)}.")
        super().__init__((size, size), self.Q.dtype, self.Q.device, is_symmetric=True)
        self.values, self.rest, self.thin, self.floor = values, rest, rank < size, floor

    @property
    def lower_bound(self) -> float:
        low = float(self.values.detach().min()) if len(self.values) else torch.inf
        low = min(low, number(self.rest)) if self.thin else low
        return low if self.floor is None else max(low, self.floor)

    @property
    def is_psd(self) -> bool:
        return self.lower_bound >= 0

    def _bound_is_free(self) -> bool:
        return False

    def _matmat(self, V: Tensor) -> Tensor:
        return self._with(self.values, self.rest, V)

    def _has_spectral(self) -> bool:
        return True

    def _spectral(self) -> Eigen:
        return self

    def _exact(self, verb_name: str) -> str | None:
        return "eigendecomposition"

    def _solve(self, B: Tensor) -> Tensor:
        inverse, rest = self._map(_reciprocal(self._tolerance()))
        X = self._with(inverse, rest, B)
        if self._is_singular():
            kept, kept_rest = self._map(lambda x: (x.detach().abs() > self._tolerance()).to(self.dtype))
            unreached = (B - self._with(kept, kept_rest, B)).detach().norm(dim=0)
            rounding = 100 * torch.finfo(self.dtype).eps * self.shape[0] ** 0.5
            if bool((unreached > rounding * B.detach().norm(dim=0)).any()):
                raise NotPositiveDefiniteError(
                    f"solve: {self!r} is singular and the right-hand side is not in its range (distance "
                    f"{float(unreached.max()):.2g}); add a diagonal, or project the right-hand side."
                )
        return X

    def _logdet(self) -> Tensor:
        if self.lower_bound <= self._tolerance():
            raise NotPositiveDefiniteError(
                f"logdet: the smallest eigenvalue of {self!r} is {self.lower_bound:.3g}, which is not above 0 beyond "
                f"rounding; add a diagonal larger than {max(0.0, -self.lower_bound) + self._tolerance():.2g}."
            )
        logs, rest = self._map(torch.log)
        return logs.sum() + (self.shape[0] - len(self.values)) * rest

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        signs, rest_sign = self._map(torch.sign)
        logs, rest_log = self._map(lambda x: x.abs().log())
        missing = self.shape[0] - len(self.values)
        return signs.detach().prod() * rest_sign.detach() ** missing, logs.sum() + missing * rest_log

    def _diagonal(self) -> Tensor:
        inside = self.Q._hadamard_square()._apply(self.values[:, None])[:, 0]
        return inside + self._rest() * _outside(self.Q) if self.thin else inside

    def _trace(self) -> Tensor:
        return self.values.sum() + (self.shape[0] - len(self.values)) * self._rest()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self._with(*self._map(f), V)

    def _power(self, power: float) -> Eigen:
        """`A^p`; p < 0 needs definiteness, other fractional p semidefiniteness (rounding below 0 is clipped)."""
        low, tolerance = self.lower_bound, self._tolerance()
        if power != int(power) and low < -tolerance:
            raise NotPositiveDefiniteError(
                f"power {power} of {self!r}: its smallest eigenvalue is {low:.3g}; add a diagonal above {-low:.3g}."
            )
        if power < 0 and abs(low) <= tolerance:
            raise NotPositiveDefiniteError(f"power {power} of {self!r}: it is singular; add a diagonal first.")
        clip = power != int(power)
        values, rest = self._map(lambda x: (x.clamp_min(0.0) if clip else x) ** power)
        return Eigen(self.Q, values, rest)

    def _inverse(self) -> LinearOperator | None:
        return None if self._is_singular() else Eigen(self.Q, *self._map(torch.reciprocal))

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return Eigen(self.Q, factor * self.values, factor * self.rest)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Eigen) and other.Q is self.Q:
            return Eigen(self.Q, self.values + other.values, self.rest + other.rest)
        return self._shift(other.scale) if isinstance(other, Identity) else None

    def _shift(self, delta: Scalar) -> Eigen:
        """`A + δI`. Eigenvalues that are negative by no more than rounding count as 0 below a positive δ."""
        low, floor, values = self.lower_bound, None, self.values
        if number(delta) > 0 and low >= -self._tolerance():
            values, floor = values.clamp_min(0.0) if low < 0 else values, number(delta) + max(low, 0.0)
        return Eigen(self.Q, values + delta, self.rest + delta, floor=floor)

    def _holds_tensors(self) -> bool:
        return True

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.Q,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        rest = self.rest.to(device, dtype) if isinstance(self.rest, Tensor) else self.rest
        return Eigen(self.Q._to(dtype, device), self.values.to(device, dtype), rest)

    def _formula(self) -> Formula:
        return Formula("leaf", f"Eigen({size_text(self.Q._known_shape())})")

    def _with(self, values: Tensor, rest: Scalar, V: Tensor) -> Tensor:
        C = self.Q._rapply(V)
        if not self.thin or (not isinstance(rest, Tensor) and rest == 0):
            return self.Q._apply(values[:, None] * C)
        outweighed = len(values) == 0 or abs(number(rest)) <= float(values.detach().abs().min())
        if outweighed or not _is_inside(V, C):
            return self.Q._apply((values - rest)[:, None] * C) + rest * V
        # With a large rest (inverses) that would be a difference of numbers much larger than itself.
        R = V - self.Q._apply(C)
        E = self.Q._rapply(R)  # rounding: what R still has of the range
        return self.Q._apply(values[:, None] * (C + E) - rest * E) + rest * R

    def _map(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """f of the values and of the rest (whose f is not taken when Q is square)."""
        return f(self.values), f(self._rest()) if self.thin else torch.zeros_like(self._rest())

    def _rest(self) -> Tensor:
        return torch.as_tensor(self.rest, dtype=self.dtype, device=self.device)

    def _tolerance(self) -> float:
        """Eigenvalues below it are rounding of the largest; 0 where a floor above 0 is proven."""
        if self.floor is not None and self.floor > 0:
            return 0.0
        largest = float(self.values.detach().abs().max()) if len(self.values) else 0.0
        largest = max(largest, abs(number(self.rest))) if self.thin else largest
        return _rounding(self.Q) * largest

    def _is_singular(self) -> bool:
        magnitudes = self.values.detach().abs()
        smallest = float(magnitudes.min()) if len(magnitudes) else torch.inf
        return min(smallest, abs(number(self.rest)) if self.thin else torch.inf) <= self._tolerance()


def _rounding(Q: LinearOperator) -> float:
    """Relative rounding of eigenvalues whose vectors are Q: √n units per dense basis, none where Q is the identity."""
    from curvops.operators.kronecker import Kronecker
    from curvops.operators.submatrix import Submatrix

    if isinstance(Q, Identity):
        return 0.0
    if isinstance(Q, Submatrix):  # rows of Q in another order
        return _rounding(Q.operator)
    if isinstance(Q, Kronecker):
        return sum(_rounding(factor) for factor in Q.factors)
    return 4 * Q.shape[0] ** 0.5 * torch.finfo(Q.dtype).eps


def _is_inside(V: Tensor, C: Tensor) -> bool:
    """Whether hardly anything of some column of V lies outside the range in which it has the coefficients C."""
    inside, whole = (t.detach().norm(dim=0, dtype=torch.float64) for t in (C, V))
    return bool((inside > 0.95 * whole).any())


def _outside(Q: LinearOperator) -> Tensor:
    """diag(I − QQᵀ) `(P,)`: what of each unit vector lies outside Q's range, also where that is next to nothing.

    Cost: O(P r), and O(P r) more for each of the at most 1.1 r unit vectors of which it is little.
    """
    from curvops.operators.kronecker import Kronecker
    from curvops.operators.submatrix import Submatrix

    if Q.shape[0] == Q.shape[1]:
        return torch.zeros(Q.shape[0], dtype=Q.dtype, device=Q.device)
    if isinstance(Q, Submatrix) and len(Q.columns) == Q.operator.shape[1]:
        return _outside(Q.operator)[Q.rows]
    if isinstance(Q, Kronecker):
        first, *others = (_outside(factor) for factor in Q.factors)
        for other in others:  # 1 − (1 − a)(1 − b) = a + (1 − a) b
            first = (first[:, None] + (1 - first)[:, None] * other).reshape(-1)
        return first
    M = Q._dense()
    outside = 1 - M.square().sum(1)
    few = (outside.detach() < 0.1).nonzero()[:, 0]
    # Their difference from 1 is rounding; that of (I − QQᵀ) e shows in its square but squared.
    residuals = (-M[few] @ M.T).scatter_add(1, few[:, None], torch.ones_like(M[few, :1]))
    return outside.index_copy(0, few, residuals.square().sum(1))


def _reciprocal(tolerance: float) -> Callable[[Tensor], Tensor]:
    def pseudo_inverse(x: Tensor) -> Tensor:
        small = x.abs() <= tolerance
        return torch.where(small, 0.0, 1.0 / torch.where(small, 1.0, x))

    return pseudo_inverse
