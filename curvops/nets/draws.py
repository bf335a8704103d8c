"""Random numbers addressed by (seed, data position, sample, coordinate) instead of drawn from a stream.

A Monte-Carlo operator multiplies many vectors, in many passes, over batches of any size. It is one linear map only if
datum i gets the same draw every time. A counter-based generator gives that: each number is a hash of its address, so
chunking, batching and the number of passes change nothing. The hash is splitmix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"), chained over the components of the address.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

_Words = NDArray[np.uint64]

_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))
_FACTORS = np.uint64(_FIRST), np.uint64(_SECOND)


def uniforms(
    seed: int,
    positions: Int64[Tensor, " B"],
    sample: int,
    count: int,
    stream: int = 0,
    *,
    device: torch.device | None = None,
) -> Float[Tensor, "B count"]:
    """Uniform numbers in the open interval (0, 1), row i a function of `(seed, positions[i], sample, stream)` alone.

    Args:
        seed: Any integer.
        positions: `(B,)` int64 positions of the data within the data set.
        sample: Number of the Monte-Carlo sample.
        count: Numbers per datum; the first k of them do not depend on `count`.
        stream: Separates uses that must not share their numbers.
        device: Of the numbers; None for that of the positions. They are made on the processor.

    Returns:
        `(B, count)` float64 (float32 where the device has no float64). Cost O(B·count).
    """
    device = positions.device if device is None else device
    key = _mix_int(_mix_int(seed) + _GOLDEN * (stream + 1))
    state = _mix((positions.cpu().numpy().view(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key))
    state = _mix(state + np.uint64(_GOLDEN * (sample + 1) & _WORD))
    bits = _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    # k + ½ is exact in the target's mantissa, so neither 0 nor 1 can appear, whatever the rounding.
    width, real = (23, np.float32) if device.type == "mps" else (52, np.float64)
    bits >>= np.uint64(64 - width)
    numbers = bits.astype(real)
    numbers += real(0.5)
    numbers *= real(2.0**-width)
    return torch.from_numpy(numbers).to(device)


def gaussians(
    seed: int,
    positions: Int64[Tensor, " B"],
    sample: int,
    count: int,
    stream: int = 0,
    *,
    device: torch.device | None = None,
) -> Float[Tensor, "B count"]:
    """Standard normal numbers by the inverse distribution function of `uniforms`; same arguments, shapes and cost."""
    return torch.special.ndtri(uniforms(seed, positions, sample, count, stream, device=device))


def _mix(z: _Words) -> _Words:
    """splitmix64's finaliser in place; products of arrays of words wrap modulo 2⁶⁴ as wanted."""
    z ^= z >> _SHIFTS[0]
    z *= _FACTORS[0]
    z ^= z >> _SHIFTS[1]
    z *= _FACTORS[1]
    z ^= z >> _SHIFTS[2]
    return z


def _mix_int(z: int) -> int:
    """The same finaliser on a Python integer."""
    z &= _WORD
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)
