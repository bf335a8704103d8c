"""`GGNInterface`: the generalised Gauss–Newton matrix, or the Monte-Carlo Fisher, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.matrixfree.cotangents import Cotangents, FisherKind
from curvops.curvature.objective import Objective
from curvops.curvature.structured.diagonal import DiagonalGGN
from curvops.errors import UnsupportedError
from curvops.nets.categorical import Categorical
from curvops.nets.likelihoods import Bernoulli, Normal
from curvops.operators.base import LinearOperator


class GGNInterface(CurvatureInterface):
    """The GGN `Σ Jᵀ Λ J`, which for the three named likelihoods is the Fisher; native, by double backward.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator: As for
            `CurvatureInterface`.
        stochastic: Sample the targets from the model instead: the Monte-Carlo Fisher, whose mean is the GGN. Every call
            draws anew from the interface's generator; the operator it returns stays the same matrix.
        num_samples: Draws per datum (and position), averaged.

    Example:
        >>> import torch
        >>> from curvops.curvature import GGNInterface
        >>> backend = GGNInterface(torch.nn.Linear(3, 2), "classification")
        >>> loss, H = backend.full(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> H
        GGN(P=8, N=5, classification)
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, generator)
        self.stochastic, self.num_samples = bool(stochastic), num_samples

    @property
    def num_samples(self) -> int:
        """Draws per datum (and position), averaged; may be set."""
        return self._num_samples

    @num_samples.setter
    def num_samples(self, number: int) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"num_samples={number!r}: expected a whole number of at least 1.")
        self._num_samples = number

    @property
    def _fisher(self) -> FisherKind:  # type: ignore[override]
        return "mc" if self.stochastic else "exact"

    def _full(self, objective: Objective) -> LinearOperator:
        return self._cotangents().operator(objective)

    def _diag(self, objective: Objective) -> LinearOperator:
        self._require_root(self._fisher)
        return DiagonalGGN.of(objective, self._cotangents())

    def _cotangents(self) -> Cotangents:
        """What is pulled back: the root of Λ, or draws from a fresh seed."""
        if self.stochastic:
            return Cotangents("mc", self.num_samples, self._seed())
        return Cotangents("exact")

    def _get_mc_functional_fisher(self, f: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C C"]:
        """Fisher of the outputs by sampling: the mean of g gᵀ, g = ∇_f(−log p(ŷ | f)), over `num_samples` draws.

        Args:
            f: Outputs `(B, C)` or `(B, T, C)`.

        Returns:
            One C x C block per datum (and position); its mean over draws is Λ.

        Raises:
            UnsupportedError: The likelihood's curvature depends on the observed targets (weights, smoothing, custom).
        """
        y = _stand_in_targets(self.likelihood, self._likelihood, f)
        draws = [self._likelihood.pseudo_gradients(f, y, self._generator) for _ in range(self.num_samples)]
        g = torch.stack(draws, -1) / math.sqrt(self.num_samples)
        return g @ g.transpose(-1, -2)

    def _get_functional_hessian(self, f: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C C"] | None:
        """Λ of the outputs, `(B, C, C)`; None for the regression of unit variance, where it is the identity.

        Raises:
            UnsupportedError: As for `_get_mc_functional_fisher`.
        """
        if isinstance(self._likelihood, Normal) and self._likelihood.sigma == 1.0:
            return None
        return self._likelihood.output_hessian(f, _stand_in_targets(self.likelihood, self._likelihood, f))


def _stand_in_targets(given: Any, likelihood: Any, f: Tensor) -> Tensor:
    """Any valid targets, for likelihoods whose Λ does not depend on them."""
    if isinstance(likelihood, Normal) or (isinstance(likelihood, Bernoulli) and likelihood.pos_weight is None):
        return torch.zeros_like(f)
    if isinstance(likelihood, Categorical) and likelihood.weight is None:
        return torch.zeros(f.shape[:-1], dtype=torch.long, device=f.device)
    raise UnsupportedError(
        f"the curvature of {given!r} depends on the observed targets, which f alone does not tell; use "
        "full() with stochastic=True, or co.MCFisher"
    )
