"""The dense GGN of a small network by every road, timed in turns; peaks of memory each in a process of its own.

`python -m tests.benchmarks.dense ROAD` prints the bytes by which one road raises the peak above what was held before.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import Work, in_subprocess, interleaved, peak_above
from tests.benchmarks.models import mlp

SIZE, DATA, CHUNK = 4990, 256, 256


def roads() -> dict[str, Work]:
    """Name → the P x P matrix, P = 4,990, N = 256, C = 10, float32."""
    model, x, y = mlp((64, 56, 20, 10), DATA)
    assert sum(p.numel() for p in model.parameters()) == SIZE
    made: dict[str, Work] = {"curvops": lambda: co.GGN(model, "classification", (x, y)).to_dense()}
    other = peers.products(model, x, y)
    if "curvlinops: GGN" in other:
        made["curvlinops"] = lambda: _columns(other["curvlinops: GGN"])
    made["per-example Jacobians"] = lambda: _jacobians(model, x)
    return made


def _columns(product: peers.Product) -> Tensor:
    """`op @ eye` in chunks of columns, in place of the whole."""
    dense = torch.empty(SIZE, SIZE)
    for start in range(0, SIZE, CHUNK):
        stop = min(start + CHUNK, SIZE)
        unit = torch.zeros(SIZE, stop - start)
        unit[torch.arange(start, stop), torch.arange(stop - start)] = 1.0
        dense[:, start:stop] = product(unit)
    return dense


def _jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """`Σ Jᵀ Λ J` from `vmap(jacrev)`."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one.unsqueeze(0),)).squeeze(0)

    rows = vmap(jacrev(outputs), (None, 0))(values, x)
    J = torch.cat([t.flatten(2) for t in rows.values()], 2)
    p = model(x).detach().softmax(-1)
    weighted = p.unsqueeze(-1) * (J - (p.unsqueeze(-1) * J).sum(1, keepdim=True))
    return J.flatten(0, 1).T @ weighted.flatten(0, 1)


def measure(rounds: int) -> dict[str, Any]:
    """Seconds and MB above the base for each road, after checking that all give one matrix."""
    made = roads()
    reference = made["per-example Jacobians"]()
    for name, work in made.items():
        torch.testing.assert_close(work(), reference, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    times = interleaved(made, rounds)
    return {
        name: {
            "cpu_seconds": timing.cpu,
            "wall_seconds": timing.wall,
            "megabytes": in_subprocess("tests.benchmarks.dense", name) / 1e6,  # type: ignore[operator]
        }
        for name, timing in times.items()
    }


def _peak(road: str) -> int:
    torch.set_num_threads(1)
    work = roads()[road]
    # Libraries that the first use loads are no part of the road: warm up on another, tiny network.
    small, x, y = mlp((4, 3, 2), 8)
    co.GGN(small, "classification", (x, y)).to_dense()
    for product in peers.products(small, x, y).values():
        product(torch.ones(sum(p.numel() for p in small.parameters())))
    return peak_above(work)


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1])))
