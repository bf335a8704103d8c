"""One report from beginning to end: measure, check, and write the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from curvops.errors import DataError
from curvops.extras import require
from curvops.report.checks import Verdict, check
from curvops.report.figure import draw
from curvops.report.measure import Settings, measure
from curvops.report.subject import Subject
from curvops.report.summary import summary

SUMMARY, PICTURE = "summary.txt", "spectrum.png"


def prepare(folder: Path) -> None:
    """Make the folder and look for the extras, before anything long runs.

    Raises:
        DataError: There is a file where the folder should be, or it cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require("matplotlib", "report")
    require("jinja2", "report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the report to {folder}: {error.strerror or error}; choose another --out."
        ) from error


def report(
    subject: Subject, settings: Settings, folder: Path, say: Callable[[str], None] = lambda line: None
) -> tuple[str, Verdict]:
    """Measure a subject, check the numbers where it is small enough, and write `summary.txt` and `spectrum.png`.

    Args:
        subject: The network and its data; left as it was found.
        settings: How much is measured.
        folder: Where the two files go; made if need be.
        say: Told what is being done.

    Returns:
        The summary's text, and the verdict of the self-check.
    """
    prepare(folder)
    say("measuring the GGN and the Hessian by products …")
    measurements = measure(subject, settings)
    say("checking every number against dense matrices …")
    verdict = check(measurements, settings)
    text = summary(subject, settings, measurements, verdict)
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    draw(subject, settings, measurements, folder / PICTURE)
    return text, verdict
