"""What each verb is estimated to need beside what it takes: the model of `curvops.memory` against measured peaks.

`python -m tests.benchmarks.memory [CASE …]` prints a table; each case runs in a process of its own, in which blocks of
64 kB and more go back to the system when freed, so that the peak is that of what lives and not of what an allocator
keeps for later. The heap of smaller blocks, most of them the interpreter's, is left as it has grown: trimmed before a
measurement, 1.5 MB of it would come back and be taken for the verb's, whose tensors are as estimated (by PyTorch's own
record of allocations, 2.3 to 2.5 MB against 2.4 estimated for 16 columns of the dense case).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch

import curvops as co
from curvops.memory import Need
from curvops.operators.routes import diagonal, eigenpairs, logdet, solve, spectrum
from tests.benchmarks.measure import peak_above
from tests.benchmarks.models import CASES, mlp

_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_DELTA = 10.0

Verb = tuple[Callable[[], object], Callable[[], Need]]


def compare(name: str) -> dict[str, tuple[int, int]]:
    """Verb → `(estimated, measured)` bytes on one case; each verb starts with nothing kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = subprocess.run(
            [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.benchmarks.memory", "--one", name],
            capture_output=True, text=True, check=True, env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
    return {verb: tuple(pair) for verb, pair in json.loads(run.stdout.splitlines()[-1]).items()}


def verbs(name: str) -> dict[str, Verb]:
    """Every verb of one case, in numbers that do not depend on how it converges, with the estimate of its plan."""
    model, x, y = mlp((64, 56, 20, 10), 256) if name == "dense" else CASES[name].build()
    G, H = co.GGN(model, "classification", (x, y)), co.Hessian(model, "classification", (x, y))
    A, size = G.add_diagonal(_DELTA), G.shape[0]
    v, V = torch.randn(size), torch.randn(size, 16)
    few = co.CG(max_iters=3, on_failure="warn")
    slq, xdiag = co.SLQ(probes=10, steps=20), co.XDiag(probes=10)

    def released(work: Callable[[], object], *operators: co.LinearOperator) -> Callable[[], object]:
        work()  # libraries and kernels that the first use loads, and the sizes of graphs
        for operator in operators:
            operator.release()
        return work

    made: dict[str, Verb] = {
        "GGN @ v": (released(lambda: G @ v, G), lambda: G._product_need(1)),
        "GGN @ V (16)": (released(lambda: G @ V, G), lambda: G._product_need(16)),
        "Hessian @ v": (released(lambda: H @ v, H), lambda: H._product_need(1)),
    }
    if name == "dense":
        made["to_dense"] = (lambda: G.to_dense(), lambda: G._dense_need())
        made["logdet, Cholesky"] = (lambda: A.logdet(co.Cholesky()), logdet.plan(A, co.Cholesky()).need)
        return made
    made["solve"] = (lambda: A.solve(v, few), solve.plan(A, few).need)
    made["solve, 16 columns"] = (lambda: A.solve(V, few), solve.plan(A, few, 16).need)
    made["logdet, SLQ"] = (lambda: A.logdet(slq), logdet.plan(A, slq).need)
    made["spectrum"] = (
        lambda: A.spectrum(10, 20),
        spectrum.plan(A, 10, 20).need,
    )
    made["diagonal, XDiag"] = (lambda: A.diagonal(xdiag), diagonal.plan(A, xdiag).need)
    if name in ("mlp", "cnn70k"):
        made["eigsh"] = (lambda: G.eigsh(6, max_iters=1, on_failure="warn"), lambda: eigenpairs.need(G, 6, None))
    return made


def table(results: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Markdown: verbs by cases, "estimated / measured" in MB."""
    keys = list(dict.fromkeys(verb for result in results.values() for verb in result))
    lines = ["| MB, estimated / measured | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key in keys:
        pairs = (result.get(key) for result in results.values())
        entries = ("" if p is None else f"{p[0] / 1e6:.1f} / {p[1] / 1e6:.1f}" for p in pairs)
        lines.append(f"| {key} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _measure(name: str) -> dict[str, tuple[int, int]]:
    torch.set_num_threads(1)
    found = {}
    made = verbs(name)
    for verb, (work, need) in made.items():
        estimate = need().peak
        gc.collect()
        found[verb] = (estimate, peak_above(work))
        for operator in gc.get_objects():
            if isinstance(operator, co.GGN | co.Hessian):
                operator.release()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_measure(sys.argv[2])))
    else:
        print(table({name: compare(name) for name in sys.argv[1:] or ["mlp", "cnn70k", "resnet", "gpt", "dense"]}))
