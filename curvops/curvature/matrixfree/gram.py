"""The curvature seen from function space: `B Bᵀ` (n x n), which shares its nonzero eigenvalues with `BᵀB`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from curvops.curvature.matrixfree.base import Cache, by_columns
from curvops.curvature.matrixfree.ggn import GGN, GaussNewton
from curvops.curvature.matrixfree.jacobian import (
    Factor,
    UnweightedGGN,
    function_space_size,
    known_function_space_size,
)
from curvops.curvature.objective import Objective, Options
from curvops.errors import UnsupportedError
from curvops.memory import Need, default_budget
from curvops.operators.base import LinearOperator
from curvops.operators.formula import Formula


class GramOf(LinearOperator):
    """`B Bᵀ` of a curvature `BᵀB`, n x n; a product costs two passes over the data's linearisations."""

    def __init__(self, curvature: GaussNewton) -> None:
        super().__init__((0, 0), curvature.dtype, curvature.device, is_psd=True, memory_budget=curvature.memory_budget)
        self.curvature = curvature
        self.factor = Factor(curvature)

    @property
    def shape(self) -> tuple[int, int]:
        n = function_space_size(self.curvature)
        return (n, n)

    def _known_shape(self) -> tuple[int | None, int | None]:
        n = known_function_space_size(self.curvature)
        return (n, n)

    def _matmat(self, V: Tensor) -> Tensor:
        return self.factor._apply(self.factor._rapply(V))

    def _dense(self) -> Tensor:
        known = self._known()
        return self._made() if known is None else known.clone()

    def _dense_kept(self) -> Tensor:
        """The dense matrix; kept with the curvature's graphs where it takes at most a quarter of the budget."""
        known = self._known()
        if known is not None:
            return known
        with torch.inference_mode(False):
            made = self._made()
        if 4 * made.nbytes <= self._budget():
            self.curvature._cache["gram"] = (self.curvature.objective.refresh(), made)
        return made

    def _known(self) -> Tensor | None:
        generation, known = self.curvature._cache.get("gram", (None, None))
        return known if generation == self.curvature.objective.refresh() else None

    def _budget(self) -> int:
        return default_budget(self.device) if self.memory_budget is None else self.memory_budget

    def _made(self) -> Tensor:
        n, size = self.factor.shape
        from curvops.curvature.matrixfree.layerdense import gram_from_layers

        budget = self._budget()
        dense = gram_from_layers(self.curvature, budget)
        if dense is not None:
            return dense
        # All of B at once is one product per row; without room for it, blocks of its rows go back through B.
        if n * size * self.dtype.itemsize <= budget // 2:
            B = self.factor._dense()
            return B @ B.T
        step = max(1, min(n, (budget // 4) // (size * self.dtype.itemsize)))
        dense = by_columns(self._apply, n, step, self.dtype, self.device)
        return (dense + dense.T) / 2

    def _dense_need(self) -> Need:
        """The result alone: what makes it keeps to the budget."""
        return Need(self.shape[0] ** 2 * self.dtype.itemsize)

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.curvature,)

    @property
    def layout(self) -> None:
        return None

    def _holds_tensors(self) -> bool:
        return False

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        curvature = self.curvature._to(dtype, device)
        assert isinstance(curvature, GaussNewton)
        return GramOf(curvature)

    def _formula(self) -> Formula:
        return Formula("leaf", f"Gram({', '.join(self.curvature._facts())})")


class Gram(GramOf):
    """The Gram matrix `B Bᵀ` in function space, B = LᵀJ the factor of the GGN, n x n with n = N·C (or N·(C−1)).

    Args:
        model, likelihood, data, cache, options: As for `GGN`.
        weighted: False for `J Jᵀ`, the empirical neural tangent kernel (Jacot et al. 2018), N·C x N·C; the likelihood
            may then be None.

    Raises:
        UnsupportedError: A weighted Gram matrix of a likelihood that is not convex.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        weighted: bool = True,
        cache: Cache = "auto",
        **options: Unpack[Options],
    ) -> None:
        kind = GGN if weighted else UnweightedGGN
        curvature = kind.of(Objective(model, likelihood, data, **options), cache=cache)
        if not curvature.is_psd:
            raise UnsupportedError(
                f"Gram: {curvature.objective.likelihood!r} is not known to be convex in the outputs, so its Λ has no "
                "square root; pass is_convex=True to Likelihood.from_loss if it is, or weighted=False for J Jᵀ."
            )
        super().__init__(curvature)
