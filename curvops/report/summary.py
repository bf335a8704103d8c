"""The report in words: `summary.txt.jinja` filled in."""

from __future__ import annotations

from importlib.resources import files

import torch

from curvops.extras import require, version_of
from curvops.report.checks import Verdict
from curvops.report.measure import Measurements, Settings
from curvops.report.subject import Subject


def summary(subject: Subject, settings: Settings, m: Measurements, verdict: Verdict) -> str:
    """The text of a report.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja = require("jinja2", "report")
    template = files("curvops.report").joinpath("summary.txt.jinja").read_text(encoding="utf-8")
    environment = jinja.Environment(undefined=jinja.StrictUndefined, keep_trailing_newline=True)
    lowest = m.bottom_hessian
    columns = (m.top_ggn.values, m.top_ggn.residuals, m.top_hessian.values, m.top_hessian.residuals)
    return environment.from_string(template).render(
        subject=subject,
        settings=settings,
        m=m,
        verdict=verdict,
        P=m.ggn.shape[0],
        N=m.ggn.objective.num_data,
        dtype=str(m.ggn.dtype).removeprefix("torch."),
        # Largest first; where one of the two found fewer, the rows that both have.
        eigenvalues=list(zip(*(column.flip(0).tolist() for column in columns), strict=False)),
        smallest=(float(lowest.values[0]), float(lowest.residuals[0])) if len(lowest.values) else None,
        spread_mean=float(m.spread.deviation.mean()),
        spread_low=float(m.spread.deviation.min()),
        spread_high=float(m.spread.deviation.max()),
        version=version_of("curvops"),
        torch_version=torch.__version__,
    )
