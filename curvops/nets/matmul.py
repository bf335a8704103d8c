"""Matrix products by the faster of the two libraries that PyTorch ships, where that is known beforehand.

On x86 processors that are not Intel's, MKL keeps to its AVX2 kernels; oneDNN uses AVX-512 where there is any. On AMD's
fifth Zen, whose cores do twice as much by that, it makes 97 against 225 GFLOP/s; on the fourth 82 against 98, which it
loses again by laying out transposed factors first. PyTorch sends float32 matrix products to MKL. Both round alike:
plain float32 with float32 sums, in an order of their own. The choice is by processor, type and size: same input, same
bits.
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
    if batched(sum_, a, b):
        return matmul(a, b) + sum_
    if _by_onednn(a, b) and sum_.dtype == a.dtype and not (torch.is_grad_enabled() and sum_.requires_grad):
        if sum_.dim() == 1:
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), sum_, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(a, sum_, b.t(), None, "add")
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
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    except OSError:
        return False
    facts = {key.strip(): value.strip() for key, _, value in lines}
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts.get("cpu family", 0)) >= 26
