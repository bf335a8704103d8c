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

    def _begin(self, objective: Objective, *, cache: Cache = "auto", **facts: Any) -> None:
        objective.needed_likelihood()
        super()._begin(objective, cache=cache)

    def _build(self, batch: Batch) -> HessianProduct:
        objective = self.objective
        return HessianProduct(objective.network, objective.selection, _CheckedLoss(objective), batch.x, batch.y)

    def _product(self, V: Tensor) -> Tensor:
        return self._sum(V, lambda piece, W: piece.matmat(W))


class _CheckedLoss:
    """The loss, outputs and targets checked before it sees them: a wrong shape is named and not broadcast."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        self._objective.check(f.detach(), y)
        return self._objective.needed_likelihood().loss(f, y)
