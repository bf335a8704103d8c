"""Random probe vectors, each drawn from its own number: growing a run or splitting it into chunks changes no probe."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import ShapeError

_WORD = (1 << 64) - 1

Draw = Callable[..., Tensor]
"""`rademacher` or `gaussian`."""


def resolve_seed(generator: torch.Generator | None) -> int:
    """Seed of a run: 0 without a generator, otherwise one draw from it (which advances it by one number)."""
    if generator is None:
        return 0
    return int(torch.randint(0, 2**62, (), generator=generator, device=generator.device))


def derive_seed(seed: int, stream: int) -> int:
    """Seed of an independent stream of the same run (a sketch beside the probes, say); splitmix64 of the pair."""
    state = (seed + (stream + 1) * 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return (state ^ (state >> 31)) >> 1


def _streams(seed: int, start: int, count: int) -> list[np.random.Generator]:
    # A counter-based generator keyed by (seed, probe number): no two probes of a run share a stream, whatever the hash
    # luck, and a stream costs microseconds to open. (torch's CPU generator keeps 32 bits of its seed.)
    return [
        np.random.Generator(np.random.Philox(key=np.array([seed & _WORD, index], dtype=np.uint64)))
        for index in range(start, start + count)
    ]


def _check(size: int, start: int, count: int) -> None:
    if size < 1 or start < 0 or count < 1:
        raise ShapeError(
            f"Probes need size >= 1, start >= 0 and count >= 1, got size={size}, start={start}, count={count}."
        )


def rademacher(
    size: int, start: int, count: int, *, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Float[Tensor, "P m"]:
    """Probes of independent signs ±1.

    Args:
        size: P, length of a probe.
        start: Number of the first probe.
        count: m, how many probes.
        seed: Seed of the run; column i depends on (seed, start + i) only.
        dtype: Type of the result; the signs do not depend on it.
        device: Device of the result; the signs do not depend on it.

    Returns:
        `(size, count)`, E z zᵀ = I.

    Raises:
        ShapeError: On an empty size or count.
    """
    _check(size, start, count)
    out = torch.empty(count, size, dtype=dtype, device="cpu")
    for row, stream in enumerate(_streams(seed, start, count)):
        bits = np.unpackbits(np.frombuffer(stream.bytes((size + 7) // 8), dtype=np.uint8), count=size)
        out[row] = torch.from_numpy(bits).to(dtype).mul_(2).sub_(1)
    return out.T.to(device)


def gaussian(
    size: int, start: int, count: int, *, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Float[Tensor, "P m"]:
    """Probes of independent standard normals; arguments, result and errors as in `rademacher`.

    Drawn in float64 and rounded, so that a float32 run sees the probes of its float64 twin.
    """
    _check(size, start, count)
    out = torch.empty(count, size, dtype=dtype, device="cpu")
    for row, stream in enumerate(_streams(seed, start, count)):
        out[row] = torch.from_numpy(stream.standard_normal(size)).to(dtype)
    return out.T.to(device)
