"""Structured curvatures: this library's and its peers', as multiples of one gradient of the summed loss, first call
included; and by how much each raises the peak of memory, in a process of its own.

    python -m tests.benchmarks.structured [cases] [--threads 1] [--rounds 7]
    python -m tests.benchmarks.structured CASE WORK        prints the bytes of one piece of work

All sum over the same batch, with weights and biases apart. What a peer does differently is said in `NOTES`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import curvops as co
from curvops.curvature.structured import secondmoment
from tests.benchmarks import peers
from tests.benchmarks.measure import Work, beside, flops, in_subprocess, interleaved, once, peak_above
from tests.benchmarks.models import CASES, Case, gpt, mlp

STRUCTURED = {
    **{name: CASES[name] for name in ("mlp", "cnn70k")},
    "gpt1500k": Case(
        "gpt1500k", "GPT, 1.46M parameters, 256 classes, 8 x 64 tokens", lambda: gpt(7, 128, 256), positions=True
    ),
}
"""The GPT's exact curvatures tell its positions apart by random signs, as curvlinops' type-2 does not: see `NOTES`."""

NOTES = {
    "curvlinops: KFAC exact": "type-2: one backward per class and no signs, so that positions of a sequence interfere",
    "BackPACK: KFAC exact": "KFLR; of convolutions its B is inflated by the number of positions",
    "ASDL: KFAC exact": "weight and bias joint, A with a 1 for the bias",
    "torch.func: diagonal": "every example's Jacobian rows, B x C x P entries",
}

SECONDS = 5.0
"""What takes longer in its first run is timed a few times only, beside gradients of its own."""


def works(case: Case, device: str = "cpu") -> dict[str, Work]:
    """Name → one piece of work from building to the last number."""
    model, x, y = case.on(device)
    data, parameters = (x, y), list(model.parameters())
    made: dict[str, Work] = {"gradient": lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters)}
    if not case.positions:
        made["diagonal, exact"] = lambda: co.DiagonalGGN(model, "classification", data).diagonal()
    for name in ("exact", "mc", "empirical"):
        made[f"KFAC, {name}"] = lambda name=name: co.KFAC(
            model, "classification", data, fisher=name
        ).source.statistics()
    if not case.positions:
        for name in ("exact", "mc"):
            made[f"KFAC, {name}, multiplied out"] = multiplied_out(made[f"KFAC, {name}"])
        logdet = made["KFAC, mc, log-determinant"] = lambda: (
            co.KFAC(model, "classification", data, fisher="mc").add_diagonal(1.0).logdet()
        )
        made["KFAC, mc, log-determinant, multiplied out"] = multiplied_out(logdet)
    made["EKFAC, exact" if not case.positions else "EKFAC, mc"] = lambda: co.EKFAC(
        model, "classification", data, fisher="mc" if case.positions else "exact"
    ).trace()
    made.update(_peers(model, x, y, case.positions))
    return made


def multiplied_out(work: Work) -> Work:
    """The same with every factor a matrix, as the peers have them; those of few vectors are kept as these otherwise."""

    def run() -> object:
        with mock.patch.object(secondmoment, "FEW", 0.0):
            return work()

    return run


def _peers(model: nn.Module, x: Tensor, y: Tensor, positions: bool) -> dict[str, Work]:
    made: dict[str, Work] = {}
    extended, hooked = backpacked(model), copy.deepcopy(model)  # both leave things on a model
    if extended is not None:
        for name, extension in (("diagonal", "DiagGGNExact"), ("KFAC exact", "KFLR"), ("KFAC mc", "KFAC")):
            made[f"BackPACK: {name}"] = lambda extension=extension: _backpack(extended, x, y, extension)
    if importlib.util.find_spec("asdl"):
        for name, fisher, shape in (
            ("diagonal", "exact", "diag"),
            ("KFAC exact", "exact", "kron"),
            ("KFAC mc", "mc", "kron"),
        ):
            made[f"ASDL: {name}"] = lambda fisher=fisher, shape=shape: _asdl(hooked, x, y, fisher, shape)
    if importlib.util.find_spec("curvlinops"):
        for name, fisher in (("exact", "type-2"), ("mc", "mc"), ("empirical", "empirical")):
            made[f"curvlinops: KFAC {name}"] = lambda fisher=fisher: _curvlinops(model, x, y, fisher)
    if not positions:
        made["torch.func: diagonal"] = lambda: _jacobians(model, x)
    return made


def backpacked(model: nn.Module) -> nn.Module | None:
    """A copy of the model as BackPACK takes it; None without BackPACK."""
    if not importlib.util.find_spec("backpack"):
        return None
    import backpack

    return backpack.extend(copy.deepcopy(model))


def _backpack(model: nn.Module, x: Tensor, y: Tensor, extension: str) -> None:
    import backpack
    from backpack import extensions

    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    attribute = {"DiagGGNExact": "diag_ggn_exact", "KFLR": "kflr", "KFAC": "kfac"}[extension]
    with backpack.backpack(getattr(extensions, extension)()):
        f = model(x)
        loss(f.reshape(-1, f.shape[-1]), y.reshape(-1)).backward()
    for name, p in model.named_parameters():
        if not hasattr(p, attribute):
            raise RuntimeError(f"{name} has no {attribute}")
        delattr(p, attribute)
        p.grad = None


def _asdl(model: nn.Module, x: Tensor, y: Tensor, fisher: str, shape: str) -> None:
    from asdl.fisher import FisherConfig, get_fisher_maker

    config = FisherConfig(f"fisher_{fisher}", [shape], loss_type="cross_entropy", data_size=1)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, x)
    maker.forward_and_backward()
    if not any(hasattr(module, "fisher") for module in model.modules()):
        raise RuntimeError("no module has a Fisher")
    maker.zero_fisher()


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, fisher: str) -> None:
    import curvlinops

    operator = curvlinops.KFACLinearOperator(
        peers.Flat(model), nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), [(x, y.reshape(-1))],
        fisher_type=fisher, mc_samples=1, separate_weight_and_bias=True, check_deterministic=False,
        num_data=x.shape[0], **({"num_per_example_loss_terms": y[0].numel()} if y.dim() > 1 else {}),
    )  # fmt: skip
    operator.compute_kronecker_factors()


def _jacobians(model: nn.Module, x: Tensor) -> None:
    from torch.func import functional_call, jacrev, vmap

    values = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one.unsqueeze(0),)).squeeze(0)

    rows = vmap(jacrev(outputs), (None, 0))(values, x)
    p = model(x).detach().softmax(-1)
    for J in rows.values():  # diag Jᵀ(diag p − ppᵀ)J
        J = J.flatten(2)
        torch.einsum("bc,bcp->p", p, J.square()) - torch.einsum("bc,bcp->bp", p, J).square().sum(0)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One case: gradients (CPU time, wall time, FLOPs) and megabytes of each piece of work, and what did not run."""
    case = STRUCTURED[name]
    made = works(case)
    failed: dict[str, str] = {}
    slow: dict[str, Work] = {}
    for key in list(made):
        try:
            first = once(made[key])
        except Exception as error:  # a peer that cannot take the model is a result too
            if ":" not in key:
                raise
            failed[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            del made[key]
            continue
        if first.cpu > SECONDS:
            slow[key] = made.pop(key)
    shared = interleaved(made, rounds)
    times = {key: (timing, shared["gradient"]) for key, timing in shared.items()}
    times |= {key: beside(work, made["gradient"]) for key, work in slow.items()}
    unit_flops = flops(made["gradient"])
    rows = {}
    for key, (timing, unit) in times.items():
        count = flops(made[key] if key in made else slow[key])
        rows[key] = {
            "cpu_seconds": timing.cpu,
            "cpu": timing.cpu / unit.cpu,
            "wall": timing.wall / unit.wall,
            "flops": None if count is None or unit_flops is None else count / unit_flops,
            "megabytes": in_subprocess("tests.benchmarks.structured", name, key) / 1e6,  # type: ignore[operator]
        }
    return {"title": case.title, "rows": rows, "failed": failed}


def table(results: dict[str, Any]) -> str:
    """Rows of work, columns of models; each entry "CPU time (FLOPs), peak" in gradients and MB."""
    names = list(results)
    keys = list(dict.fromkeys(key for result in results.values() for key in [*result["rows"], *result["failed"]]))
    lines = [
        "| in gradients: CPU time (FLOPs), peak | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for key in keys:
        entries = []
        for name in names:
            row = results[name]["rows"].get(key)
            if row is None:
                entries.append("fails" if key in results[name]["failed"] else "")
                continue
            count = "" if row["flops"] is None else f" ({row['flops']:.2f})"
            entries.append(f"{row['cpu']:.2f}{count}, {row['megabytes']:.0f} MB")
        lines.append(f"| {key} | " + " | ".join(entries) + " |")
    seconds = (f"{results[name]['rows']['gradient']['cpu_seconds'] * 1e3:.2f} ms" for name in names)
    notes = [f"\n{key}: {note}." for key, note in NOTES.items() if key in keys]
    return "\n".join([*lines, "| one gradient | " + " | ".join(seconds) + " |", *notes])


def _peak(name: str, key: str) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Libraries that the first use loads are no part of the work: warm up on another, tiny network.
    small = works(Case("tiny", "", lambda: mlp((4, 3, 2), 8)))
    if key in small:
        small[key]()
    work: Callable[[], object] = works(STRUCTURED[name])[key]
    gc.collect()
    return peak_above(work)


def main() -> None:
    """Run the chosen cases, or report one peak."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.structured", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(STRUCTURED)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if len(options.cases) == 2 and options.cases[1] not in STRUCTURED:
        print(json.dumps(_peak(*options.cases)))
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peers' own
    results = {name: measure(name, options.rounds) for name in options.cases or STRUCTURED}
    print(table(results))
    for name, result in results.items():
        for key, why in result["failed"].items():
            print(f"{name}, {key}: {why}")


if __name__ == "__main__":
    main()
