"""Evidence at 41 prior precisions, P = 4,990 on the digits: one `Spectrum` beside 41 dense log-determinants.

`python -m tests.benchmarks.prior_precision` prints seconds of CPU time of both from the trained network to the last
number, and how far the two curves are apart beside the half-widths that ours claims. The other road is laplace-torch's
`FullLaplace`, fitted once and asked at every δ; `--asked 5` asks at 5 of the 41 and multiplies the time of asking.
Needs laplace-torch.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvops as co
from curvops.report.digits import digits, network, train
from tests.benchmarks.measure import once

WIDTHS = (64, 56, 20, 10)
DELTAS = torch.logspace(-2, 2, 41, dtype=torch.float64)
PROBES, STEPS = 10, 200


def spectrum_curve(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence at every δ, and its half-widths."""
    mean = nn.utils.parameters_to_vector(model.parameters()).detach()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    spectrum = co.GGN(model, "classification", (x, y)).spectrum(probes=PROBES, steps=STEPS)
    report = spectrum.evidence_curve(loss, mean, DELTAS)
    return torch.as_tensor(report.value), torch.as_tensor(report.half_width)


def fitted(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """laplace-torch's approximation."""
    from laplace import FullLaplace

    la = FullLaplace(model, "classification")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return la


def dense_curve(la: Any, deltas: Tensor) -> Tensor:
    """Its log evidence at each δ: a dense log-determinant each."""
    values = [la.log_marginal_likelihood(prior_precision=d.to(la.mean.dtype)).detach() for d in deltas]
    return torch.stack(values).double()


def measure(dtype: torch.dtype, asked: int) -> dict[str, Any]:
    """Seconds of both, their ratio, and how far the curves are apart, nats."""
    some = torch.linspace(0, len(DELTAS) - 1, asked).round().long()
    (x, y), _ = digits()
    model = network(sizes=WIDTHS)
    train(model, "classification", (x, y), rtol=1e-3)
    model, x = model.to(dtype), x.to(dtype)
    small = network(sizes=(64, 3, 10)).to(dtype)
    spectrum_curve(small, x, y)  # libraries and kernels that the first use loads
    dense_curve(fitted(small, x, y), DELTAS[:1])
    answers: dict[str, Any] = {}

    def ours() -> None:
        answers["value"], answers["half_width"] = spectrum_curve(model, x, y)

    def fit() -> None:
        answers["fitted"] = fitted(model, x, y)

    def ask() -> None:
        answers["dense"] = dense_curve(answers["fitted"], DELTAS[some])

    fast, fitting, asking = once(ours).cpu, once(fit).cpu, once(ask).cpu * len(DELTAS) / asked
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "curvops": fast,
        "laplace-torch": {"fit": fitting, "41 log-determinants": asking, "of which measured": asked},
        "ratio": fast / (fitting + asking),
        "δ": DELTAS[some].tolist(),
        "log evidence": answers["dense"].tolist(),
        "difference": (answers["value"][some] - answers["dense"]).tolist(),
        "half-width": answers["half_width"][some].tolist(),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.prior_precision", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--asked", type=int, default=len(DELTAS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peer's own
    print(json.dumps(measure(getattr(torch, options.dtype), options.asked), indent=1))


if __name__ == "__main__":
    main()
