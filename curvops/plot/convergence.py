"""What products buy: residuals of solves, or estimates with their intervals, against the products spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from curvops.errors import DataError
from curvops.linalg.results import EstimateReport, Report, SolveReport
from curvops.plot.canvas import COLOURS, GREY, array, axes, legend, log_axis_in_plain_numbers, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(
    reports: Sequence[Report] | Mapping[str, Sequence[Report]],
    ax: Axes | None = None,
    *,
    exact: float | None = None,
) -> Axes:
    """Reports of one question asked with growing effort.

    Of solves, the worst true relative residual is drawn, on logarithmic axes; of estimates, the value with its
    half-width.

    Args:
        reports: Reports of one kind, or label → reports.
        ax: Axes to draw on; None for a new figure.
        exact: The exact value, drawn as a line (estimates).

    Returns:
        The axes.

    Raises:
        DataError: No reports, or solves and estimates mixed.
    """
    series = list(named(reports, "residual" if _kind(reports) is SolveReport else "estimate"))
    ax = axes(ax)
    for number, (label, _, found) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        ordered = sorted(found, key=lambda r: r.matvecs)
        products = [r.matvecs for r in ordered]
        if _kind(reports) is SolveReport:
            residuals = [cast(SolveReport, r).worst_residual for r in ordered]
            ax.plot(products, residuals, color=colour, marker="o", markersize=4, label=label)
        else:
            estimates = [cast(EstimateReport, r) for r in ordered]
            values, halves = ([float(v) for v in column] for column in zip(
                *((e.value, e.half_width) for e in estimates), strict=True))  # fmt: skip
            ax.errorbar(
                products, array(values), yerr=array(halves), color=colour, marker="o", markersize=4, capsize=3,
                linewidth=1.0, label=f"{label} with its 95 % interval",
            )  # fmt: skip
    log_axis_in_plain_numbers(ax)
    ax.set_xlabel("products with the operator, in columns")
    if _kind(reports) is SolveReport:
        ax.set_yscale("log")
        ax.set_ylabel("true relative residual ‖b − Ax‖ / ‖b‖")
    else:
        ax.set_ylabel("estimate")
        if exact is not None:
            ax.axhline(
                exact, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=f"exact: {exact:,.6g}".replace("-", "−")
            )
    legend(ax)
    return ax


def _kind(reports: Sequence[Report] | Mapping[str, Sequence[Report]]) -> type[Report]:
    groups = list(reports.values()) if isinstance(reports, Mapping) else [reports]
    flat = [report for group in groups for report in group]
    for kind in (SolveReport, EstimateReport):
        if flat and all(isinstance(report, kind) for report in flat):
            return kind
    kinds = sorted({type(report).__name__ for report in flat}) or ["nothing"]
    raise DataError(f"convergence: got {', '.join(kinds)}; expected SolveReports alone or EstimateReports alone.")
