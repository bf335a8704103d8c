"""The density of a curvature's eigenvalues, with its band: the bulk, the outliers, the negative part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from curvops.extras import require
from curvops.linalg.growth import student
from curvops.linalg.results import Eigenpairs
from curvops.linalg.spectrum import Spectrum
from curvops.plot.canvas import GREY, array, axes, legend, named
from curvops.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 800
# A Ritz value of a weight below this stands for an eigenvalue or two, and is drawn where it is.
_FEW = 3.0


def spectrum(
    spectra: Spectrum | Mapping[str, Spectrum],
    ax: Axes | None = None,
    *,
    pairs: Eigenpairs | Mapping[str, Eigenpairs] | None = None,
    delta: float | None = None,
    threshold: float | None = None,
    width: float = 0.05,
) -> Axes:
    """Density of eigenvalues on an axis that is logarithmic in both directions and linear about zero.

    The height is the number of eigenvalues per decade, so that a single eigenvalue is a bump of area one. The band is
    the 95 % interval over the probes: t₀.₉₇₅(m − 1) standard errors. Where Ritz values stand far apart for many
    eigenvalues each, the curve is smeared over their distance.

    Args:
        spectra: One `Spectrum`, or label → `Spectrum`.
        ax: Axes to draw on; None for a new figure.
        pairs: Eigenpairs known exactly, drawn as ticks under the density; the mapping's labels as in `spectra`.
        delta: Prior precision, drawn as a line: directions left of it the prior decides.
        threshold: Size |λ| below which the axis is linear; default: 10⁻⁴ of the largest Ritz value.
        width: Least standard deviation of the smoothing Gaussians, in decades.

    Returns:
        The axes.
    """
    ax = axes(ax)
    series = list(named(spectra))
    largest = max(float(result.nodes.abs().max()) for _, _, result in series) or 1.0
    knee = 1e-4 * largest if threshold is None else float(threshold)
    if not knee > 0 or not width > 0:
        raise ValueError(f"threshold={threshold}, width={width}: expected numbers above 0.")
    low = min(float(result.nodes.min()) for _, _, result in series)
    high = max(float(result.nodes.max()) for _, _, result in series)
    start, stop = (float(_decades(torch.tensor(end), knee)) for end in (low, high))
    grid = torch.linspace(start - 5 * width, stop + 5 * width, _POINTS, dtype=torch.float64)
    x = array(torch.sinh(grid * math.log(10)) * knee)

    top = 1.0
    for label, colour, result in series:
        height, half = density(result, grid, knee, width)
        floor = 1e-12
        ax.fill_between(x, np.maximum(height - half, floor), height + half, color=colour, alpha=0.22, linewidth=0)
        ax.plot(x, np.maximum(height, floor), color=colour, linewidth=1.8, label=_label(label, result))
        top = max(top, float(height.max()))
    known = dict(pairs) if isinstance(pairs, Mapping) else {"": pairs} if pairs is not None else {}
    rows = [(colour, known[label]) for label, colour, _ in series if label in known]
    for row, (colour, found) in enumerate(rows):
        values = array(found.values)
        ax.vlines(values, 0.012 + 0.045 * row, 0.05 + 0.045 * row, color=colour, linewidth=1.3,
                  transform=ax.get_xaxis_transform())  # fmt: skip

    ax.set_xscale("asinh", linear_width=knee, base=10)
    ax.xaxis.set_major_locator(require("matplotlib.ticker", "plot").FixedLocator(_ticks(knee)))
    ax.minorticks_off()
    ax.set_yscale("log")
    ax.set_ylim(0.3 if not rows else 0.12, 3 * top)
    ax.set_xlim(x[0], x[-1])
    ax.set_xlabel("eigenvalue λ (curvature of the negative log-likelihood summed over the data)")
    ax.set_ylabel("eigenvalues per decade")
    if low < -knee:
        ax.axvspan(-1e30, 0, color=GREY, alpha=0.07, linewidth=0)
    if delta is not None:
        ax.axvline(delta, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=f"prior precision δ = {delta:g}")
    legend(ax, loc="upper right")
    return ax


def density(result: Spectrum, grid: Tensor, knee: float, width: float) -> tuple[Array, Array]:
    """Eigenvalues per decade at `asinh(λ/knee)/ln 10 = grid`, and the half-width of their 95 % interval.

    A Ritz value that stands for many eigenvalues is smeared over the distance to its neighbours: what the quadrature
    does not resolve is not drawn as if it did. Nothing is smeared past a proven lower bound; it is reflected there.
    """
    nodes, weights = _decades(result.nodes, knee), result.weights
    gaps = nodes.diff(dim=1)
    edges = torch.cat([gaps[:, :1], gaps], 1), torch.cat([gaps, gaps[:, -1:]], 1)
    unresolved = weights / (weights + _FEW) * torch.maximum(*edges)
    unresolved[result.rules.exact.to(unresolved.device)] = 0.0
    widths = unresolved.clamp(min=width, max=0.5)[:, None, :]

    def bumps(centres: Tensor) -> Tensor:
        z = (centres[:, None, :] - grid[None, :, None]) / widths
        return torch.exp(-z.square() / 2) / (widths * math.sqrt(2 * math.pi))

    kernel = bumps(nodes)
    if result.lower_bound is not None:
        bound = float(_decades(torch.tensor(result.lower_bound), knee))
        kernel = (kernel + bumps(2 * bound - nodes)) * (grid >= bound)[None, :, None]
    heights = (kernel * weights[:, None, :]).sum(2)
    m = result.probes
    if m < 2:
        return array(heights[0]), np.full(len(grid), np.inf)
    return array(heights.mean(0)), array(student(m) * heights.std(0) / math.sqrt(m))


def _decades(values: Tensor, knee: float) -> Tensor:
    return torch.asinh(values.double() / knee) / math.log(10)


def _ticks(knee: float) -> list[float]:
    """Zero, and the powers of ten on either side that have room; many, for axes that are shared or widened later."""
    first = math.ceil(math.log10(2 * knee))
    powers = [10.0**k for k in range(first, first + 30)]
    return [*(-p for p in reversed(powers)), 0.0, *powers]


def _label(label: str, result: Spectrum) -> str:
    effort = f"{result.probes} probes × {result.steps} steps"
    return f"{label} ({effort})" if label else effort
