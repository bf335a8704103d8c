"""Which columns of outputs a layerwise curvature pulls back: the roots S of Λ = S Sᵀ, one datum and position at a time.

A curvature `Σ Jᵀ Λ J` is `Σ_k (Jᵀ u_k)(Jᵀ u_k)ᵀ` over the columns u_k of the roots. Without sequences the columns of
different data never meet, and R columns, one for each of a root's, serve the whole batch at once. In a sequence the
positions of one example meet again in its parameters, so that each position needs columns of its own, T·R in all,
unless they are told apart by independent random signs: then R columns have the right mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from curvops.curvature.matrixfree.fisher import Datum, EmpiricalFisher, MCFisher
from curvops.curvature.matrixfree.ggn import GGN, GaussNewton
from curvops.curvature.matrixfree.jacobian import UnweightedGGN
from curvops.curvature.matrixfree.roots import Given, OfLikelihood, Root
from curvops.curvature.objective import Objective
from curvops.errors import UnsupportedError
from curvops.linalg.probes import resolve_seed
from curvops.nets import draws
from curvops.nets.batches import Batch
from curvops.nets.head import Head
from curvops.nets.likelihood import Likelihood

FisherKind = Literal["exact", "mc", "empirical", "identity"]
Tokens = Literal["separate", "sketched", "auto"]

SEPARATE_UP_TO = 256
"""Columns per example up to which `tokens="auto"` keeps the positions of a sequence apart."""

_FEW = 4
"""Columns up to which a faster forward outweighs slower passes."""

_SIGNS = 7
"""Stream of the random signs, apart from the draws of targets."""


@dataclass(frozen=True)
class Cotangents:
    """The columns of one kind of Fisher matrix.

    Attributes:
        fisher: "exact" (the GGN), "mc" (targets sampled from the model), "empirical" (the observed targets), or
            "identity" (no likelihood: the Jacobian's own rows).
        num_samples: Samples per datum for "mc", averaged.
        seed: Of the samples and of the random signs.
        datum: "empirical": what one term is in a sequence.
        tokens: How the positions of a sequence are told apart: "separate" columns, "sketched" by random signs, or
            "auto": separate up to 256 columns.
        joint: "mc": pull the samples of a sequence's positions back together; they are independent, so that the mean is
            the same, and the sum is another than that of `MCFisher`.
    """

    fisher: FisherKind = "exact"
    num_samples: int = 1
    seed: int = 0
    datum: Datum = "token"
    tokens: Tokens = "separate"
    joint: bool = True

    @property
    def few(self) -> bool:
        """Whether there are but a few columns for each batch, whatever its outputs."""
        return (
            self.num_samples <= _FEW
            if self.fisher == "mc" and self.joint
            else self.fisher == "empirical" and self.datum == "example"
        )

    @classmethod
    def like(cls, curvature: GaussNewton) -> Self | None:
        """The columns whose sum is exactly that operator; None where there are none."""
        if not curvature.is_psd:
            return None
        if type(curvature) is GGN:
            return cls()
        if type(curvature) is MCFisher:
            return cls("mc", curvature.num_samples, curvature.seed, joint=False)
        if type(curvature) is EmpiricalFisher:
            return cls("empirical", datum=curvature.datum)
        return cls("identity") if type(curvature) is UnweightedGGN else None

    @classmethod
    def chosen(
        cls,
        who: str,
        fisher: FisherKind,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        datum: Datum = "token",
        tokens: Tokens = "separate",
    ) -> Self:
        """Checked arguments of a constructor named `who`; a generator gives the seed, and so advances.

        Raises:
            ValueError: An argument is none of those known.
        """
        known: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
            ("fisher", fisher, ("exact", "mc", "empirical")),
            ("datum", datum, ("token", "example")),
            ("tokens", tokens, ("separate", "sketched", "auto")),
        )
        for name, value, allowed in known:
            if value not in allowed:
                raise ValueError(f"{who}({name}={value!r}): expected one of {', '.join(map(repr, allowed))}.")
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
            raise ValueError(f"{who}(num_samples={num_samples}): expected a whole number of at least 1.")
        return cls(fisher, num_samples, resolve_seed(generator), datum, tokens)

    def operator(self, objective: Objective) -> GaussNewton:
        """The matrix-free operator of the same curvature (for "mc": of the same distribution)."""
        if self.fisher == "exact":
            return GGN.of(objective)
        if self.fisher == "mc":
            return MCFisher.of(objective, num_samples=self.num_samples, seed=self.seed)
        return EmpiricalFisher.of(objective, datum=self.datum)

    def of(self, likelihood: Likelihood | None, f: Tensor, batch: Batch) -> Columns:
        """The columns of one batch with outputs f. O(f · R).

        Raises:
            UnsupportedError: Λ has no root, since the likelihood is not convex.
        """
        if self.fisher == "identity" or likelihood is None:
            C = f.shape[-1]
            S = torch.eye(C, dtype=f.dtype, device=f.device).expand(*f.shape, C)
            return Columns(Given(S), apart=f.dim() == 3 and f.shape[1] > 1)
        if self.fisher == "mc":
            sampled = [
                likelihood.pseudo_gradients_at(f, batch.y, seed=self.seed, position=batch.position, sample=s)
                for s in range(self.num_samples)
            ]
            apart = not self.joint and f.dim() == 3 and f.shape[1] > 1
            one = self.num_samples == 1
            S = sampled[0].unsqueeze(-1) if one else torch.stack(sampled, -1) / math.sqrt(self.num_samples)
            return Columns(Given(S), apart)
        if self.fisher == "empirical":
            root: Root = Given(likelihood.gradient(f, batch.y).unsqueeze(-1))
            if self.datum == "example":
                return Columns(root, apart=False)
        else:
            if not likelihood.is_convex:
                raise UnsupportedError(
                    f"the {likelihood.name} likelihood is not convex, so that its output Hessian has no root to pull "
                    "back; use GGN (matrix-free) or BlockHessian"
                )
            root = OfLikelihood(likelihood, f, batch.y)
        columns = Columns(root, apart=f.dim() == 3 and f.shape[1] > 1)
        if not columns.apart or self.tokens == "separate":
            return columns
        if self.tokens == "auto" and columns.count <= SEPARATE_UP_TO:
            return columns
        positions = torch.arange(batch.position, batch.position + len(f), device="cpu")
        numbers = draws.uniforms(self.seed, positions, 0, f.shape[1], stream=_SIGNS, device=f.device)
        return Columns(root, apart=False, signs=numbers.sub(0.5).sign().to(f.dtype))

    def separate(self) -> Cotangents:
        """The same with the positions of a sequence kept apart."""
        return replace(self, tokens="separate")


@dataclass(frozen=True)
class Columns:
    """Those of `root`; `apart` where each position has columns of its own, else perhaps a random sign."""

    root: Root
    apart: bool
    signs: Float[Tensor, "B T"] | None = None

    @property
    def count(self) -> int:
        """K, columns in all."""
        return self.root.shape[-1] * (self.root.shape[1] if self.apart else 1)

    def through(self, head: Head) -> Columns:
        """Columns of the head's features that say the same, no more of them than there are features."""
        # Columns first in memory, since they are taken one by one.
        S = head.root(self.root.through).movedim(-1, 0).contiguous().movedim(0, -1)
        return replace(self, root=Given(S.unflatten(0, self.root.shape[:-2])))

    def chunks(self, step: int) -> Iterator[Float[Tensor, "*f k"]]:
        """The columns in groups of at most `step`, each `(*f.shape, k)`."""
        S = self.root.matrix()
        for start in range(0, self.count, step):
            stop = min(self.count, start + step)
            if not self.apart:
                some = S[..., start:stop]
                yield some if self.signs is None else some * self.signs[..., None, None]
                continue
            R = S.shape[-1]
            number = torch.arange(start, stop, device=S.device)
            chosen = S[..., number % R]  # (B, T, C, k)
            here = torch.arange(S.shape[1], device=S.device)[:, None, None] == number // R
            yield torch.where(here, chosen, 0)
