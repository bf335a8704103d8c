"""Random numbers addressed by (seed, data position, sample, coordinate) instead of drawn from a stream.

A Monte-Carlo operator multiplies many vectors, in many passes, over batches of any size. It is one linear map only if
datum i gets the same draw every time. A counter-based generator gives that: each number is a hash of its address, so
chunking, batching and the number of passes change nothing. The hash is splitmix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"), chained over the components of the address.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def uniforms(
    seed: int, positions: Int64[Tensor, " B"], sample: int, count: int, stream: int = 0
) -> Float[Tensor, "B count"]:
    """Uniform numbers in the open interval (0, 1), row i a function of `(seed, positions[i], sample, stream)` alone.

    Args:
        seed: Any integer.
        positions: `(B,)` int64 positions of the data within the data set.
        sample: Number of the Monte-Carlo sample.
        count: Numbers per datum; the first k of them do not depend on `count`.
        stream: Separates uses that must not share their numbers.

    Returns:
        `(B, count)` float64 (float32 where the device has no float64). Cost O(B·count).
    """
    key = _mix_int(_mix_int(seed) + _GOLDEN * (stream + 1))
    state = _mix(_signed(key) + (positions + 1) * _signed(_GOLDEN))
    state = _mix(state + _signed(_GOLDEN * (sample + 1)))
    coordinates = torch.arange(1, count + 1, device=positions.device)
    bits = _mix(state[:, None] + coordinates * _signed(_GOLDEN))
    # k + ½ is exact in the target's mantissa, so neither 0 nor 1 can appear, whatever the rounding.
    if positions.device.type == "mps":
        return (_shift(bits, 41).to(torch.float32) + 0.5) * 2.0**-23
    return (_shift(bits, 12).to(torch.float64) + 0.5) * 2.0**-52


def gaussians(
    seed: int, positions: Int64[Tensor, " B"], sample: int, count: int, stream: int = 0
) -> Float[Tensor, "B count"]:
    """Standard normal numbers by the inverse distribution function of `uniforms`; same arguments, shapes and cost."""
    return torch.special.ndtri(uniforms(seed, positions, sample, count, stream))


def _shift(z: Tensor, k: int) -> Tensor:
    """Logical right shift: int64's own shift would drag the sign along."""
    return (z >> k) & ((1 << (64 - k)) - 1)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap modulo 2⁶⁴ as wanted."""
    z = (z ^ _shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _shift(z, 27)) * _signed(_SECOND)
    return z ^ _shift(z, 31)


def _mix_int(z: int) -> int:
    """The same finaliser on a Python integer."""
    z &= _WORD
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """The int64 that has the bits of `z` modulo 2⁶⁴."""
    z &= _WORD
    return z - (1 << 64) if z >> 63 else z
