"""Every law on every operator of the zoo, in both precisions."""

from __future__ import annotations

import pytest
import torch

from curvops.testing.laws import LAWS, check_operator
from curvops.testing.zoo import Case, zoo


@pytest.mark.parametrize("case", zoo(), ids=lambda case: case.name)
def test_every_law(case: Case, dtype: torch.dtype) -> None:
    operator, matrix = case.build(dtype)
    assert len(check_operator(operator, dense=matrix)) == len(LAWS)
