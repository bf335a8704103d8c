"""The picture of a report: GGN over Hessian, their spectra and their largest eigenvalues."""

from __future__ import annotations

from pathlib import Path

from curvops import plot
from curvops.extras import require
from curvops.report.measure import Measurements, Settings
from curvops.report.subject import Subject


def draw(subject: Subject, settings: Settings, m: Measurements, path: Path) -> None:
    """Write the picture to `path` (its suffix decides the format); no window, no global matplotlib state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "report").Figure(figsize=(12.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1.0))
    tops = {"GGN": m.top_ggn, "Hessian": m.top_hessian}
    spectra = {"GGN": m.spectrum_ggn, "Hessian": m.spectrum_hessian}
    plot.spectrum(spectra, left, pairs=tops, delta=settings.delta)
    plot.scree(tops, right)
    left.set_title("Spectra, with the 95 % band over the probes; ticks: largest eigenvalues", fontsize=10, loc="left")
    right.set_title("Largest eigenvalues", fontsize=10, loc="left")
    figure.suptitle(f"{subject.title}: P = {m.ggn.shape[0]:,}, N = {m.ggn.objective.num_data:,}", fontsize=12)
    figure.savefig(path, dpi=150)
