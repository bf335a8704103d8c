"""Eigenvalues in order, with the residuals that bound their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from curvops.extras import require
from curvops.linalg.results import Eigenpairs
from curvops.plot.canvas import array, axes, legend, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scree(
    pairs: Eigenpairs | Mapping[str, Eigenpairs],
    ax: Axes | None = None,
    *,
    first: int = 1,
) -> Axes:
    """Eigenvalues from the largest down; within the bar about each lies an eigenvalue for certain.

    Args:
        pairs: One `Eigenpairs`, or label → `Eigenpairs`.
        ax: Axes to draw on; None for a new figure.
        first: Number of the largest eigenvalue given.

    Returns:
        The axes; logarithmic where all eigenvalues are positive.
    """
    ax = axes(ax, (5.0, 4.0))
    every = []
    for label, colour, found in named(pairs, "eigenvalues"):
        values, residuals = array(found.values)[::-1], array(found.residuals)[::-1]
        numbers = np.arange(first, first + len(values))
        worst = f"residuals ≤ {residuals.max():.0e}" if len(residuals) else "none found"
        ax.errorbar(
            numbers, values, yerr=residuals, color=colour, marker="o", markersize=5, linewidth=1.0,
            elinewidth=1.4, capsize=3, markeredgecolor="white", markeredgewidth=0.6, label=f"{label} ({worst})",
        )  # fmt: skip
        every.append(values)
    values = np.concatenate(every)
    if len(values) and values.min() > 0:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    ax.set_xlabel("number of the eigenvalue, from the largest")
    ax.set_ylabel("eigenvalue λ")
    legend(ax)
    return ax
