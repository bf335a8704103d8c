"""P against time and memory: log-determinant, one solve and ten samples of GGN + I, by every library that can.

`python -m tests.benchmarks.scaling [LIBRARY …]` prints a table of seconds of CPU time, from a network and data to the
answer, and of MB by which that raises the peak. N = 500 data, C = 10, float32, untrained networks on Gaussian inputs,
every library at its defaults (curvlinops, which has no solver, under SciPy's CG to our tolerance; linear_operator on
the dense matrix that our `to_dense` makes, as it has no curvatures). Every cell is a process of its own with a limit of
CPU time. What a library cannot do is said instead of a number; laplace-torch has to be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import peak_above
from tests.benchmarks.models import mlp

WIDTHS = {10**3: (64, 13, 10), 10**4: (64, 114, 22, 10), 10**5: (64, 344, 216, 10), 10**6: (64, 960, 960, 10)}
DATA, DELTA, DRAWS, SECONDS = 500, 1.0, 10, 60
CG_RTOL = 1e-4
"""curvops' default in float32."""
VERBS = ("logdet", "solve", "sample")
LIBRARIES = ("curvops", "laplace-torch", "linear_operator", "curvlinops")
DENSE_UP_TO = 20_000
"""Past this a dense P x P matrix and its factor take more than 3 GB."""


def refusal(library: str, verb: str, size: int) -> str | None:
    """Why a library has no number here; None where it is tried."""
    if library == "laplace-torch" and not importlib.util.find_spec("laplace"):
        return "not installed"
    if library in ("laplace-torch", "linear_operator") and size > DENSE_UP_TO:
        return f"dense: {4e-9 * size**2:,.1f} GB"
    if library == "curvlinops" and verb != "solve":
        return "no such verb"
    return None


def works(library: str, size: int) -> dict[str, Callable[[], object]]:
    """Verb → the work, from a network and data to the answer."""
    model, x, y = mlp(WIDTHS[size], DATA)
    P = sum(p.numel() for p in model.parameters())
    b = torch.ones(P)
    if library == "curvops":
        A = co.GGN(model, "classification", (x, y)).add_diagonal(DELTA)
        posterior = co.Gaussian(torch.zeros(P), A, torch.Generator().manual_seed(0))
        return {"logdet": A.logdet, "solve": lambda: A.solve(b), "sample": lambda: posterior.sample(DRAWS)}
    if library == "laplace-torch":
        return _laplace(model, x, y, b)
    if library == "linear_operator":
        return _linear_operator(model, x, y, b)
    return _curvlinops(model, x, y, b)


def _laplace(model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    import laplace
    from torch.utils.data import DataLoader, TensorDataset

    def fitted() -> Any:
        la = laplace.FullLaplace(model, "classification", prior_precision=DELTA)
        la.fit(DataLoader(TensorDataset(x, y), batch_size=DATA))
        return la

    return {
        "logdet": lambda: fitted().log_det_posterior_precision,
        "solve": lambda: fitted().posterior_covariance @ b,
        "sample": lambda: fitted().sample(DRAWS),
    }


def _linear_operator(model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    """Its defaults, on a dense matrix that it needs to be given (made here: it has no curvatures)."""
    from linear_operator.operators import DenseLinearOperator

    def damped() -> Any:
        dense = co.GGN(model, "classification", (x, y)).to_dense()
        dense.diagonal().add_(DELTA)
        return DenseLinearOperator(dense)

    return {
        "logdet": lambda: damped().logdet(),
        "solve": lambda: damped().solve(b[:, None]),
        "sample": lambda: damped().zero_mean_mvn_samples(DRAWS),
    }


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    """Its GGN product under SciPy's CG, to the same residual as ours."""
    from scipy.sparse.linalg import LinearOperator, cg

    def solve() -> object:
        product = peers.products(model, x, y)["curvlinops: GGN"]
        size = len(b)

        def damped(v: Any) -> Any:
            t = torch.from_numpy(v).float().reshape(-1)
            return (product(t) + DELTA * t).numpy()

        return cg(LinearOperator((size, size), damped, dtype="float32"), b.numpy(), rtol=CG_RTOL)

    return {"solve": solve}


def measure(libraries: list[str], sizes: list[int], seconds: int) -> dict[str, Any]:
    """Library → P → verb → seconds and MB, or a reason."""
    found: dict[str, Any] = {}
    for library in libraries:
        for size in sizes:
            for verb in VERBS:
                why = refusal(library, verb, size)
                cell = {"reason": why} if why else _cell(library, size, verb, seconds)
                found.setdefault(library, {}).setdefault(str(size), {})[verb] = cell
                sys.stderr.write(f"{library}, P ≈ {size:,}, {verb}: {cell}\n")
    return found


def _cell(library: str, size: int, verb: str, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--one", library, str(size), verb, str(seconds)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == -signal.SIGXCPU:
        return {"reason": f"over {seconds} s"}
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return {"reason": lines[-1][:80] if lines else f"exit {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
    """Markdown: rows of verb and library, columns of P; "seconds (MB)"."""
    sizes = list(next(iter(found.values())))
    lines = ["| s (MB) | " + " | ".join(f"P ≈ {int(size):,}" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for verb in VERBS:
        for library, row in found.items():
            cells = [row[size][verb] for size in sizes]
            entries = (c.get("reason") or f"{c['seconds']:.2f} ({c['megabytes']:.0f})" for c in cells)
            lines.append(f"| {verb}, {library} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _one(library: str, size: int, verb: str, seconds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    works(library, min(WIDTHS))[verb]()  # libraries and kernels that the first use loads
    work = works(library, size)[verb]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, resource.RLIM_INFINITY))
    spent: list[float] = []

    def timed() -> None:
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)

    peak = peak_above(timed)
    return {"seconds": spent[0], "megabytes": peak / 1e6}


def main() -> None:
    """Run the chosen cells, or one."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(LIBRARIES)}; all by default")
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--seconds", type=int, default=SECONDS, help="CPU time that a cell may take")
    parser.add_argument("--one", nargs=4, metavar=("LIBRARY", "P", "VERB", "SECONDS"), help="one cell, as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    if options.one:
        library, size, verb, seconds = options.one
        print(json.dumps(_one(library, int(size), verb, int(seconds))))
        return
    print(table(measure(options.libraries or list(LIBRARIES), options.sizes, options.seconds)))


if __name__ == "__main__":
    main()
