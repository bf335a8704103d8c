"""Where the time of a warm product goes, and its floor: `python -m tests.benchmarks.breakdown [CASE …]`.

The floor is the time of the matrix products, convolutions and attention of a product alone, called one after the
other on the same tensors, with nothing between them: no product by the same passes can be faster with these
libraries. What is called is what FLOPs are counted of, so that nothing superfluous raises the floor (4/3 of a
gradient is the least for two passes over layers that all count). For many columns the floor is tried both ways, in
turn and stacked into one product per layer, and the lesser of both is taken.

The breakdown is of the GGN. Milliseconds of CPU time: kernels whose work counts as FLOPs (matrix products,
convolutions, attention), the other kernels (elementwise, normalisation, copies), and the rest, which is Python,
autograd, views and checks. The whole is timed without a profiler; kernels are timed by PyTorch's, on the clock (so
leave the machine alone) and with what that adds to each call, so that the rest, which is what is left, may be too
small. Views are no kernels, and count with the rest.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import Work, flops, interleaved, warmed
from tests.benchmarks.models import CASES

ARITHMETIC = frozenset({
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "mkldnn_convolution",
    "convolution_backward", "_slow_conv2d_forward", "thnn_conv2d", "_scaled_dot_product_flash_attention_for_cpu",
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
COLUMNS = 16


class _Calls(TorchDispatchMode):
    """Remembers the calls of arithmetic that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ARITHMETIC or name in ("convolution", "mkldnn::_linear_pointwise"):
            self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def bare(work: Work) -> Work:
    """The arithmetic of a piece of work and nothing else, on the tensors that it had."""
    work()  # warm
    with _Calls() as calls:
        work()

    @torch.no_grad()
    def run() -> None:
        for func, args, kwargs in calls.made:
            func(*args, **kwargs)

    return run


def stacked(work: Work) -> Work:
    """As `bare` of one column, all columns of a matrix product stacked into one; other calls column after column."""
    work()
    with _Calls() as calls:
        work()
    made: list[tuple[Any, Any]] = []
    for func, args, kwargs in calls.made:
        name = func._schema.name.removeprefix("aten::")
        if name not in ("mm", "addmm", "addmm_"):
            made += [(lambda func=func, args=args, kwargs=kwargs: func(*args, **kwargs), None)] * COLUMNS
            continue
        a, b = args[-2:]
        # Either operand may carry the columns: stack the smaller one.
        if a.shape[0] >= b.shape[1]:
            made.append((a, torch.randn(COLUMNS * b.shape[1], b.shape[0], dtype=b.dtype).T))
        else:
            made.append((torch.randn(COLUMNS * a.shape[0], a.shape[1], dtype=a.dtype), b))

    @torch.no_grad()
    def run() -> None:
        for first, second in made:
            first() if second is None else first @ second

    return run


def floors(name: str, rounds: int = 9) -> dict[str, Any]:
    """Work → milliseconds of its product, of the product's arithmetic alone, and of a gradient."""
    model, x, y = CASES[name].build()
    data = (x, y)
    operators = {"GGN": co.GGN(model, "classification", data), "Hessian": co.Hessian(model, "classification", data)}
    generator = torch.Generator().manual_seed(0)
    size = operators["GGN"].shape[0]
    v, V = torch.randn(size, generator=generator), torch.randn(size, COLUMNS, generator=generator)
    for operator in operators.values():
        warmed(operator, v)
    parameters = list(model.parameters())
    works: dict[str, Work] = {
        "gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters),
        **{name: (lambda operator=operator: operator @ v) for name, operator in operators.items()},
    }
    timed = {**works, **{f"{name} bare": bare(work) for name, work in works.items()}}
    timed[f"GGN, {COLUMNS} columns"] = lambda: operators["GGN"] @ V
    timed["stacked"] = stacked(works["GGN"])
    times = {key: 1e3 * timing.cpu for key, timing in interleaved(timed, rounds).items()}
    found = {key: {"ms": times[key], "floor": times[f"{key} bare"]} for key in works}
    found[f"GGN, {COLUMNS} columns, per column"] = {
        "ms": times[f"GGN, {COLUMNS} columns"] / COLUMNS,
        "floor": min(times["stacked"] / COLUMNS, times["GGN bare"]),
    }
    return found


def measure(name: str, rounds: int = 9) -> dict[str, Any]:
    """One case's shares."""
    model, x, y = CASES[name].build()
    G = co.GGN(model, "classification", (x, y))
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    warmed(G, v)
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
        "floors": floors(name, rounds),
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
    return "\n".join([*lines, "", *_floor_lines(results)])


def _floor_lines(results: dict[str, Any]) -> list[str]:
    """In gradients, beside the milliseconds."""
    lines = ["| ms (gradients) | product | its arithmetic alone | beside it |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        unit = row["floors"]["gradient"]["ms"]
        for key, one in row["floors"].items():
            parts = (one["ms"], one["floor"], one["ms"] - one["floor"])
            lines.append(f"| {name}, {key} | " + " | ".join(f"{t:.2f} ({t / unit:.2f})" for t in parts) + " |")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table({name: measure(name) for name in sys.argv[1:] or ["mlp", "cnn70k", "gpt"]}))
