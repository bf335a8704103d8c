"""The gradient of an estimated log-determinant, with its own standard error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.linalg.probes import rademacher
from curvops.operators import methods
from curvops.operators.autograd import estimate_with_gradient

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


class StochasticGradient:
    """The gradient of log det A, d logdet = tr(A⁻¹ dA), as the mean over probes z of (A⁻¹z)ᵀ dA z.

    Unbiased up to the solves' residuals. The probes are solved for once, when a gradient or its error is first asked.

    Args:
        A: Positive definite, gradients asked of its damping or factors.
        seed: Seed of the probes.
        probes: Their number m.

    Cost: m products when attached, a block solve with m columns in the backward pass, m products per `stderr`.
    """

    def __init__(self, A: LinearOperator, seed: int, probes: int) -> None:
        self.A = A
        self.Z = rademacher(A.shape[0], 0, probes, seed=seed, dtype=A.dtype, device=A.device)
        self._solutions: Tensor | None = None

    def solutions(self) -> Tensor:
        """A⁻¹Z."""
        found = self._solutions
        if found is None:
            with torch.no_grad():
                found = self._solutions = self.A.solve(self.Z, methods.CG(preconditioner="auto"))
        return found

    def attach(self, estimate: Tensor) -> Tensor:
        """`estimate` with this gradient."""
        products = self.A._apply(self.Z)
        return estimate_with_gradient(estimate, products, lambda: self.solutions() / self.Z.shape[1])

    def stderr(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Monte-Carlo standard error of the gradient with respect to each of `inputs`, of their shapes.

        The residuals of the solves (1e-6 in float64) come on top; they show only where the Monte-Carlo error vanishes.
        """
        with torch.enable_grad():
            per_probe = (self.solutions() * self.A._apply(self.Z)).sum(0)
        m = self.Z.shape[1]
        rows = [torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in per_probe]
        errors = []
        for tensor, column in zip(inputs, zip(*rows, strict=True), strict=True):
            samples = torch.stack([torch.zeros_like(tensor) if g is None else g for g in column])
            errors.append(samples.std(0) / math.sqrt(m))
        return tuple(errors)
