"""Where the time of a warm GGN product goes: `python -m tests.benchmarks.breakdown [CASE …]`.

Milliseconds of CPU time: kernels whose work counts as FLOPs (matrix products, convolutions, attention), the other
kernels (elementwise, normalisation, copies), and the rest, which is Python, autograd, views and checks. The whole is
timed without a profiler; kernels are timed by PyTorch's, on the clock (so leave the machine alone) and with what that
adds to each call, so that the rest, which is what is left, may be too small. Views are no kernels, and count with
the rest.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import flops, interleaved
from tests.benchmarks.models import CASES

ARITHMETIC = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "mkldnn_convolution", "convolution_backward",
    "_slow_conv2d_forward", "thnn_conv2d", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "mkldnn::_linear_pointwise",
})  # fmt: skip
VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "as_strided", "t", "transpose", "permute", "expand", "expand_as", "slice",
    "select", "detach", "detach_", "alias", "split", "split_with_sizes", "chunk", "narrow", "squeeze", "unsqueeze",
    "flatten", "unflatten", "movedim", "view_as", "unbind", "result_type", "is_nonzero", "resize_", "set_",
    "lift_fresh", "to", "matmul", "linear", "conv2d", "convolution", "_convolution", "empty", "empty_like",
    "empty_strided", "new_empty", "zeros", "zeros_like", "contiguous", "requires_grad_", "unsafe_split",
    "scaled_dot_product_attention",
})  # fmt: skip
"""What moves no data: views, allocation, and operations that only call others."""
_CALLS = 5


def measure(name: str, rounds: int = 9) -> dict[str, Any]:
    """One case's shares."""
    model, x, y = CASES[name].build()
    G = co.GGN(model, "classification", (x, y))
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    times = interleaved(
        {
            "product": lambda: G @ v,
            "gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters),
        },
        rounds,
    )
    whole = 1e3 * times["product"].cpu
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(_CALLS):
            G @ v
    kernels = {
        event.key.removeprefix("aten::"): event.self_cpu_time_total / _CALLS / 1e3
        for event in found.key_averages()
        if event.key.startswith(("aten::", "mkldnn::"))
    }
    kernels = {key: t for key, t in kernels.items() if key not in VIEWS}
    arithmetic = sum(t for key, t in kernels.items() if key in ARITHMETIC)
    count = flops(lambda: G @ v) or 0
    return {
        "ms": whole,
        "gradient": 1e3 * times["gradient"].cpu,
        "arithmetic": arithmetic,
        "other kernels": sum(kernels.values()) - arithmetic,
        "rest": whole - sum(kernels.values()),
        "gigaflops": count / 1e6 / arithmetic,
        "largest": dict(sorted(kernels.items(), key=lambda pair: -pair[1])[:6]),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| warm GGN product, ms | whole | arithmetic | other kernels | rest | one gradient | GFLOP/s | largest |",
             "|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for name, row in results.items():
        largest = ", ".join(f"{key} {t:.2f}" for key, t in row["largest"].items())
        parts = " | ".join(f"{row[key]:.2f}" for key in ("ms", "arithmetic", "other kernels", "rest", "gradient"))
        lines.append(f"| {name} | {parts} | {row['gigaflops']:.0f} | {largest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table({name: measure(name) for name in sys.argv[1:] or ["mlp", "cnn70k", "gpt"]}))
