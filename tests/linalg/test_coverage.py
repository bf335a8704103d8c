"""Coverage, not luck: how often value ± half_width holds the exact number, over 200 seeds and six spectra.

`python -m pytest tests/linalg/test_coverage.py -m slow -s` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectra import matrix, quadratic_forms, spectra
from torch import Tensor

from curvops.linalg import quadrature
from curvops.linalg.lanczos import extend, lanczos
from curvops.linalg.probes import rademacher
from curvops.linalg.slq import slq_logdet
from curvops.linalg.traces import hutchinson_diagonal, hutchinson_trace
from curvops.linalg.xtrace import xdiag, xtrace

P, SEEDS = 200, 200
pytestmark = pytest.mark.slow


def logdet(M: Tensor, values: Tensor, seed: int, **given: Any) -> Any:
    return slq_logdet(lambda V: M @ V, P, lower_bound=float(values.min()), seed=seed, **given)[1]


ESTIMATES: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "logdet, default target": lambda M, v, s: logdet(M, v, s),
    "logdet, 10 x 20": lambda M, v, s: logdet(M, v, s, probes=10, steps=20),
    "logdet, 10 probes": lambda M, v, s: logdet(M, v, s, probes=10, rtol=1e-3),
    "trace, default target": lambda M, v, s: hutchinson_trace(lambda V: M @ V, P, seed=s)[1],
    "trace, 10 probes": lambda M, v, s: hutchinson_trace(lambda V: M @ V, P, probes=10, seed=s)[1],
    "trace, XTrace 10": lambda M, v, s: xtrace(lambda V: M @ V, P, probes=10, seed=s)[1],
    "trace, XTrace 40": lambda M, v, s: xtrace(lambda V: M @ V, P, probes=40, seed=s)[1],
    "diagonal, 20 probes": lambda M, v, s: hutchinson_diagonal(lambda V: M @ V, P, probes=20, seed=s)[1],
    "diagonal, XDiag 20": lambda M, v, s: xdiag(lambda V: M @ V, P, probes=20, seed=s)[1],
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_intervals_cover(name: str) -> None:
    row = {}
    for kind, values in spectra(P).items():
        M = matrix(values)
        exact = {
            "logdet": torch.linalg.slogdet(M)[1],
            "trace": M.trace(),
            "diagonal": M.diagonal(),
        }[name.split(",")[0]]
        hits = torch.zeros((), dtype=torch.float64)
        for seed in range(SEEDS):
            report = ESTIMATES[name](M, values, seed)
            error = (torch.as_tensor(report.value, dtype=torch.float64) - exact).abs()
            hits += (
                (error <= torch.as_tensor(report.half_width, dtype=torch.float64) + 1e-9 * exact.abs().max())
                .double()
                .mean()
            )
        row[kind] = float(hits)
    print(f"\n{name:24s} " + "  ".join(f"{kind} {hits:.0f}" for kind, hits in row.items()), end="", flush=True)
    assert min(row.values()) >= 180, row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", spectra(P))
def test_no_bracket_excludes_its_quadratic_form(kind: str, dtype: torch.dtype) -> None:
    M = matrix(spectra(P)[kind]).to(dtype)
    stored = M.double()
    floor = min(float(spectra(P)[kind].min()), float(torch.linalg.eigvalsh(stored)[0]))
    Z = rademacher(P, 0, SEEDS, seed=1, dtype=dtype, device="cpu")
    functions = [quadrature.log(), quadrature.inverse(), quadrature.shrinkage(0.1), quadrature.power(0.5)]
    exact = [quadratic_forms(stored, f, Z.double()) for f in functions]
    tri = lanczos(lambda V: M @ V, Z, 2)
    while True:
        r = quadrature.rules(tri, floor)
        for f, truth in zip(functions, exact, strict=True):
            low, high = quadrature.bracket(r, f)
            rounding = 1e-11 * truth.abs()
            assert bool((low <= truth + rounding).all()), (f.name, tri.steps, float((low - truth).max()))
            assert bool((truth <= high + rounding).all()), (f.name, tri.steps, float((truth - high).max()))
        if tri.steps >= 128 or bool(tri.exact.all()):
            break
        tri = extend(lambda V: M @ V, tri, tri.steps)
