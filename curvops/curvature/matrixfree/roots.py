"""The roots S of Λ = S Sᵀ that columns are taken from, as far as they are needed: S itself, W S, or Σ Λ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvops.nets.likelihood import Likelihood

ENTRIES = 2**20
"""Of W S at a time."""


class Root(Protocol):
    """S `(*f.shape, R)`, one for each datum and position."""

    @property
    def shape(self) -> torch.Size:
        """S's."""
        ...

    def matrix(self) -> Float[Tensor, "*f R"]:
        """S."""
        ...

    def through(self, W: Float[Tensor, "d C"]) -> Iterator[Float[Tensor, "n d Q"]]:
        """W S, or W times another root of Λ, some data and positions after the other."""
        ...

    def moment(self) -> Float[Tensor, "C C"] | None:
        """Σ Λ over data and positions; None where it is not had for less than by summing over S."""
        ...


@dataclass(frozen=True)
class Given:
    """S as it is."""

    S: Float[Tensor, "*f R"]

    @property
    def shape(self) -> torch.Size:
        return self.S.shape

    def matrix(self) -> Float[Tensor, "*f R"]:
        return self.S

    def through(self, W: Float[Tensor, "d C"]) -> Iterator[Float[Tensor, "n d R"]]:
        S = self.S.flatten(0, -3)
        return (W @ S[rows] for rows in _rows(S.shape, len(W)))

    def moment(self) -> None:
        return None


@dataclass(frozen=True)
class OfLikelihood:
    """The root of a likelihood's output Hessian, computed anew whenever asked for."""

    likelihood: Likelihood
    f: Float[Tensor, "*f"]
    y: Shaped[Tensor, "*_"]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.f.shape, self.likelihood.rank(self.f.shape[-1])))

    @torch.no_grad()
    def matrix(self) -> Float[Tensor, "*f R"]:
        return self.likelihood.output_hessian_sqrt(self.f, self.y)

    def through(self, W: Float[Tensor, "d C"]) -> Iterator[Float[Tensor, "n d Q"]]:
        if not self._has("output_hessian_sqrt_through"):
            # Without a closed form the root is had of all data at once, where it shows whether they are coupled.
            return Given(self.matrix()).through(W)
        # Positions are data to a closed form.
        f, y = self.f.flatten(0, -2), self.y.flatten(0, self.f.dim() - 2)
        parts = ((f[rows], y[rows]) for rows in _rows(torch.Size((len(f), *self.shape[-2:])), len(W)))
        return (self.likelihood.output_hessian_sqrt_through(f, y, W) for f, y in parts)

    @torch.no_grad()
    def moment(self) -> Float[Tensor, "C C"] | None:
        return self.likelihood.output_hessian_sum(self.f, self.y) if self._has("output_hessian_sum") else None

    def _has(self, method: str) -> bool:
        """Whether there is a closed form, written for the likelihood's own Λ and not for that of a class before it."""
        own = type(self.likelihood)
        written, roots = (next(c for c in own.__mro__ if name in vars(c)) for name in (method, "output_hessian_sqrt"))
        return written is not Likelihood and issubclass(written, roots)


def _rows(shape: torch.Size, d: int) -> Iterator[slice]:
    """Data in groups whose W S is not large, S `(N, C, R)`."""
    step = max(1, ENTRIES // max(1, d * shape[-1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))
