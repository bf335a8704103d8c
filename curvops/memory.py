"""How much memory a computation may take: the budget, what it will need, the check before it starts, and chunks.

The model. A vector of P entries is the unit x. A kept graph holds the tensors that autograd saved, counted once by
walking over it; that is known after the first pass over the data, and no sooner. One product then takes, above the
graph, 2 x or the largest four of those tensors (a Hessian's: seven tenths of all of them), whichever is more; K columns
take K x more where they run in turn, and K times as much where they run together. Algorithms add their own vectors:

    products    the graphs that it will keep, and the passing part above
    CG, MINRES  7 vectors a column, 10 for MINRES
    Lanczos     (steps + 5) vectors a probe; quadrature and f(A) v deepen it as far as the budget goes
    ARPACK      its Krylov vectors in float64
    XTrace, XDiag   7 vectors a probe, probes doubled as far as the budget goes
    dense       the matrix and what makes it; then 2.75 matrices for Cholesky, 4.5 for an eigendecomposition

These are peaks of what lives at one time; an allocator that keeps freed blocks for later can make a process larger.
`python -m tests.benchmarks.memory` compares them with measured peaks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from curvops.errors import MemoryBudgetError

_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

_UNLIMITED = 2**62
"""Version 1 of cgroups says so by more bytes than this, version 2 in a word."""


@dataclass(frozen=True)
class Need:
    """Bytes that a computation takes at its peak, above what is held when it starts.

    Attributes:
        passing: What it frees again, and its result.
        kept: What stays for later products.
        complete: False where a part is unknown before a forward pass has told it: the graphs of the batches.
        grows: Whether it is a beginning, that grows towards the budget where the target asks for more.
    """

    passing: int = 0
    kept: int = 0
    complete: bool = True
    grows: bool = False

    @property
    def peak(self) -> int:
        """Both together."""
        return self.passing + self.kept

    def beside(self, count: float, *, grows: bool = False) -> Need:
        """The same while `count` bytes more are held."""
        return replace(self, passing=self.passing + int(count), grows=self.grows or grows)

    def __str__(self) -> str:
        text = f"{'from' if self.grows else 'about'} {readable(self.peak)}"
        return text if self.complete else f"{text} beside the batches' graphs, which the first pass measures"


def in_turn(needs: Iterable[Need]) -> Need:
    """Computations one after the other: what passes, passes; what is kept adds up."""
    needs = list(needs)
    return Need(
        max((need.passing for need in needs), default=0),
        sum(need.kept for need in needs),
        all(need.complete for need in needs),
        any(need.grows for need in needs),
    )


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on `device` now: the machine's available memory or the cgroup's rest, whichever is less."""
    device = torch.device(device)
    if device.type == "cuda":
        unused_by_allocator = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_by_allocator
    return min(_machine_free(), _cgroup_free())


def default_budget(device: torch.device | str = "cpu") -> int:
    """Half of what is free on `device`."""
    return free_bytes(device) // 2


def require(needed: int, budget: int | None, device: torch.device | str, what: str, way_out: str) -> None:
    """Refuse a computation that would exceed the budget, before it starts.

    Args:
        needed: Bytes that it would take.
        budget: Bytes that it may take; None for `default_budget(device)`.
        device: Where it would take them.
        what: The computation, as the subject of a sentence.
        way_out: What to do instead.

    Raises:
        MemoryBudgetError: When `needed` exceeds the budget.
    """
    allowed = default_budget(device) if budget is None else budget
    if needed > allowed:
        raise MemoryBudgetError(
            f"{what} needs {readable(needed)}, and the memory budget is {readable(allowed)}. {way_out}"
        )


def columns_within(budget: int | None, device: torch.device | str, bytes_per_column: int, columns: int) -> int:
    """Largest number of columns (at least one, at most `columns`) whose work fits into the budget."""
    allowed = default_budget(device) if budget is None else budget
    return max(1, min(columns, allowed // max(1, bytes_per_column)))


def readable(count: int) -> str:
    """Bytes as a short string with a decimal unit."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _machine_free() -> int:
    try:
        for line in _read("/proc/meminfo").splitlines():
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_free() -> int:
    for limit_file, usage_file in _cgroup_limits():
        try:
            limit = _read(limit_file).strip()
            if limit != b"max" and int(limit) < _UNLIMITED:
                return max(0, int(limit) - int(_read(usage_file)))
        except OSError:  # gone since they were found: no limit is known
            continue
    return _UNLIMITED


@functools.cache
def _cgroup_limits() -> tuple[tuple[str, str], ...]:
    """Those of the files that there are."""
    return tuple(pair for pair in _CGROUP_LIMITS if all(os.access(path, os.R_OK) for path in pair))


def _read(path: str) -> bytes:
    """A small file of the kernel's, at a third of the cost of `Path.read_bytes`: every pass over the data asks."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 2**16)
    finally:
        os.close(file)
