"""What KFAC's moments are made of, in every layout."""

from __future__ import annotations

import pytest
import torch

from curvops.curvature.structured.moments import STACKED, _add_outputs
from curvops.curvature.structured.secondmoment import PANEL, SymmetricSum, matrix_of


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("O", [3, STACKED, STACKED + 5, 2 * PANEL + 5])
def test_outputs_in_any_layout(O, together, device):
    g = torch.randn(4, 3, 70, 1, O, generator=torch.Generator().manual_seed(O), dtype=torch.float64).to(device)
    vectors = g.sum(2, keepdim=True) if together else g
    expected = torch.einsum("kbtgi,kbtgj->gij", vectors, vectors)
    columns_last = g.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3)
    positions_last = g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for laid_out in (g, columns_last, positions_last):
        total = SymmetricSum()
        _add_outputs(total, laid_out, together)
        torch.testing.assert_close(matrix_of(total.value()), expected, rtol=1e-13, atol=1e-11)
