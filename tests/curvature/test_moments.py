"""Second moments summed in panels and mirrored, at widths around those of the panels."""

from __future__ import annotations

import pytest
import torch

from curvops.curvature.structured.moments import PANEL, SymmetricSum

WIDTHS = [5, *(k * PANEL for k in (1, 2, 3, 8, 16)), 2 * PANEL - 1, 2 * PANEL + 1, 5 * PANEL + 7, 8 * PANEL + 1]


@pytest.mark.parametrize("d", WIDTHS)
def test_sums_are_those_of_the_definition_and_go_on(d):
    X = torch.randn(1, d, 40, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    once, total = X @ X.transpose(1, 2), SymmetricSum()
    total.add(X)
    total.add(2 * X)
    torch.testing.assert_close(total.value(), 5 * once, rtol=0, atol=1e-12)
    total.add(X)
    torch.testing.assert_close(total.value(), 6 * once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", WIDTHS)
def test_stacks_sum_as_their_vectors(d):
    X = torch.randn(3, d, 7, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    total = SymmetricSum()
    total.add_stacked(X)
    total.add_stacked(X)
    torch.testing.assert_close(total.value()[0], 2 * (X @ X.transpose(1, 2)).sum(0), rtol=0, atol=1e-12)
