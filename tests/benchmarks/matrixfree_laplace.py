"""`python -m tests.benchmarks.matrixfree_laplace`: laplace-torch's full approximation of 10⁶ parameters, by operators.

A 64-1000-1000-10 tanh network (P = 1,076,010) in float32 on 1,257 of scikit-learn's digits: fit, evidence, prior
precision by marginal likelihood, 20 samples and predictives of 360 test digits, each with its time, and the peak of the
process above what it held before. Needs laplace-torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvops.interop.laplace  # noqa: F401  (makes "matrix_free" known to laplace-torch)
from curvops.memory import readable
from curvops.report.digits import digits

TEST = 360


def trained(hidden: int, epochs: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The network at about its mode for δ = 1, with training and test data, float32."""
    (x, y), (x_test, y_test) = digits(0)
    x, x_test = x.float(), x_test.float()
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() == 2 else 0.0
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - epoch / epochs)
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            prior = 0.5 * sum(p.square().sum() for p in model.parameters()) / len(x)
            (nn.functional.cross_entropy(model(x[rows]), y[rows]) + prior).backward()
            optimizer.step()
    return model, (x, y), (x_test[:TEST], y_test[:TEST])


class Ledger:
    """Runs stages, and writes down what each took."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, work: Callable[[], Any], note: Callable[[Any], str] = lambda answer: "") -> Any:
        """The work's answer; its seconds and peak bytes above what was held before are kept."""
        held = _reset_peak()
        clock, cpu = time.perf_counter(), time.process_time()
        answer = work()
        wall, cpu = time.perf_counter() - clock, time.process_time() - cpu
        self.rows[name] = {"wall": wall, "cpu": cpu, "peak": _status("VmHWM") - held, "note": note(answer)}
        print(
            f"{name:<44} {wall:8.1f} s {cpu:8.1f} s CPU {readable(self.rows[name]['peak']):>9}  {note(answer)}",
            flush=True,
        )
        return answer


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_peak() -> int:
    """Start the peak anew; bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def measure(hidden: int, epochs: int, dtype: torch.dtype, samples: int) -> dict[str, Any]:
    """All stages."""
    run = Ledger()
    model, training, (x_test, y_test) = run("train", lambda: trained(hidden, epochs))
    P = sum(p.numel() for p in model.parameters())
    dense = P * P * torch.float32.itemsize
    print(f"P = {P:,}: one matrix of FullLaplace in float32 takes {readable(dense)}, curvature in {dtype}")
    loader = DataLoader(TensorDataset(*training), batch_size=256)
    la: Any = Laplace(model, "classification", "all", "matrix_free", dtype=dtype, generator=_seeded())

    def evidence(delta: float | None = None) -> Tensor:
        if delta is not None:
            la.prior_precision = delta
        return la.log_marginal_likelihood()

    def certified(name: str) -> str:
        report = la.reports[name]
        return f"{report.value:.6g} ± {report.half_width:.2g}, {report.algorithm}"

    run("fit", lambda: la.fit(loader))
    run("evidence at δ = 1", evidence, lambda _: certified("log_marginal_likelihood"))
    run("evidence at δ = 10", lambda: evidence(10.0), lambda _: certified("log_marginal_likelihood"))
    run("optimize_prior_precision", la.optimize_prior_precision, lambda _: certified("optimize_prior_precision"))
    run("evidence at the optimum", evidence, lambda _: certified("log_marginal_likelihood"))
    run(f"{samples} samples", lambda: la.sample(samples), lambda _: la.reports["sample"].algorithm)

    def quality(p: Tensor) -> str:
        nll = nn.functional.nll_loss(p.log(), y_test)
        return f"accuracy {float((p.argmax(-1) == y_test).float().mean()):.3f}, NLL {float(nll):.4f}"

    with torch.no_grad():
        print("at the mode:", quality(model(x_test).softmax(-1)))
    run(f"glm predictive of {TEST}, probit", lambda: la(x_test, link_approx="probit"), quality)
    run(
        f"nn predictive of {TEST}, {samples} samples",
        lambda: la(x_test, pred_type="nn", link_approx="mc", n_samples=samples),
        quality,
    )
    return {"parameters": P, "full_laplace_bytes": dense, "dtype": str(dtype), "stages": run.rows}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.matrixfree_laplace", description=__doc__)
    parser.add_argument("--hidden", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.hidden, options.epochs, getattr(torch, options.dtype), options.samples)
    if options.output:
        options.output.write_text(json.dumps({"threads": options.threads, **result}, indent=1))


if __name__ == "__main__":
    main()
