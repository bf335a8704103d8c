"""`python -m tests.benchmarks`: measure everything, write benchmarks.json, print the table in Markdown."""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import dense, products, structured
from tests.benchmarks.models import CASES


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


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    every = list(dict.fromkeys([*CASES, *structured.STRUCTURED]))
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(every)}; all by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peers' own
    chosen = options.cases or every
    results = {name: products.measure(name, options.rounds) for name in chosen if name in CASES}
    # Structured curvatures: tests/benchmarks/structured.py, which also runs by itself.
    blocks = {
        name: structured.measure(name, max(3, options.rounds // 2)) for name in chosen if name in structured.STRUCTURED
    }
    matrix = dense.measure(max(3, options.rounds // 3))
    machine = {"torch": torch.__version__, "threads": options.threads, "processor": platform.processor()}
    options.output.write_text(
        json.dumps({"machine": machine, "products": results, "structured": blocks, "dense": matrix}, indent=1)
    )
    print(*([table(results)] if results else []), *([structured.table(blocks)] if blocks else []), sep="\n\n")
    print("", dense_table(matrix), sep="\n")
    for name, result in [*results.items(), *blocks.items()]:
        for key, why in result["failed"].items():
            print(f"{name}, {key}: {why}")


if __name__ == "__main__":
    main()
