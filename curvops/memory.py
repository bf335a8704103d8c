"""How much memory a computation may take: the budget, the check before it starts, and chunks that keep inside it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from curvops.errors import MemoryBudgetError

_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
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
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_free() -> int:
    for limit_file, usage_file in _CGROUP_LIMITS:
        try:
            limit = Path(limit_file).read_text().strip()
            usage = Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit != "max":
            return max(0, int(limit) - int(usage))
    return 2**62
