"""Hutchinson's estimators of the trace, the diagonal and per-block traces, with standard errors and a target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import ShapeError
from curvops.linalg.growth import sample_variance, student
from curvops.linalg.probes import derive_seed, rademacher, resolve_seed
from curvops.linalg.results import EstimateReport
from curvops.typing import Matmat

FIRST_PROBES = 10
CHUNK = 64
_STREAM = 3


class Moments:
    """Running mean and sum of squared deviations of samples (Chan, Golub, LeVeque 1983), float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.squares: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.energy: Tensor | None = None
        self.sizes: Tensor | int = 1

    def add(self, samples: Float[Tensor, "... m"], energy: Tensor | None = None, sizes: Tensor | int = 1) -> None:
        """Take in samples along the last dimension; `energy` and `sizes` as in `sample_variance`."""
        samples = samples.to(torch.float64)
        if energy is not None:
            before = 0.0 if self.energy is None else self.energy
            self.energy, self.sizes = before + energy.to(torch.float64).sum(-1), sizes
        n, k = self.count, samples.shape[-1]
        mean = samples.mean(-1)
        squares = (samples - mean[..., None]).square().sum(-1)
        if n == 0:
            self.mean, self.squares = mean, squares
        else:
            gap = mean - self.mean
            self.mean = self.mean + gap * (k / (n + k))
            self.squares = self.squares + squares + gap.square() * (n * k / (n + k))
        self.count = n + k

    def stderr(self) -> Tensor:
        """Standard error of the mean; infinite for one sample."""
        if self.count < 2:
            return torch.full_like(self.mean, math.inf)
        variance = self.squares / (self.count - 1)
        if self.energy is not None:
            variance = sample_variance(variance, self.mean, self.energy / self.count, self.count, self.sizes)
        return (variance / self.count).sqrt()

    def half_width(self) -> Tensor:
        """t₀.₉₇₅(m − 1) standard errors."""
        stderr = self.stderr()
        return torch.where(stderr > 0, student(self.count) * stderr, torch.zeros_like(stderr))


def check(size: int, rtol: float | None, probes: int | None, max_probes: int) -> None:
    """Refuse sizes and targets that make no sense."""
    if size < 1 or max_probes < 1 or (probes is not None and probes < 1):
        raise ShapeError(f"Expected size, probes and max_probes >= 1, got {size}, {probes} and {max_probes}.")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be > 0, got {rtol}.")


def _estimate(
    matmat: Matmat,
    size: int,
    sample: Callable[[Tensor, Tensor], Tensor],
    small: Callable[[Tensor, Tensor, float], bool],
    energy: Callable[[Tensor], Tensor] | None = None,
    sizes: Tensor | int = 1,
    *,
    name: str,
    default: float,
    rtol: float | None,
    probes: int | None,
    max_probes: int,
    seed: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, EstimateReport]:
    """Mean of `sample(Z, AZ)` (samples along the last dimension) over growing probes, or its exact sum over unit
    vectors.

    Once doubling the probes would cost as much as the P unit vectors, those are taken: no error is left.
    """
    began = time.perf_counter()
    check(size, rtol, probes, max_probes)
    target = rtol if rtol is not None else (default if probes is None else None)
    drawn, shown = (seed, seed) if generator is None else (resolve_seed(generator), None)
    stream = derive_seed(drawn, _STREAM)
    moments = Moments()
    goal, matvecs, exact, met = probes or min(FIRST_PROBES, max_probes), 0, False, False
    with torch.no_grad():
        while True:
            if probes is None and goal >= size:
                exact = True
                break
            while moments.count < goal:
                count = min(CHUNK, goal - moments.count)
                Z = rademacher(size, moments.count, count, seed=stream, dtype=dtype, device=device)
                AZ = matmat(Z).detach()
                moments.add(sample(Z, AZ), None if energy is None else energy(AZ), sizes)
            matvecs = moments.count
            half = moments.half_width()
            met = target is None or small(half, moments.mean, target)
            if met or probes is not None or moments.count >= max_probes:
                break
            goal = min(2 * goal, max_probes)
        if exact:
            value = unit_vectors(matmat, size, sample, dtype, device)
            matvecs += size
            stderr = half = torch.zeros_like(value)
            reason = f"{size} unit vectors cost no more than the random probes that the target would need: exact."
        else:
            value, stderr = moments.mean, moments.stderr()
            reason = f"{moments.count} probes"
            if target is not None:
                reason += f" {'met' if met else 'did not meet'} the relative target {target:g}."
    met = met or exact
    plain = (lambda x: float(x)) if value.ndim == 0 else (lambda x: x)
    return value, EstimateReport(
        algorithm=f"{name} (unit vectors)" if exact else name,
        matvecs=matvecs,
        seconds=time.perf_counter() - began,
        reason=reason,
        converged=met,
        value=plain(value),
        stderr=plain(stderr),
        bracket=(plain(value), plain(value)),
        half_width=plain(half),
        probes=0 if exact else moments.count,
        seed=None if exact else shown,
    )


def unit_vectors(
    matmat: Matmat,
    size: int,
    sample: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Sum of `sample(I, A)` over all P columns, a chunk at a time: P products."""
    total: Tensor | float = 0.0
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        unit = torch.zeros(size, count, dtype=dtype, device=device)
        unit[torch.arange(start, start + count, device="cpu"), torch.arange(count, device="cpu")] = 1
        total = total + sample(unit, matmat(unit).detach()).to(torch.float64).sum(-1)
    assert isinstance(total, Tensor)
    return total


def hutchinson_trace(
    matmat: Matmat,
    size: int,
    *,
    rtol: float | None = None,
    probes: int | None = None,
    max_probes: int = 10_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[float, EstimateReport]:
    """tr A as the mean of zᵀAz over Rademacher probes, doubled from 10 until t·stderr ≤ rtol·|trace|.

    When the probes would cost as much as P unit vectors, those are taken instead and the trace is exact.

    Args:
        matmat: `(P, K) → (P, K)`; need not be symmetric.
        size: P.
        rtol: Relative half-width wanted; default 0.01, or none when `probes` is given.
        probes: Exactly this many.
        max_probes: Bound on growth.
        seed: Seed of the probes.
        generator: Takes the place of `seed` (one draw).
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.

    Returns:
        `(value, report)`.

    Cost: m products and O(P) memory beside a chunk of 64 columns.
    Source: Hutchinson 1989; Girard 1989.
    """
    value, report = _estimate(
        matmat,
        size,
        lambda Z, AZ: (Z * AZ).sum(0, dtype=torch.float64),
        lambda half, mean, target: bool(half <= target * mean.abs()),
        lambda AZ: AZ.square().sum(0, dtype=torch.float64),
        size,
        name="Hutchinson",
        default=0.01,
        rtol=rtol,
        probes=probes,
        max_probes=max_probes,
        seed=seed,
        generator=generator,
        dtype=dtype,
        device=device,
    )
    return float(value), report


def hutchinson_diagonal(
    matmat: Matmat,
    size: int,
    *,
    rtol: float | None = None,
    probes: int | None = None,
    max_probes: int = 10_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, " P"], EstimateReport]:
    """diag A as the mean of z ⊙ Az over Rademacher probes, until ‖t·stderr‖₂ ≤ rtol·‖diag‖₂ (default 0.05).

    Arguments, cost and the exact way out as in `hutchinson_trace`; the report's stderr and half-width are `(P,)`.

    Source: Bekas, Kokiopoulou, Saad 2007.
    """
    value, report = _estimate(
        matmat,
        size,
        lambda Z, AZ: Z * AZ,
        lambda half, mean, target: bool(half.norm() <= target * mean.norm()),
        name="Hutchinson diagonal",
        default=0.05,
        rtol=rtol,
        probes=probes,
        max_probes=max_probes,
        seed=seed,
        generator=generator,
        dtype=dtype,
        device=device,
    )
    return value.to(dtype), report


def block_traces(
    matmat: Matmat,
    size: int,
    blocks: Mapping[str, slice | Tensor],
    *,
    rtol: float | None = None,
    probes: int | None = None,
    max_probes: int = 10_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], EstimateReport]:
    """Trace of each diagonal block (of each parameter, say) from one run of common probes.

    Args:
        matmat: As in `hutchinson_trace`.
        size: P.
        blocks: Name → slice or index tensor of the block's entries.
        rtol: Half-width wanted of every block, relative to the larger of its own trace and the mean block's; default
            0.01.
        probes: As in `hutchinson_trace`, and so are the others.
        max_probes: As in `hutchinson_trace`.
        seed: As in `hutchinson_trace`.
        generator: As in `hutchinson_trace`.
        dtype: As in `hutchinson_trace`.
        device: As in `hutchinson_trace`.

    Returns:
        `({name: trace}, report)`; the report's value, stderr and half-width are tensors in the blocks' order.
    """
    if not blocks:
        raise ShapeError("block_traces expects at least one block.")
    parts = list(blocks.values())

    def sample(Z: Tensor, AZ: Tensor) -> Tensor:
        product = Z * AZ
        return torch.stack([product[part].sum(0, dtype=torch.float64) for part in parts])

    def energy(AZ: Tensor) -> Tensor:
        return torch.stack([AZ[part].square().sum(0, dtype=torch.float64) for part in parts])

    lengths = torch.stack([torch.ones(size, dtype=torch.float64, device=device)[part].sum() for part in parts])
    value, report = _estimate(
        matmat,
        size,
        sample,
        lambda half, mean, target: bool((half <= target * mean.abs().clamp(min=float(mean.abs().mean()))).all()),
        energy,
        lengths.clamp(min=1),
        name="Hutchinson per block",
        default=0.01,
        rtol=rtol,
        probes=probes,
        max_probes=max_probes,
        seed=seed,
        generator=generator,
        dtype=dtype,
        device=device,
    )
    return dict(zip(blocks, value.tolist(), strict=True)), report
