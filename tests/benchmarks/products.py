"""Products: this library's and its peers', as multiples of one gradient of the summed loss."""

from __future__ import annotations

from typing import Any

import torch

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import Work, flops, interleaved, once, warmed
from tests.benchmarks.models import CASES, Case

COLUMNS = 16


def works(case: Case, device: str = "cpu") -> tuple[dict[str, Work], dict[str, int]]:
    """Name → one piece of work, and the number of columns where it is not one."""
    model, x, y = case.on(device)
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    generator = torch.Generator().manual_seed(0)
    v, V = (torch.randn(*shape, generator=generator).to(device) for shape in ((size,), (size, COLUMNS)))
    operators = {
        "GGN": co.GGN(model, "classification", (x, y)),
        "MC Fisher": co.MCFisher(model, "classification", (x, y)),
        "EF": co.EmpiricalFisher(model, "classification", (x, y)),
        "Hessian": co.Hessian(model, "classification", (x, y)),
        "GGN, no cache": co.GGN(model, "classification", (x, y), cache=False),
    }
    made: dict[str, Work] = {"gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters)}
    for name, operator in operators.items():
        warmed(operator, v)
        made[name] = lambda operator=operator: operator @ v
    made["GGN, build"] = lambda: co.GGN(model, "classification", (x, y))
    made["GGN, build and first product"] = lambda: co.GGN(model, "classification", (x, y)) @ v
    made[f"GGN, {COLUMNS} columns"] = lambda: operators["GGN"] @ V
    columns = {f"GGN, {COLUMNS} columns": COLUMNS}
    for name, product in peers.products(model, x, y).items():
        made[name] = lambda product=product: product(v)
        if name in ("curvlinops: GGN",):
            made[f"{name}, {COLUMNS} columns"] = lambda product=product: product(V)
            columns[f"{name}, {COLUMNS} columns"] = COLUMNS
    return made, columns


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One case: seconds, multiples of a gradient (CPU time, wall time, FLOPs) per column, and what did not run."""
    case = CASES[name]
    made, columns = works(case)
    failed: dict[str, str] = {}
    for key in list(made):
        try:
            once(made[key])
        except Exception as error:  # A peer that cannot take the model is a result too.
            if ":" not in key:
                raise
            failed[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            del made[key]
    times = interleaved(made, rounds)
    unit, unit_flops = times["gradient"], flops(made["gradient"])
    rows = {}
    for key, timing in times.items():
        per = columns.get(key, 1)
        count = flops(made[key])
        rows[key] = {
            "cpu_seconds": timing.cpu / per,
            "cpu": timing.cpu / unit.cpu / per,
            "wall": timing.wall / unit.wall / per,
            "flops": None if count is None or unit_flops is None else count / unit_flops / per,
        }
    return {"title": case.title, "rows": rows, "failed": failed}
