"""Log evidence over the prior precision, with its band and its bracket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from curvops.errors import ShapeError
from curvops.linalg.results import EstimateReport
from curvops.plot.canvas import COLOURS, GREY, array, axes, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evidence(
    deltas: Sequence[float] | Tensor,
    curve: EstimateReport,
    ax: Axes | None = None,
    *,
    optimum: EstimateReport | None = None,
    exact: Sequence[float] | Tensor | None = None,
) -> Axes:
    """What `Spectrum.evidence_curve` found.

    Args:
        deltas: `(d,)` prior precisions that the curve was asked for at.
        curve: The report of `evidence_curve(loss, mean, deltas)`.
        ax: Axes to draw on; None for a new figure.
        optimum: The report of `optimal_prior_precision`.
        exact: `(d,)` exact log evidences, drawn as dots.

    Returns:
        The axes.
    """
    x, value = array(deltas), array(curve.value)
    if x.shape != value.shape or x.ndim != 1:
        raise ShapeError(
            f"evidence: {x.shape} prior precisions for a curve of shape {value.shape}; expected (d,) each."
        )
    ax = axes(ax)
    half, low, high = array(curve.half_width), array(curve.bracket[0]), array(curve.bracket[1])
    colour = COLOURS[0]
    ax.fill_between(x, value - half, value + half, color=colour, alpha=0.18, linewidth=0,
                    label="95 % interval, probes and quadrature")  # fmt: skip
    ax.fill_between(x, low, high, color=colour, alpha=0.45, linewidth=0, label="quadrature bracket alone")
    ax.plot(
        x, value, color=colour, linewidth=1.8, label=f"{curve.probes} probes × {curve.steps} steps, every δ at once"
    )
    if exact is not None:
        ax.plot(x, array(exact), linestyle="none", marker="o", markersize=3.2, color=COLOURS[1], label="exact")
    if optimum is not None:
        best, spread = float(optimum.value), float(optimum.half_width)
        ax.axvspan(max(best - spread, x.min()), best + spread, color=GREY, alpha=0.18, linewidth=0)
        ax.axvline(best, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=f"best δ = {best:.3g} ± {spread:.1g}")
    ax.set_xscale("log")
    # The far side falls off like ½‖μ‖²δ and would flatten everything else: show down to the higher end of the curve.
    ends, top = max(value[0], value[-1]), (value + half).max()
    if ends < value.max():
        ax.set_ylim(ends - 0.05 * (top - ends), top + 0.1 * (top - ends))
    ax.set_xlim(x.min(), x.max())
    ax.set_xlabel("prior precision δ")
    ax.set_ylabel("log evidence (nats)")
    legend(ax)
    return ax
