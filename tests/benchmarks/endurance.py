"""Five hundred GGN products in a row: drift of their time, growth of memory, whether the graph goes with the operator.

`python -m tests.benchmarks.endurance [CASE …]` prints the median CPU time of the first and the last fifty warm
products, and by how much the resident size grows after the fiftieth.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import weakref
from typing import Any

import torch

import curvops as co
from tests.benchmarks.measure import resident, warmed
from tests.benchmarks.models import CASES

PRODUCTS, WINDOW = 500, 50


def measure(name: str) -> dict[str, Any]:
    """Milliseconds, MB, and whether the operator and what it kept are gone after `del`."""
    model, x, y = CASES[name].build()
    G = co.GGN(model, "classification", (x, y))
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    warmed(G, v)
    held = [weakref.ref(G), *(weakref.ref(kept.piece) for kept in G._linearised.values())]
    spent, sizes = [], []
    for _ in range(PRODUCTS):
        start = time.process_time()
        G @ v
        spent.append(1e3 * (time.process_time() - start))
        sizes.append(resident())
    del G
    gc.collect()
    return {
        "first": statistics.median(spent[:WINDOW]),
        "last": statistics.median(spent[-WINDOW:]),
        "growth": (sizes[-1] - sizes[WINDOW - 1]) / 1e6,
        "freed": all(reference() is None for reference in held),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"| {PRODUCTS} warm products | first {WINDOW}, ms | last {WINDOW}, ms | growth, MB | freed with the operator |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {name} | {row['first']:.2f} | {row['last']:.2f} | {row['growth']:.1f} | {'yes' if row['freed'] else 'no'} |"
        for name, row in results.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table({name: measure(name) for name in sys.argv[1:] or ["digits", "mlp", "cnn70k"]}))
