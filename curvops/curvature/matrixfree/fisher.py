"""Fisher information matrices from gradients: Monte-Carlo over sampled targets, and empirical over the observed ones.

MC Fisher        (1/S) Σ_n Σ_s ĝ ĝᵀ ,  ĝ = Jᵀ ∇_f(−log p(ŷ | f)) ,  ŷ ~ p(· | f)
empirical Fisher       Σ_n     g gᵀ ,  g = Jᵀ ∇_f(−log p(y | f))
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from curvops.curvature.matrixfree.base import Cache
from curvops.curvature.matrixfree.forms import ExampleForm, Form, RootForm
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.objective import Objective, Options
from curvops.linalg.probes import resolve_seed
from curvops.nets.batches import Batch

Datum = Literal["token", "example"]


class MCFisher(GaussNewton):
    """The Fisher matrix with targets sampled from the model (Martens 2020, §5), summed over the data.

    Its mean over draws is the GGN. The draws depend on (seed, position of the datum, sample) alone, so that every
    product is with the same matrix, however the data are batched.

    Args:
        model, likelihood, data, cache, options: As for `GGN`.
        num_samples: Draws per datum (and position), averaged.
        generator: Gives the operator's seed when it is built (and so advances); None for seed 0.

    Cost: as for `GGN`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        cache: Cache = "auto",
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
            raise ValueError(f"MCFisher(num_samples={num_samples}): expected a whole number of at least 1.")
        objective = Objective(model, likelihood, data, **options)
        self._begin(objective, cache=cache, num_samples=num_samples, seed=resolve_seed(generator))

    def _begin(
        self, objective: Objective, *, cache: Cache = "auto", num_samples: int = 1, seed: int = 0, **facts: Any
    ) -> None:
        objective.needed_likelihood()
        super()._begin(objective, cache=cache, is_psd=True)
        self.num_samples, self.seed = num_samples, seed

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "num_samples": self.num_samples, "seed": self.seed}

    def _form(self, batch: Batch, f: Tensor) -> Form:
        draw = self.objective.needed_likelihood().pseudo_gradients_at
        draws = [
            draw(f, batch.y, seed=self.seed, position=batch.position, sample=sample)
            for sample in range(self.num_samples)
        ]
        return RootForm(torch.stack(draws, -1) / math.sqrt(self.num_samples))

    def _rows(self, outputs: tuple[int, ...]) -> int:
        return math.prod(outputs[:-1]) * self.num_samples

    def _facts(self) -> list[str]:
        return [*super()._facts(), f"samples={self.num_samples}"]


class EmpiricalFisher(GaussNewton):
    """The empirical Fisher `Σ ∇log p ∇log pᵀ` of the observed targets (Kunstner et al. 2019), summed over the data.

    The laplace-compatible `EFInterface` scales differently for regression; see its page.

    Args:
        model, likelihood, data, cache, options: As for `GGN`.
        datum: What one term is where outputs are sequences `(B, T, C)`: each "token", or each "example" with the
            gradients of its tokens summed first.

    Cost: as for `GGN`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        datum: Datum = "token",
        cache: Cache = "auto",
        **options: Unpack[Options],
    ) -> None:
        if datum not in ("token", "example"):
            raise ValueError(f'EmpiricalFisher(datum={datum!r}): expected "token" or "example".')
        self._begin(Objective(model, likelihood, data, **options), cache=cache, datum=datum)

    def _begin(self, objective: Objective, *, cache: Cache = "auto", datum: Datum = "token", **facts: Any) -> None:
        objective.needed_likelihood()
        super()._begin(objective, cache=cache, is_psd=True)
        self.datum: Datum = datum

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "datum": self.datum}

    def _form(self, batch: Batch, f: Tensor) -> Form:
        g = self.objective.needed_likelihood().gradient(f, batch.y)
        return ExampleForm(g) if self.datum == "example" else RootForm(g.unsqueeze(-1))

    def _rows(self, outputs: tuple[int, ...]) -> int:
        return 1 if self.datum == "example" else math.prod(outputs[:-1])

    def _facts(self) -> list[str]:
        return [*super()._facts(), *(["per example"] if self.datum == "example" else [])]
