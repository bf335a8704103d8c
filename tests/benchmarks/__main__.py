"""`python -m tests.benchmarks`: measure everything, write benchmarks.json, print the tables in Markdown.

Parts and cases that are not asked for stay in the file as they were measured, if on the same machine in as many rounds;
with `--readme` the README's table is written from the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import breakdown, dense, overhead, products, readme, structured
from tests.benchmarks.models import CASES

PARTS = ("products", "structured", "dense", "overhead", "breakdown")
FILE = Path(__file__).with_name("benchmarks.json")


def table(results: dict[str, Any]) -> str:
    """Rows of work, columns of models; each entry "CPU time (FLOPs)" in gradients per column."""
    names = list(results)
    keys = list(dict.fromkeys(key for result in results.values() for key in [*result["rows"], *result["failed"]]))
    lines = ["| in gradients: CPU time (FLOPs) | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for key in keys:
        entries = []
        for name in names:
            row = results[name]["rows"].get(key)
            count = "" if row is None or row["flops"] is None else f" ({row['flops']:.2f})"
            entries.append("fails" if row is None else f"{row['cpu']:.2f}{count}")
        lines.append(f"| {key} | " + " | ".join(entries) + " |")
    seconds = (f"{results[name]['rows']['gradient']['cpu_seconds'] * 1e3:.2f} ms" for name in names)
    return "\n".join([*lines, "| one gradient | " + " | ".join(seconds) + " |"])


def dense_table(result: dict[str, Any]) -> str:
    """Roads to the dense matrix."""
    lines = ["| dense GGN, P = 4,990, N = 256 | CPU seconds | MB above the base |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['cpu_seconds']:.3f} | {row['megabytes']:.0f} |" for name, row in result.items()]
    return "\n".join(lines)


TABLES = {
    "products": table,
    "structured": structured.table,
    "dense": dense_table,
    "overhead": overhead.table,
    "breakdown": breakdown.table,
}


def measure(part: str, cases: list[str], rounds: int) -> dict[str, Any]:
    """One part's numbers on the cases that it knows."""
    if part == "dense":
        return dense.measure(max(3, rounds // 3))
    if part == "overhead":
        return overhead.measure(rounds)
    if part == "structured":
        few = max(3, rounds // 2)
        return {name: structured.measure(name, few) for name in cases if name in structured.STRUCTURED}
    one = products.measure if part == "products" else breakdown.measure
    return {name: one(name, rounds) for name in cases if name in CASES}


def processor() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    every = list(dict.fromkeys([*CASES, *structured.STRUCTURED]))
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(every)}; all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FILE)
    parser.add_argument("--readme", action="store_true", help="write the README's table")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(every):
        parser.error(f"no such case: {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peers' own
    machine = {"torch": torch.__version__, "threads": options.threads, "processor": processor()}
    measured = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.parts:
        results = measure(part, options.cases or every, options.rounds)
        if not results:  # none of its cases was asked for
            continue
        how = {"machine": machine, "rounds": options.rounds}
        before = measured.get(part, {})
        kept = before.get("results", {}) if how == {key: before.get(key) for key in how} else {}
        measured[part] = {**how, "results": {**kept, **results}}
        options.output.write_text(json.dumps(measured, indent=1) + "\n")
        sys.stdout.write(f"{TABLES[part](results)}\n\n")
        for name, result in results.items():
            for key, why in result.get("failed", {}).items():
                sys.stdout.write(f"{name}, {key}: {why}\n")
        sys.stdout.flush()
    if options.readme:
        readme.write(measured)


if __name__ == "__main__":
    main()
