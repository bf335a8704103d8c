"""Laplace log evidence over the prior precision, from one spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from scipy import optimize
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.linalg import quadrature
from curvops.linalg.growth import student
from curvops.linalg.results import EstimateReport

if TYPE_CHECKING:
    from curvops.linalg.spectrum import Spectrum

_GRID = 41


def _penalty(s: Spectrum, loss: float | Tensor, mean: Tensor, prior_mean: float | Tensor) -> tuple[float, float]:
    """`(loss, ‖μ − μ₀‖²)`, checked."""
    mean = torch.as_tensor(mean).detach().to("cpu", torch.float64)
    centre = torch.as_tensor(prior_mean).detach().to("cpu", torch.float64)
    if mean.shape != (s.size,) or centre.shape not in ((), (s.size,)):
        raise ShapeError(
            f"The evidence expects a mean of shape ({s.size},) and a prior mean of shape () or ({s.size},), got "
            f"{tuple(mean.shape)} and {tuple(centre.shape)}."
        )
    total, squared = float(loss), float((mean - centre).square().sum())
    if not (math.isfinite(total) and math.isfinite(squared)):
        raise DataError(f"The evidence expects a finite loss and mean, got loss {total} and ‖μ − μ₀‖² {squared}.")
    return total, squared


def _values(s: Spectrum, deltas: Tensor, loss: float, squared: float) -> tuple[Tensor, Tensor]:
    """`(m, d)` bounds of every probe's log evidence."""
    low, high = s.logdet_bounds(deltas)
    known = -loss - 0.5 * deltas * squared + 0.5 * s.size * deltas.log()
    return known - high / 2, known - low / 2


def _positive(deltas: Tensor) -> Tensor:
    if deltas.numel() < 1 or not bool((torch.isfinite(deltas) & (deltas > 0)).all()):
        raise DataError("Prior precisions must be finite and positive, and at least one is needed.")
    return deltas


def curve(
    s: Spectrum, loss: float | Tensor, mean: Tensor, deltas: Sequence[float] | Tensor, prior_mean: float | Tensor
) -> EstimateReport:
    """See `Spectrum.evidence_curve`."""
    total, squared = _penalty(s, loss, mean, prior_mean)
    points = _positive(torch.as_tensor(deltas, dtype=torch.float64, device="cpu").flatten().cpu())
    low, high = _values(s, points, total, squared)
    zeros = torch.tensor([s._at_zeros(quadrature.log(float(d))) for d in points], dtype=torch.float64, device="cpu")
    known = -total - 0.5 * points * squared + 0.5 * s.size * points.log() - 0.5 * zeros
    energy = torch.stack([s.rules.gauss.apply(lambda x, d=d: 0.25 * torch.log(x + d).square()) for d in points], dim=1)
    return s._report(low, high, "log evidence", energy=energy, known=known)


def _argmax(
    s: Spectrum, loss: float, squared: float, bounds: tuple[float, float], weights: Tensor, side: float
) -> float:
    """log δ of the maximum of Σ_i weights_i · (probe i's evidence, `side` of the way from lower to upper bound)."""

    def negative(x: float) -> float:
        low, high = _values(s, torch.tensor([math.exp(x)], dtype=torch.float64, device="cpu"), loss, squared)
        return -float((weights[:, None] * (low + side * (high - low))).sum())

    first, last = math.log(bounds[0]), math.log(bounds[1])
    xs = [first + (last - first) * i / (_GRID - 1) for i in range(_GRID)]
    low, high = _values(s, torch.tensor(xs, dtype=torch.float64, device="cpu").exp(), loss, squared)
    best = int((weights[:, None] * (low + side * (high - low))).sum(0).argmax())
    span = (xs[max(best - 1, 0)], xs[min(best + 1, _GRID - 1)])
    found = optimize.minimize_scalar(negative, bounds=span, method="bounded", options={"xatol": 1e-6})
    return float(found.x)  # type: ignore[attr-defined]


def optimum(
    s: Spectrum, loss: float | Tensor, mean: Tensor, prior_mean: float | Tensor, bounds: tuple[float, float]
) -> EstimateReport:
    """See `Spectrum.optimal_prior_precision`.

    A grid of 41 points over `bounds`, then Brent's method about its best point, in log δ. The standard error is the
    jackknife's over probes (of log δ, times δ); the bracket holds the maxima of the curve's lower and upper bounds.

    Raises:
        DataError: `bounds` are not positive and ascending.
    """
    total, squared = _penalty(s, loss, mean, prior_mean)
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise DataError(f"optimal_prior_precision expects bounds 0 < low < high, got {bounds}.")
    # Where rounding hides δ there is no evidence to compare; the search starts above it.
    floor = 8 * float(s.rules.rounding.max()) - min(s.lower_bound or 0.0, 0.0)
    span = (max(bounds[0], floor), bounds[1])
    if not span[0] < span[1]:
        raise DataError(
            f"All of {bounds} underflows: the products behind this spectrum carry an error of {floor / 8:.1e}."
        )
    m = s.probes
    even = torch.full((m,), 1 / m, dtype=torch.float64, device="cpu")
    at = _argmax(s, total, squared, span, even, 0.5)
    ends = sorted(_argmax(s, total, squared, span, even, side) for side in (0.0, 1.0))
    ends = [min(ends[0], at), max(ends[1], at)]
    stderr = 0.0 if s.is_exact else math.inf
    if m > 1:
        left_out = []
        for i in range(m):
            weights = torch.full((m,), 1 / (m - 1), dtype=torch.float64, device="cpu")
            weights[i] = 0
            left_out.append(_argmax(s, total, squared, span, weights, 0.5))
        spread = torch.tensor(left_out, dtype=torch.float64, device="cpu")
        stderr = math.sqrt((m - 1) / m * float((spread - spread.mean()).square().sum()))
    delta = math.exp(at)
    noise = student(m) * stderr if stderr > 0 else 0.0
    interior = math.log(span[0]) + 1e-4 < at < math.log(span[1]) - 1e-4
    base = s.logdet(delta)
    reason = f"Evidence maximal at log δ = {at:.4g} ± {noise:.2g} (jackknife over {m} probes)."
    if s.is_exact:
        reason = f"Evidence maximal at log δ = {at:.4g}, from the eigenvalues."
    if not interior:
        reason = f"The evidence is maximal at the end δ = {delta:.3g} of the bounds {span}; widen them."
    return replace(
        base,
        algorithm="evidence maximum",
        reason=reason,
        converged=interior,
        value=delta,
        stderr=delta * stderr,
        bracket=(math.exp(ends[0]), math.exp(ends[1])),
        half_width=delta * noise + (math.exp(ends[1]) - math.exp(ends[0])) / 2,
    )
