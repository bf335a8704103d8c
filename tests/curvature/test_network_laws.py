"""Every law of operators holds for the matrix-free curvatures."""

from __future__ import annotations

import pytest
import torch
from untouched import untouched

from curvops.curvature.matrixfree.base import DataOperator
from curvops.testing import check_operator
from curvops.testing.networks import network_cases

FIRST = ("GGN", "MC Fisher", "Hessian, regression", "Gram", "Jacobian", "GGN + delta I")
"""The cases of every test run, in float64; the others and float32 run in slow ones."""

RUNS = [
    pytest.param(
        case,
        dtype,
        id=f"{case.name}, {str(dtype)[6:]}",
        marks=[] if case.name in FIRST and dtype == torch.float64 else [pytest.mark.slow],
    )
    for case in network_cases()
    for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_every_law_holds(case, dtype, device):
    A, dense = case.build(dtype, device)
    models = [operator.objective.model for operator in A._watched() if isinstance(operator, DataOperator)]
    assert models
    with untouched(models[0]):
        assert len(check_operator(A, dense=dense, user=models[0])) > 20
