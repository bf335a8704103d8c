"""Second moments summed in panels and mirrored, at widths around those of the panels."""

from __future__ import annotations

import pytest
import torch

from curvops.curvature.structured.moments import PANEL, STACKED, SymmetricSum, _add_outputs

WIDTHS = [5, *(k * PANEL for k in (1, 2, 3, 8, 16)), 2 * PANEL - 1, 2 * PANEL + 1, 5 * PANEL + 7, 8 * PANEL + 1]


@pytest.mark.parametrize("d", WIDTHS)
def test_sums_are_those_of_the_definition_and_go_on(d):
    X = torch.randn(1, d, 40, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    once, total = X @ X.transpose(1, 2), SymmetricSum()
    total.add(X[0].T)
    total.add(2 * X[0].T)
    torch.testing.assert_close(total.value(), 5 * once, rtol=0, atol=1e-12)
    total.add(X[0].T.contiguous())
    torch.testing.assert_close(total.value(), 6 * once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", WIDTHS)
def test_stacks_sum_as_their_vectors(d):
    X = torch.randn(3, d, 7, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    total = SymmetricSum()
    total.add_stacked(X)
    total.add_stacked(X)
    torch.testing.assert_close(total.value()[0], 2 * (X @ X.transpose(1, 2)).sum(0), rtol=0, atol=1e-12)


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
        torch.testing.assert_close(total.value(), expected, rtol=1e-13, atol=1e-11)
