"""What the pictures share: axes, colours, and how one result or several named ones are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from curvops.extras import require
from curvops.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

COLOURS = ("#20639b", "#d1622b", "#3c8d5a", "#8a4f9e", "#7a6a4f", "#b83b5e")
"""Told apart by colour-blind readers and in grey: blue, orange, green, purple, brown, red."""

GREY = "#6b7178"


def axes(ax: Axes | None, size: tuple[float, float] = (7.0, 4.2)) -> Axes:
    """The user's axes, or those of a new figure of `size` inches; without the box, with a faint grid.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if ax is None:
        pyplot: Any = require("matplotlib.pyplot", "plot")
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    assert ax is not None
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors="#3a3f44", which="both")
    ax.grid(True, color="#e4e6e8", linewidth=0.7)
    ax.set_axisbelow(True)
    return ax


def named(results: T | Mapping[str, T], name: str = "") -> Iterator[tuple[str, str, T]]:
    """`(label, colour, result)` of one result or of a mapping from labels to results."""
    pairs = results.items() if isinstance(results, Mapping) else [(name, results)]
    for (label, result), colour in zip(pairs, cycle(COLOURS), strict=False):
        yield str(label), colour, result


def array(values: Any) -> Array:
    """A tensor, number or sequence as a float64 NumPy array."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def log_axis_in_plain_numbers(ax: Axes) -> None:
    """Counts on a logarithmic x axis, as 100, 200, 500 instead of powers."""
    ticker = require("matplotlib.ticker", "plot")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, if anything has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, **options)
