"""The engine that was not taken, `torch.func.linearize` with a kept graph for the adjoint, beside the kept graphs of
ours.

`python -m tests.benchmarks.linearised [CASE …]` prints the set-up and one warm GGN product of both, in gradients (CPU
time), and after how many products linearize's set-up would be paid for; or why it does not run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, linearize
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import interleaved, once, warmed
from tests.benchmarks.models import CASES


def linearised(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The GGN product: tangent by the linear map, adjoint through a graph that is kept."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = tuple(p.detach() for p in parameters)

    def outputs(*given: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, given, strict=True)), (x,))

    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = linearize(outputs, *values)
        f = model(x)
    p = f.detach().softmax(-1)
    sizes = [value.numel() for value in values]

    def product(v: Tensor) -> Tensor:
        pieces = [t.view_as(value) for t, value in zip(v.split(sizes), values, strict=True)]
        Jv = tangent(*pieces)
        u = p * (Jv - (p * Jv).sum(-1, keepdim=True))
        return torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, u, retain_graph=True)])

    return product


def measure(name: str, rounds: int = 9) -> dict[str, Any]:
    """Gradients: product and set-up of both; or a reason."""
    model, x, y = CASES[name].build()
    parameters = list(model.parameters())
    G = co.GGN(model, "classification", (x, y))
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    expected = warmed(G, v) @ v
    try:
        product = linearised(model, x)
        torch.testing.assert_close(product(v), expected, rtol=1e-3, atol=1e-4)
    except Exception as error:  # what it cannot do is a result too
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    times = interleaved(
        {
            "gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters),
            "ours": lambda: G @ v,
            "linearize": lambda: product(v),
        },
        rounds,
    )
    unit = times["gradient"].cpu
    first = sorted(once(lambda: co.GGN(model, "classification", (x, y)) @ v).cpu for _ in range(3))[1] / unit
    made = sorted(once(lambda: linearised(model, x)).cpu for _ in range(3))[1] / unit
    ours, theirs = times["ours"].cpu / unit, times["linearize"].cpu / unit
    return {"ours": ours, "linearize": theirs, "set-up": made, "our set-up": first - ours}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| in gradients | kept graph: set-up | product | linearize: set-up | product | pays after |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        if "reason" in row:
            lines.append(f"| {name} | | | {row['reason']} | | |")
            continue
        saved = row["ours"] - row["linearize"]
        after = f"{(row['set-up'] - row['our set-up']) / saved:.0f} products" if saved > 0 else "never"
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("our set-up", "ours", "set-up", "linearize"))
        lines.append(f"| {name} | {numbers} | {after} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(table({name: measure(name) for name in sys.argv[1:] or ["mlp", "cnn70k", "gpt"]}))
