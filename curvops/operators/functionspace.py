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
from curvops.memory import Need, default_budget
from curvops.operators.blockdiagonal import BlockDiagonal
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
        """Whether the n x n matrix fits, and B where D is neither a multiple of the identity nor one per parameter."""
        if self.rows > MAX_ROWS:
            return False
        size, itemsize = self.operator.shape[0], self.operator.dtype.itemsize
        needed = 4 * self.rows**2
        if not isinstance(self.damping, Identity) and not self._is_weighted():
            needed += 2 * self.rows * size
        return needed * itemsize <= self._budget()

    def need(self) -> Need:
        """Memory of the verbs: the n x n matrix, two more on the way to its factor, and the pass that makes it."""
        rows, itemsize = self.rows, self.operator.dtype.itemsize
        need = self.curvature._product_need(1).beside(4 * rows * rows * itemsize)
        if isinstance(self.damping, Identity) or self._is_weighted():
            return need
        return need.beside(2 * rows * self.operator.shape[0] * itemsize)

    def logdet(self) -> Tensor:
        """log det A; differentiable in D and in a scalar in front of the curvature."""
        return self._damping_vector_logdet() + self.logdet_ratio()

    def logdet_ratio(self) -> Tensor:
        """log det A − log det D = log det(I + K) ≥ 0, without the cancellation of the difference; differentiable."""
        return dense.logdet_cholesky(self._cholesky())

    def solve(self, B: Tensor) -> Tensor:
        """A⁻¹ B for columns."""
        factor = self._factor()
        scaled = self._undamped(B)
        observed = dense.solve_cholesky(self._cholesky(), factor._apply(scaled))
        return scaled - self._undamped(factor._rapply(observed))

    def whitened(self, cross: Tensor) -> Tensor:
        """`L⁻¹ C` for C `(n, k)` and `L Lᵀ = I + K`: with `C = B D⁻¹ Rᵀ`, `R A⁻¹ Rᵀ = R D⁻¹ Rᵀ − (L⁻¹C)ᵀ(L⁻¹C)`."""
        return torch.linalg.solve_triangular(self._cholesky(), cross, upper=False)

    def weights(self) -> Tensor | None:
        """D⁻¹ as one number, 0-dim, or one per parameter of the layout, `(L,)`; None where it is neither."""
        if isinstance(self.damping, Identity):
            return 1 / torch.as_tensor(self.damping.scale, dtype=self.operator.dtype, device=self.operator.device)
        return None if (scales := self._scales()) is None else 1 / scales

    def sample(self, noise: Callable[[int], Tensor]) -> Tensor:
        """Draws from N(0, A⁻¹): the prior's, corrected by noisy observations of them (Matheron's rule).

        Args:
            noise: `rows → (rows, n)` standard normal numbers, new at every call.
        """
        factor = self._factor()
        prior = noise(self.operator.shape[0]) / self._damping_vector().sqrt()[:, None]
        observed = factor._apply(prior) + noise(self.rows)
        return prior - self._undamped(factor._rapply(dense.solve_cholesky(self._cholesky(), observed)))

    def _cholesky(self) -> Tensor:
        """L of `L Lᵀ = I + K`, kept with A where it takes at most a quarter of the budget and no gradient is asked."""

        def build() -> Tensor:
            return dense.cholesky(self._core(), jitter=False)[0]

        if 4 * self.rows**2 * self.operator.dtype.itemsize > self._budget():
            return build()
        return self.operator._kept("function space", build, *_tensors_within(self.operator))

    def _core(self) -> Tensor:
        kernel = self._kernel()
        if torch.is_grad_enabled() and kernel.requires_grad:
            return kernel.diagonal_scatter(kernel.diagonal() + 1.0)
        kernel.diagonal().add_(1.0)
        return kernel

    def _kernel(self) -> Tensor:
        """K, in memory of its own."""
        if isinstance(self.damping, Identity):
            return self.gram._dense_kept() / self.damping.scale
        weights = self.weights() if self._is_weighted() else None
        kernel = None if weights is None else self.curvature._weighted_gram(weights)
        if kernel is not None:
            return kernel
        rows = self._factor().to_dense()
        return (rows / self._damping_vector()) @ rows.T

    def _scales(self) -> Tensor | None:
        """D's number for each parameter of the curvature's layout, `(L,)`, where it is such."""
        layout = self.curvature.layout
        if layout is None or not isinstance(self.damping, BlockDiagonal):
            return None
        blocks = self.damping.blocks
        if self.damping.sizes != [where.stop - where.start for where in layout.values()]:
            return None
        scales = [block.scale for block in blocks if isinstance(block, Identity)]
        if len(scales) != len(blocks):
            return None
        like = {"dtype": self.operator.dtype, "device": self.operator.device}
        return torch.stack([torch.as_tensor(scale, **like) for scale in scales])

    def _is_weighted(self) -> bool:
        """Whether the layers give K with one weight per parameter."""
        return self._scales() is not None and self.curvature._weighs_parameters()

    def _budget(self) -> int:
        budget = self.operator.memory_budget
        return default_budget(self.operator.device) if budget is None else budget

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
    from curvops.operators.composites import Sum

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


def _tensors_within(operator: LinearOperator) -> list[Tensor]:
    """Tensors that an expression of operators holds: damping and factors."""
    held = [value for value in vars(operator).values() if isinstance(value, Tensor)]
    return held + [tensor for child in operator._children() for tensor in _tensors_within(child)]


def _log(scale: Scalar, like: LinearOperator) -> Tensor:
    return torch.as_tensor(scale, dtype=like.dtype, device=like.device).log()
