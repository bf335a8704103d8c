"""Products and structured curvatures on an accelerator, this library's and its peers', as multiples of one gradient.

    python -m tests.benchmarks.accelerator [cases] [--device cuda] [--rounds 9] [--match "KFAC|diagonal"]

Time is that of the clock until the device has finished; peaks are the allocator's, above what was held before. The
networks are those of the other benchmarks, where calls weigh more than arithmetic, and wider ones, where they do not.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import warnings
from typing import NamedTuple

import torch

from tests.benchmarks import products, structured
from tests.benchmarks.measure import Work, interleaved
from tests.benchmarks.models import CASES, Case, cnn, gpt, mlp

NETWORKS = {
    **structured.STRUCTURED,
    "resnet": CASES["resnet"],
    "mlp29m": Case("mlp29m", "MLP 3072-4096-4096-10, batch 4,096", lambda: mlp((3072, 4096, 4096, 10), 4096)),
    "cnn1m": Case("cnn1m", "CNN, 1.1M parameters, batch 512", lambda: cnn((64, 128, 256), 180, 512)),
    "gpt91m": Case("gpt91m", "GPT, 91M parameters, 8 x 64 tokens", lambda: gpt(12, 768, 4096), positions=True),
}
SECONDS = 4.0
"""What takes longer in its first run is left out."""


class Row(NamedTuple):
    """Gradients and bytes of one piece of work."""

    gradients: float
    megabytes: float


def peak(work: Work, device: torch.device) -> int:
    """Bytes by which one run raises what the allocator has given out."""
    gc.collect()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def measure(
    name: str, device: torch.device, rounds: int, match: str = ""
) -> tuple[float, dict[str, Row], dict[str, str]]:
    """Seconds of a gradient, the rows of the work whose name matches, and why others are missing."""
    made, columns = products.works(NETWORKS[name], str(device))
    made |= structured.works(NETWORKS[name], str(device))
    made = {key: work for key, work in made.items() if key == "gradient" or re.search(match, key)}
    missing, megabytes = {}, {}
    for key in list(made):
        try:
            began = time.perf_counter()
            made[key]()
            torch.cuda.synchronize(device)
            if (seconds := time.perf_counter() - began) > SECONDS:
                raise TimeoutError(f"{seconds:.1f} s")
            megabytes[key] = peak(made[key], device) / 1e6
        except Exception as error:  # what does not run is a result too
            missing[key] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            del made[key]
    times = interleaved(made, rounds, lambda: torch.cuda.synchronize(device))
    unit = times["gradient"].wall
    rows = {key: Row(t.wall / unit / columns.get(key, 1), megabytes[key]) for key, t in times.items()}
    return unit, rows, missing


def main() -> None:
    """Print a table per network."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accelerator", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--match", default="", help="regular expression of the work to time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    device = torch.device(options.device)
    print(torch.cuda.get_device_name(device), torch.__version__)
    for name in options.cases or NETWORKS:
        unit, rows, missing = measure(name, device, options.rounds, options.match)
        print(f"\n| {NETWORKS[name].title}: one gradient {unit * 1e3:.2f} ms | gradients | peak MB |\n|---|---:|---:|")
        for key, row in rows.items():
            print(f"| {key} | {row.gradients:.2f} | {row.megabytes:.1f} |")
        for key, why in missing.items():
            print(f"{key}: {why}")


if __name__ == "__main__":
    main()
