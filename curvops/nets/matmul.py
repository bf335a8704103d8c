"""Matrix products by the faster of the two libraries that PyTorch ships, where that is known beforehand.

On x86 processors that are not Intel's, MKL keeps to its AVX2 kernels; oneDNN uses AVX-512 where there is any
(float32 products of an AMD EPYC core: 97 against 225 GFLOP/s). PyTorch sends float32 matrix products to MKL. Both round
alike: plain float32 with float32 sums, in an order of their own. The choice is by processor, type and size: same input,
same bits.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from curvops.nets.adjoint import batched

_WORTHWHILE = 2**20
"""Multiplications below which the call itself is what takes time."""


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` for a `(…, m, k)` and b `(k, n)`; no gradient passes through. O(m·k·n).

    Written to `out` where that is given and the library can; what is returned tells.
    """
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b if out is None else torch.mm(a, b, out=out)


def with_product(sum_: Tensor | None, a: Tensor, b: Tensor, *, in_place: bool = False) -> Tensor:
    """`sum_ + a @ b` without a pass of its own for the sum, which is of the product's shape or one row for all.

    Args:
        in_place: `sum_` is nobody else's, and may be written to.
    """
    if sum_ is None:
        return matmul(a, b)
    if batched(sum_, a, b) or _by_onednn(a, b):
        return matmul(a, b) + sum_
    shape, rows = (*a.shape[:-1], b.shape[-1]), a.reshape(-1, a.shape[-1])
    if in_place and sum_.is_contiguous():
        sum_.view(-1, shape[-1]).addmm_(rows, b)
        return sum_
    return torch.addmm(sum_.reshape(-1, shape[-1]), rows, b).view(shape)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        onednn_is_faster()
        and a.numel() * b.shape[-1] >= _WORTHWHILE
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and torch._C._get_mkldnn_enabled()
        and not batched(a, b)  # it has no batching rule
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))  # nor a derivative
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 matrix products of this build on this processor are better left to oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        vendors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    except OSError:
        return False
    return bool(vendors) and "AuthenticAMD" in vendors[0]
