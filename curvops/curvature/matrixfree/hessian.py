"""The Hessian of the negative log-likelihood, by double backward on a kept gradient graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from curvops.curvature.matrixfree.base import Cache, DataOperator
from curvops.curvature.objective import Objective, Options
from curvops.nets.batches import Batch
from curvops.nets.products import HessianProduct


class Hessian(DataOperator):
    """The exact Hessian of `Σ −log p(y | f(x))`, P x P, symmetric, indefinite in general (Pearlmutter 1994).

    Args:
        model, likelihood, data, cache, options: As for `GGN`.

    Cost: the first product costs about four gradients, each further one about two.
    """

    def __init__(
        self, model: nn.Module, likelihood: Any, data: Any, *, cache: Cache = "auto", **options: Unpack[Options]
    ) -> None:
        self._begin(Objective(model, likelihood, data, **options), cache=cache)

    def _build(self, batch: Batch) -> HessianProduct:
        objective = self.objective
        assert objective.likelihood is not None
        # Targets are checked before the loss is differentiated, so that a wrong shape is named and not broadcast.
        if not objective._checked:
            objective.likelihood.check(objective.network.evaluate(batch.x), batch.y)
        return HessianProduct(objective.network, objective.selection, objective.likelihood, batch.x, batch.y)

    def _product(self, V: Tensor) -> Tensor:
        return self._sum(V, lambda piece, W: piece.matmat(W))
