"""Exact evidence at a million parameters: logdet(GGN + δI) of a wide network on the digits, through function space.

    python -m tests.benchmarks.evidence [--width 970] [--data 1000] [--slq [--rtol 0.025 | --probes 40 --steps 16]]

Prints seconds, peak of memory and the value; with `--slq` also that of stochastic Lanczos quadrature, whose half-width
the exact value must lie in: within 1 % (about ten minutes on two cores), or as the options say.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import nn

import curvops as co
from tests.benchmarks.measure import peak_above


def subject(width: int, count: int) -> co.GGN:
    """The GGN of 64-width-width-10 (tanh, float64) on `count` of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    ).double()  # fmt: skip
    x = torch.from_numpy(digits.data[:count]).double() / 16
    return co.GGN(model, "classification", (x, torch.from_numpy(digits.target[:count]).long()))


def measure(width: int, count: int, delta: float, slq: co.SLQ | None) -> dict[str, Any]:
    """The exact log-determinant with its cost, and the estimate where asked for."""
    found: dict[str, Any] = {}

    def exact() -> None:
        A = subject(width, count).add_diagonal(delta)
        found.update(parameters=A.shape[0], data=count, delta=delta)
        start, clock = time.process_time(), time.perf_counter()
        value, report = A.logdet(co.FunctionSpace(), return_report=True)
        found.update(
            logdet=float(value),
            algorithm=report.algorithm,
            cpu_seconds=time.process_time() - start,
            wall_seconds=time.perf_counter() - clock,
        )

    found["gigabytes"] = peak_above(exact) / 1e9
    if slq is not None:
        start = time.perf_counter()
        _, report = subject(width, count).add_diagonal(delta).logdet(slq, return_report=True)
        found["slq"] = {
            "logdet": report.value,
            "half_width": report.half_width,
            "probes": report.probes,
            "products": report.matvecs,
            "wall_seconds": time.perf_counter() - start,
            "within": abs(report.value - found["logdet"]) <= report.half_width,
        }
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evidence", description=__doc__)
    parser.add_argument("--width", type=int, default=970)
    parser.add_argument("--data", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slq", action="store_true")
    parser.add_argument("--rtol", type=float)
    parser.add_argument("--probes", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    slq = co.SLQ(options.probes, options.steps, options.rtol) if options.slq else None
    print(json.dumps(measure(options.width, options.data, options.delta, slq), indent=1))


if __name__ == "__main__":
    main()
