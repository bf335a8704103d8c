"""The engines of a GGN product: a kept graph, the same on tape, and the one that was not taken, `torch.func.linearize`
with a kept graph for the adjoint.

`python -m tests.benchmarks.linearised [CASE …]` prints one warm product of each in gradients (CPU time), what it takes
to get there beyond that, and after how many products linearize's set-up would be paid for; or why it does not run. The
tape's set-up is that of the first two dozen products.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, linearize
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvops as co
from curvops.nets import tape
from tests.benchmarks import peers
from tests.benchmarks.measure import WARM, Work, interleaved, once, warmed
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "_BEFORE", sys.maxsize)
        plain = warmed(co.GGN(model, "classification", (x, y)), v)
    (piece,) = (kept.piece for kept in plain._linearised.values())
    piece.linearisation._replayed[1]._refused = True
    times = interleaved(
        {
            "graph": lambda: plain @ v,
            "gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters),
            "tape": lambda: G @ v,
            "linearize": lambda: product(v),
        },
        rounds,
    )
    unit = times["gradient"].cpu

    def build() -> co.GGN:
        return co.GGN(model, "classification", (x, y))

    found = {key: times[key].cpu / unit for key in ("graph", "tape", "linearize")}
    starts = {
        "graph": _median(lambda: build() @ v) / unit - found["graph"],
        "tape": _median(lambda: warmed(build(), v)) / unit - WARM * found["tape"],
        "linearize": _median(lambda: linearised(model, x)) / unit,
    }
    return {"product": found, "set-up": starts}


def _median(work: Work) -> float:
    return sorted(once(work).cpu for _ in range(5))[2]


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| in gradients | kept graph: set-up | product | on tape: set-up | product | linearize: set-up | product | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in results.items():
        if "reason" in row:
            lines.append(f"| {name} | | | | | {row['reason']} | | |")
            continue
        product, start = row["product"], row["set-up"]
        saved = product["tape"] - product["linearize"]
        after = f"after {(start['linearize'] - start['tape']) / saved:.0f} products" if saved > 0 else "never"
        numbers = " | ".join(f"{start[key]:.2f} | {product[key]:.2f}" for key in product)
        lines.append(f"| {name} | {numbers} | {after} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(table({name: measure(name) for name in sys.argv[1:] or ["mlp", "cnn70k", "gpt"]}))
