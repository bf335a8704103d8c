"""log det A = log det M₀ + tr log(M₀^-½ A M₀^-½), M₀ = a·I + Ĝ with a Nyström Ĝ ≼ A − a·I: less variance, fewer steps.

The remainder's spectrum starts at 1, so quadrature of its logarithm keeps its lower bound, and it ends where Ĝ stops
following A, so both the Monte-Carlo error and the Lanczos depth shrink (Wenger, Pleiss, Hennig, Cunningham, Gardner
2022, with the sketch of Tropp, Yurtsever, Udell, Cevher 2017, algorithm 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError
from curvops.linalg.probes import derive_seed, gaussian
from curvops.linalg.quadrature import Rules
from curvops.typing import Matmat

SKETCH_VECTORS = 8
"""Vectors of length P for each of the ranks, at the peak of `split`."""
_SKETCH_STREAM = 1


@dataclass(frozen=True)
class Split:
    """M₀ = a·I + U diag(s) Uᵀ.

    Attributes:
        floor: a.
        vectors: U `(P, r)`, orthonormal.
        values: s `(r,)`, non-negative, float64 on the CPU.
        margin: M₀^-½ A M₀^-½ ≽ (1 − margin)·I: what rounding in the sketch may have taken from the bound 1.
        slack: Rounding of `logdet`, in nats.
        matvecs: Products spent.
    """

    floor: float
    vectors: Float[Tensor, "P r"]
    values: Float[Tensor, " r"]
    margin: float
    slack: float
    matvecs: int

    @property
    def logdet(self) -> float:
        """log det M₀, exact."""
        return self.vectors.shape[0] * math.log(self.floor) + float(torch.log1p(self.values / self.floor).sum())

    def remainder(self, matmat: Matmat) -> Matmat:
        """Products with M₀^-½ A M₀^-½; one product with A and O(P·r) per column."""
        shrink = (torch.rsqrt(1 + self.values / self.floor) - 1).to(self.vectors)[:, None]

        def root(V: Tensor) -> Tensor:
            return V + self.vectors @ (shrink * (self.vectors.T @ V))

        return lambda V: root(matmat(root(V))) / self.floor


def split(
    matmat: Matmat, size: int, *, floor: float, rank: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Split:
    """Sketch A − floor·I, positive semidefinite, by `rank` products. O(P·rank²) beside them.

    Raises:
        NotPositiveDefiniteError: A − floor·I is not positive semidefinite.
    """
    omega, _ = torch.linalg.qr(
        gaussian(size, 0, rank, seed=derive_seed(seed, _SKETCH_STREAM), dtype=dtype, device=device)
    )
    sketch = matmat(omega).detach().to(dtype) - floor * omega
    # Tropp et al.'s shift keeps the small core positive definite; it comes off the eigenvalues again.
    least = torch.finfo(dtype).eps * (float(torch.linalg.matrix_norm(sketch)) + floor)
    for nu in (least, 10 * least, 100 * least, 1000 * least):
        shifted = sketch + nu * omega
        core = omega.T @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if int(failed) == 0:
            break
    else:
        met = float(torch.linalg.eigvalsh((core + core.T) / 2)[0]) - nu + floor
        raise NotPositiveDefiniteError(
            f"The spectrum was said to be bounded below by {floor:.6g}, but a sketch of the matrix met the Rayleigh "
            "quotient "
            f"{met:.6g}. Add a larger multiple of the identity, or correct lower_bound."
        )
    half = torch.linalg.solve_triangular(factor, shifted.T, upper=False)
    vectors, singular, _ = torch.linalg.svd(half.T, full_matrices=False)
    values = (singular.to("cpu", torch.float64).square() - nu).clamp(min=0)
    growth = math.sqrt(1 + float(values.max()) / floor)
    slack = 4 * rank * torch.finfo(dtype).eps * growth
    return Split(floor, vectors, values, min(10 * nu / floor, 1.0), slack, rank)


def _spectrum(r: Rules, size: int) -> Tensor:
    """Descending eigenvalues `(P,)` as the runs' averaged Gauss rules see them."""
    nodes, order = r.gauss.nodes.flatten().sort(descending=True)
    counts = r.gauss.weights.flatten()[order].cumsum(0)
    counts = counts * (size / counts[-1])
    places = torch.searchsorted(counts, torch.arange(size, dtype=torch.float64, device="cpu") + 0.5).clamp(
        max=len(nodes) - 1
    )
    return nodes[places]


def _depth(gaps: Tensor, floor: float, accuracy: float) -> float:
    """Lanczos steps to `accuracy` nats: q steps spent on the q largest eigenvalues, Chebyshev's rate on the others."""
    number = torch.arange(len(gaps), dtype=torch.float64, device="cpu")
    kappa = 1 + gaps / floor
    rest = kappa.sqrt() / 4 * torch.log(2 * len(gaps) * torch.log(kappa).clamp(min=1e-6) / accuracy).clamp(min=1.0)
    return float((number + rest).min()) + 2


def choose_rank(r: Rules, size: int, floor: float, target: float, probes: int, max_rank: int | None = None) -> int:
    """Rank whose predicted cost (sketch + probes x steps) is least, given a pilot's quadrature; 0 for no split.

    A heuristic: a wrong guess costs products, never the certificate.

    Args:
        r: Rules of the pilot.
        size: P.
        floor: Lower bound a of the spectrum.
        target: Half-width wanted, nats.
        probes: Smallest number of probes.
        max_rank: What memory allows; None for no limit.
    """
    gaps = (_spectrum(r, size) - floor).clamp(min=0)

    def cost(ratios: Tensor, steps: float) -> float:
        logs = torch.log1p(ratios)
        variance = 2 * float((logs - logs.mean()).square().sum())
        return max(probes, variance * (2.1 / (0.75 * target)) ** 2) * min(steps, size)

    best, rank = 0.8 * cost(gaps / floor, _depth(gaps, floor, 0.2 * target)), 0
    candidate, largest = 8, min(size // 3, 1024 if max_rank is None else min(1024, max_rank))
    while candidate <= largest:
        error = float(gaps[candidate] + gaps[candidate:].sum() / candidate)
        left = gaps.clone()
        left[:candidate] = gaps[:candidate].clamp(max=error) * floor / (gaps[:candidate] + floor)
        total = candidate + cost(left / floor, _depth(left.sort(descending=True).values, floor, 0.2 * target))
        if total < best:
            best, rank = total, candidate
        candidate *= 2
    return rank
