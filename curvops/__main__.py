"""`python -m curvops report` and `python -m curvops info`.

Exit codes: 0 all is well; 1 the self-check failed; 2 the arguments, the user's code or an extra are not as needed.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from curvops.errors import CurvopsError

OUT = "curvops-report"
CORE = (
    "curvops",
    "torch",
    "numpy",
    "scipy",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "linear_operator",
    "jaxtyping",
)

_EPILOG = """\
your own network:
  python -m curvops report --model mine:network --data mine:batches --likelihood classification

  mine.py, in the folder you run from:
    def network():                # your trained network, an nn.Module in eval mode
        ...
    def batches():                # a tuple (x, y), a mapping with "labels", or a DataLoader without shuffling
        ...
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m curvops", description="Curvature of neural networks, measured and checked."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="{report,info}")
    report = commands.add_parser(
        "report",
        help="measure a network's curvature, and check the numbers",
        description="Train a 64-16-10 network on scikit-learn's digits (or take yours), measure its GGN and Hessian by "
        "products alone, check every number against dense matrices, and write summary.txt and spectrum.png.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help=f"folder to write to ({OUT})")
    report.add_argument("--model", metavar="MODULE:FACTORY", help="function that returns your trained network")
    report.add_argument("--data", metavar="MODULE:FACTORY", help="function that returns your data")
    report.add_argument("--likelihood", choices=("regression", "classification", "binary"), help="of your data")
    report.add_argument("--delta", type=float, default=1.0, help="prior precision, added to the GGN (1.0)")
    report.add_argument("--seed", type=int, default=0, help="seed of the digits network and of every estimate (0)")
    report.add_argument("--samples", type=int, default=100, help="posterior samples (100)")
    report.add_argument("--eigenvalues", type=int, default=10, help="largest eigenvalues of either curvature (10)")
    commands.add_parser("info", help="print versions, and which extras are there")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    given = [bool(options.model), bool(options.data), bool(options.likelihood)]
    if any(given) and not all(given):
        command_line.error("report: --model, --data and --likelihood go together; give all three or none of them.")
    try:
        return _report(options)
    except CurvopsError as error:
        print(f"python -m curvops: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def info() -> str:
    """Versions of what curvops stands on, and which extras are installed."""
    import torch

    from curvops.extras import EXTRAS, version_of

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name} {version_of(name) or 'not installed'}" for name in CORE]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines += [f"cuda device: {cuda}", f"threads: {torch.get_num_threads()}", "", "extras:"]
    for extra, parts in EXTRAS.items():
        missing = [distribution for _, distribution in parts if version_of(distribution) is None]
        there = ", ".join(f"{distribution} {version_of(distribution)}" for _, distribution in parts)
        lines.append(f"  {extra:<10} {there if not missing else f'''pip install 'curvops[{extra}]' '''.strip()}")
    return "\n".join(lines)


def _report(options: argparse.Namespace) -> int:
    from curvops.report.digits import digits_subject
    from curvops.report.measure import Settings
    from curvops.report.subject import users_subject
    from curvops.report.write import PICTURE, SUMMARY, prepare, report

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    settings = Settings(
        delta=options.delta, seed=options.seed, samples=options.samples, eigenvalues=options.eigenvalues
    )
    prepare(options.out)
    if options.model:
        subject = users_subject(options.model, options.data, options.likelihood)
    else:
        say("training a 64-16-10 network on the digits …")
        subject = digits_subject(options.delta, options.seed)
    text, verdict = report(subject, settings, options.out, say)
    print(text)
    print(f"Written: {options.out / SUMMARY}, {options.out / PICTURE}")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
