"""`A = BᵀB + D` seen from function space, where the matrix is n x n.

    log det A = log det D + log det(I + K) ,    A⁻¹ = D⁻¹ − D⁻¹ Bᵀ (I + K)⁻¹ B D⁻¹ ,    K = B D⁻¹ Bᵀ

For `D = δI`, `K = Gram / δ` with the Gram matrix `B Bᵀ`, so that log det A = (P − n) log δ + log det(δI + Gram).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import UnsupportedError
from curvops.linalg import dense
from curvops.memory import default_budget
from curvops.operators.diagonal import Diagonal, Identity, diagonal_of

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator, Scalar

MAX_ROWS = 12288
"""Largest n at which the n x n matrix is formed and factorised without being asked."""


class FunctionSpaceForm:
    """The pair (B, D) of `A = BᵀB + D` with D positive, and what it answers exactly.

    Attributes:
        operator: A.
    """

    def __init__(self, operator: LinearOperator, curvature: LinearOperator, damping: LinearOperator) -> None:
        self.operator, self.curvature, self.damping = operator, curvature, damping
        gram = curvature._gram()
        assert gram is not None
        self.gram = gram

    @property
    def rows(self) -> int:
        """n, the rows of B; may take a forward pass to find."""
        return self.gram.shape[0]

    @property
    def known_rows(self) -> int | None:
        """n as far as it is known without computing."""
        return self.gram._known_shape()[0]

    def algorithm(self, verb_name: str) -> str:
        """The algorithm's name for a verb."""
        identity = {"solve": "Woodbury", "logdet": "determinant lemma", "sample": "Matheron's rule"}[verb_name]
        return f"function space ({identity})"

    def is_affordable(self) -> bool:
        """Whether the n x n matrix, and B where D is not a multiple of the identity, fit."""
        size, itemsize = self.operator.shape[0], self.operator.dtype.itemsize
        needed = 4 * self.rows**2 + (0 if isinstance(self.damping, Identity) else 2 * self.rows * size)
        budget = self.operator.memory_budget
        budget = default_budget(self.operator.device) if budget is None else budget
        return self.rows <= MAX_ROWS and needed * itemsize <= budget

    def logdet(self) -> Tensor:
        """log det A; differentiable in D and in a scalar in front of the curvature."""
        L, _ = dense.cholesky(self._core(), jitter=False)
        return self._damping_vector_logdet() + dense.logdet_cholesky(L)

    def solve(self, B: Tensor) -> Tensor:
        """A⁻¹ B for columns."""
        factor = self._factor()
        L, _ = dense.cholesky(self._core(), jitter=False)
        scaled = self._undamped(B)
        return scaled - self._undamped(factor._rapply(dense.solve_cholesky(L, factor._apply(scaled))))

    def sample(self, noise: Callable[[int], Tensor]) -> Tensor:
        """Draws from N(0, A⁻¹): the prior's, corrected by noisy observations of them (Matheron's rule).

        Args:
            noise: `rows → (rows, n)` standard normal numbers, new at every call.
        """
        factor = self._factor()
        prior = noise(self.operator.shape[0]) / self._damping_vector().sqrt()[:, None]
        observed = factor._apply(prior) + noise(self.rows)
        L, _ = dense.cholesky(self._core(), jitter=False)
        return prior - self._undamped(factor._rapply(dense.solve_cholesky(L, observed)))

    def _core(self) -> Tensor:
        if isinstance(self.damping, Identity):
            kernel = self.gram.to_dense() / self.damping.scale
        else:
            rows = self._factor().to_dense()
            kernel = (rows / self._damping_vector()) @ rows.T
        return kernel.diagonal_scatter(kernel.diagonal() + 1.0)

    def _factor(self) -> LinearOperator:
        factor = self.curvature._factor()
        if factor is None:
            raise UnsupportedError(f"{self.curvature!r} does not give its factor B; use CG() or SLQ().")
        return factor

    def _damping_vector(self) -> Tensor:
        d = diagonal_of(self.damping)
        assert d is not None
        return d

    def _damping_vector_logdet(self) -> Tensor:
        if isinstance(self.damping, Identity):
            return self.operator.shape[0] * _log(self.damping.scale, self.operator)
        return self._damping_vector().log().sum()

    def _undamped(self, V: Tensor) -> Tensor:
        return V / self.damping.scale if isinstance(self.damping, Identity) else V / self._damping_vector()[:, None]


def function_space(operator: LinearOperator, *, must: bool = True) -> FunctionSpaceForm | None:
    """The function-space form of a sum of a curvature `BᵀB` and a positive diagonal.

    Raises:
        UnsupportedError: The operator is not such a sum and `must` is set.
    """
    from curvops.operators.arithmetic import Sum

    if isinstance(operator, Sum) and len(operator.terms) == 2:
        for curvature, damping in (operator.terms, operator.terms[::-1]):
            is_diagonal = isinstance(damping, Identity | Diagonal) or diagonal_of(damping) is not None
            bound = damping.lower_bound
            if is_diagonal and bound is not None and bound > 0 and curvature._gram() is not None:
                return FunctionSpaceForm(operator, curvature, damping)
    if must:
        raise UnsupportedError(
            f"FunctionSpace() needs a curvature with a Gram operator (GGN, MCFisher, EmpiricalFisher) plus a positive "
            f"diagonal; got {operator!r}. Use Cholesky(), CG() or SLQ()."
        )
    return None


def _log(scale: Scalar, like: LinearOperator) -> Tensor:
    return torch.as_tensor(scale, dtype=like.dtype, device=like.device).log()
