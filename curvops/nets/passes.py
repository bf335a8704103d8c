"""Repeating a pass over the data: the record that notices when it does not repeat, and randomness kept to itself."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from curvops.errors import NonDeterministicDataError
from curvops.nets import draws

T = TypeVar("T")

_KEPT = 2**16
"""Weights of a checksum up to which they are kept for the next one; entries of a batch up to which the latest one's
checksum waits until there is something to compare it with."""

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative change of a batch's checksum that rounding explains (other kernels for other chunks), by outputs' dtype."""

_CAUSES = (
    "A product is a sum over several passes, which must see the same data in the same order: use a DataLoader with "
    "shuffle=False, without random augmentation, and a model in eval mode (dropout in train mode draws anew in each "
    "pass). Or fix the data once: data = list(loader)."
)


@dataclass
class _Trace:
    """What one batch left behind in one pass."""

    shape: tuple[int, ...]
    tolerance: float
    held: Tensor | list[Tensor]

    def checksum(self) -> Tensor:
        """`(1 or 2, 2)`, of outputs and targets; these are kept no longer."""
        held = self.held
        if isinstance(held, list):
            held = self.held = torch.stack([_checksum(t) for t in held])
        return held


class PassRecord:
    """Compares every pass over the data with the first one: number of batches, their sizes, checksums of their outputs.

    In each pass call `observe(index, f, y)` for every batch, from 0 upwards, then `finish()`. Shapes are compared at
    once, checksums together at the end of the pass, so that a pass on an accelerator waits for it once. A pass that was
    cut short (by an error, or on purpose) need not be finished: the next one starts with a smaller index.
    """

    def __init__(self) -> None:
        self._first: dict[int, _Trace] = {}
        self._count: int | None = None
        self._now: dict[int, _Trace] = {}
        self._latest: _Trace | None = None

    @property
    def batches(self) -> int | None:
        """Number of batches of the first complete pass; None before its end."""
        return self._count

    @property
    def shapes(self) -> list[tuple[int, ...]] | None:
        """Shape of every batch's outputs in the first complete pass; None before its end."""
        return None if self._count is None else [trace.shape for trace in self._first.values()]

    def observe(self, index: int, f: Tensor, y: Tensor | None = None) -> None:
        """Note one batch of the present pass.

        Args:
            index: Number of the batch, from 0; not larger than the last one's begins a new pass.
            f: `(B, C)` or `(B, T, C)` outputs, whose weighted sum is taken. O(f).
            y: Targets; a reordering that the outputs do not show, shows here.

        Raises:
            NonDeterministicDataError: The first pass had no such batch, or one of another shape.
        """
        if self._now and index <= max(self._now):
            self._now = {}
        if self._latest is not None:
            self._latest.checksum()
        tensors = [f.detach()] + ([] if y is None else [y.detach()])
        trace = _Trace(tuple(f.shape), TOLERANCES.get(f.dtype, 1e-5), tensors)
        # A single pass over a single batch compares nothing; whose tensors these are may write to them meanwhile.
        if sum(t.numel() for t in tensors) <= _KEPT:
            trace.held = [t.clone() for t in tensors]
        else:
            trace.checksum()
        self._now[index] = self._latest = trace
        before = self._first.setdefault(index, trace) if self._count is None else self._first.get(index)
        if before is None:
            _differs(f"Batch {index} appeared, which the first pass over the data did not have.")
        if before.shape != trace.shape:
            _differs(f"Batch {index} gave outputs of shape {trace.shape}, in the first pass {before.shape}.")

    def finish(self) -> None:
        """End the present pass and compare it with the first.

        Raises:
            NonDeterministicDataError: Batches are missing, or the outputs of one differ.
        """
        now, self._now = self._now, {}
        if self._count is None and len(now) == len(self._first):
            self._count = len(now)
        if len(now) != len(self._first):
            _differs(f"The pass over the data had {len(now)} batches, the first one {len(self._first)}.")
        repeated = [i for i in now if now[i] is not self._first[i]]
        if not repeated:
            return
        pairs = [(self._first[i].checksum(), now[i].checksum()) for i in repeated]
        if any(a.shape != b.shape for a, b in pairs):
            raise ValueError("PassRecord.observe was given targets in one pass and none in another.")
        before, after = (torch.stack(side) for side in zip(*pairs, strict=True))
        scale = torch.maximum(before[..., 1], after[..., 1])
        scale = torch.where(scale == 0, 1, scale)  # all outputs zero in both passes: no change, rather than 0/0
        change = ((after[..., 0] - before[..., 0]).abs() / scale).tolist()
        for i, (in_f, *in_y) in zip(repeated, change, strict=True):
            if not in_f <= self._first[i].tolerance:
                _differs(f"The outputs of batch {i} differ from those of the first pass (relative change {in_f:.1e}).")
            if in_y and not in_y[0] <= TOLERANCES[torch.float64]:
                _differs(f"The targets of batch {i} differ from those of the first pass.")


def _checksum(t: Tensor) -> Tensor:
    """`(2,)`: aᵀ t c with fixed irregular weights a and c, and the same of |t|, its scale. O(t).

    Of labels `(B,)` it is aᵀ t. Weights along every dimension, so that no permutation of data, positions or outputs
    keeps the sum.
    """
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    if t.dtype not in (torch.float32, torch.float64):
        t = t.to(torch.float32 if t.is_floating_point() else wide)
    if t.dim() > 1:
        t = t.reshape(-1, t.shape[-1])
    both = torch.stack([t, t.abs()])
    for axis in reversed(range(t.dim())):
        both = both @ _weight(axis, t)
    return both.to(wide)


def _weight(dim: int, t: Tensor) -> Tensor:
    """Fixed numbers in (½, 1½), one for each row (dim 0) or column (dim 1)."""
    make = _irregular if t.shape[dim] <= _KEPT else _irregular.__wrapped__
    return make(dim, t.shape[dim], t.dtype, t.device)


@functools.lru_cache(maxsize=32)
def _irregular(stream: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed numbers in (½, 1½), which depend on the arguments alone."""
    with torch.inference_mode(False):
        origin = torch.zeros(1, dtype=torch.int64, device="cpu")
        return (draws.uniforms(0, origin, 0, count, stream=stream, device=device)[0] + 0.5).to(dtype)


class PrivateRandomness:
    """Runs the user's iterable on random streams of its own, so that a pass leaves the global ones as they were.

    Starting to iterate a DataLoader draws from torch's global generator, and datasets draw from torch, NumPy and
    `random`. The private streams begin as the global ones are at the first call and then continue from call to call: a
    loader that shuffles still does, and `PassRecord` still sees it. Generators on accelerators are not covered.
    """

    def __init__(self) -> None:
        self._state: Any = None

    def __call__(self, step: Callable[[], T]) -> T:
        """`step()`, with the global streams put back afterwards, also after an error."""
        users = _random_state()
        if self._state is not None:
            _set_random_state(self._state)
        try:
            return step()
        finally:
            self._state = _random_state()
            _set_random_state(users)


def _random_state() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  (the streams to protect)


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


def _differs(what: str) -> NoReturn:
    raise NonDeterministicDataError(f"{what} {_CAUSES}")
