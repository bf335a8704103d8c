"""Times, FLOPs and memory. What is compared runs in one process, in turns, so that load falls on all alike."""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from curvops import LinearOperator

Work = Callable[[], object]

WARM = 24
"""Products before a product is called warm."""


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds, in seconds.

    Attributes:
        cpu: Time of all threads of the process on the processor, which other processes do not add to.
        wall: Time on the clock.
    """

    cpu: float
    wall: float


def interleaved(
    works: Mapping[str, Work], rounds: int, finish: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Median times of several pieces of work: each once to warm up, then each once per round.

    Args:
        works: Name → work.
        rounds: How often.
        finish: Waits for what a piece of work has only queued.
    """
    for work in works.values():
        work()
    cpu: dict[str, list[float]] = {name: [] for name in works}
    wall: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # What ran before leaves the caches and the allocator in a state of its own: no one always follows the same.
            order = list(works.items())
            random.Random(turn).shuffle(order)
            for name, work in order:
                finish()
                start, clock = time.process_time(), time.perf_counter()
                work()
                finish()
                cpu[name].append(time.process_time() - start)
                wall[name].append(time.perf_counter() - clock)
    finally:
        gc.enable()
    return {name: Timing(statistics.median(cpu[name]), statistics.median(wall[name])) for name in works}


def beside(work: Work, unit: Work, rounds: int = 3, units: int = 8) -> tuple[Timing, Timing]:
    """Median times of a long piece of work, and of short ones that ran right before and after it.

    Where the processor is slower for a minute, it is so for both.
    """
    runs: list[Timing] = []
    around: list[Timing] = []
    unit()
    for _ in range(rounds):
        around += [once(unit) for _ in range(units // 2)]
        runs.append(once(work))
        around += [once(unit) for _ in range(units - units // 2)]
    return _median(runs), _median(around)


def _median(timings: list[Timing]) -> Timing:
    return Timing(statistics.median(t.cpu for t in timings), statistics.median(t.wall for t in timings))


def warmed(operator: LinearOperator, v: Tensor) -> LinearOperator:
    """The operator after as many products as a Krylov method soon has made: graphs are kept, and calls on tape."""
    for _ in range(WARM):
        operator @ v
    return operator


def once(work: Work) -> Timing:
    """One run, cold."""
    start, clock = time.process_time(), time.perf_counter()
    work()
    return Timing(time.process_time() - start, time.perf_counter() - clock)


def flops(work: Work) -> int | None:
    """Floating-point operations of matrix products, convolutions and attention in one run; independent of hardware.

    None where the counter's hooks on modules cannot follow (`torch.func` transforms of stateful modules).
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        try:
            work()
        except RuntimeError as error:
            if "_will_engine_execute_node" in str(error):
                return None
            raise
    return counter.get_total_flops()


def peak_above(work: Work) -> int:
    """Bytes by which one run raises the resident size of this process above what it was (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def in_subprocess(module: str, *arguments: str) -> object:
    """What `python -m module arguments` prints as JSON in its last line: peaks of memory need their own process."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _linear_flops(a: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(a) * weight[0]


def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _product_flops(_: torch.Size, a: torch.Size, b: torch.Size, *__: object, **___: object) -> int:
    return 2 * math.prod(a) * b[-1]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


_UNCOUNTED: dict[Any, Any] = {
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten.baddbmm_: _product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""What PyTorch's counter passes over: oneDNN's products, products added in place, and attention on a processor, which
it counts on accelerators by the same two formulas."""
