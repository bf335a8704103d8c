"""Exact evidence in function space, beside an estimate that knows nothing of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvops as co
from curvops.report.digits import digits


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.1, 1.0, 10.0])
def test_wide_network_on_digits_agrees_with_lanczos_quadrature(delta):
    (x, y), _ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10)).double()
    A = co.GGN(model, "classification", (x[:200], y[:200])).add_diagonal(delta)
    assert A.shape[0] > 50_000
    exact = A.logdet(co.FunctionSpace())
    _, estimate = A.logdet(co.SLQ(), return_report=True)
    assert abs(estimate.value - float(exact)) <= estimate.half_width
