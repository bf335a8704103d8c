"""Warm products under pytest-benchmark: `pytest tests/benchmarks --benchmark-only`; skipped in other runs."""

from __future__ import annotations

import pytest
import torch

import curvops as co
from tests.benchmarks import peers
from tests.benchmarks.measure import warmed
from tests.benchmarks.models import CASES

CURVATURES = {"ggn": co.GGN, "ef": co.EmpiricalFisher, "mc": co.MCFisher, "hessian": co.Hessian}


@pytest.mark.parametrize("case", ["digits", "mlp"])
@pytest.mark.parametrize("curvature", ["gradient", *CURVATURES])
def test_warm_product(benchmark, case, curvature):
    benchmark.group = case
    model, x, y = CASES[case].build()
    parameters = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
    if curvature == "gradient":
        benchmark(lambda: torch.autograd.grad(peers.summed_loss(model(x), y), parameters))
        return
    operator = CURVATURES[curvature](model, "classification", (x, y))
    warmed(operator, v)
    assert benchmark(lambda: operator @ v).isfinite().all()
