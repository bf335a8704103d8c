"""Symmetric matrices of prescribed spectra, and their exact functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotation(size: int, number: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(number)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def matrix(values: Tensor, number: int = 0) -> Tensor:
    """Q diag(values) Qᵀ, exactly symmetric."""
    Q = rotation(len(values), number)
    M = (Q * values) @ Q.T
    return (M + M.T) / 2


def function(M: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f(M) by eigh."""
    values, Q = torch.linalg.eigh(M)
    return (Q * f(values)) @ Q.T


def quadratic_forms(M: Tensor, f: Callable[[Tensor], Tensor], Z: Tensor) -> Tensor:
    """zᵀ f(M) z for each column."""
    return ((function(M, f) @ Z) * Z).sum(0)


def spectra(size: int) -> dict[str, Tensor]:
    """The six spectra of the coverage claim, all ≥ 0.01."""
    n = torch.arange(size, dtype=torch.float64)
    outlier = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
    outlier[-1] = 1e4
    low = torch.full((size,), 0.01, dtype=torch.float64)
    low[: size // 10] += torch.logspace(0, 3, size // 10, dtype=torch.float64)
    centres = torch.tensor([0.01, 0.5, 20.0, 1e3], dtype=torch.float64)
    clustered = centres[(n * 4 / size).long()] * (1 + 1e-3 * torch.sin(n))
    clustered = clustered.clamp(min=0.01)
    return {
        "flat": torch.linspace(0.5, 1.5, size, dtype=torch.float64),
        "power law": 0.01 + 1e3 / (1 + n) ** 2,
        "low rank + δI": low,
        "clustered": clustered,
        "one outlier": outlier,
        "geometric": torch.logspace(-2, 3, size, dtype=torch.float64),
    }
