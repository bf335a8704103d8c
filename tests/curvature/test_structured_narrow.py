"""Parameters behind a last layer that is linear in few features need no more columns than there are features."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn

from curvops.curvature.matrixfree import layerpass
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective
from curvops.curvature.structured import EKFAC, KFAC, DiagonalGGN


def network(**head: bool) -> nn.Module:
    """8 and 2 features before 9 classes."""
    torch.manual_seed(0)
    body = [nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(2, 9, **head)).double()


def data(positions: int | None) -> tuple[Tensor, Tensor]:
    """Three data, or three sequences."""
    generator = torch.Generator().manual_seed(1)
    shape = (3,) if positions is None else (3, positions)
    x = torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(9, shape, generator=generator)


class Scaled(nn.Module):
    """Logits that are not the last layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def columns(model: nn.Module, x: Tensor, y: Tensor) -> list[int]:
    """How many columns each parameter had in all."""
    passes = LayerPass(Objective(model, "classification", (x, y)), Cotangents(), narrow=True)
    found: list[int] = [0] * len(list(model.parameters()))
    with torch.no_grad():
        for step in passes:
            for i, factors in enumerate(step.factors):
                found[i] += 0 if factors is None else factors.columns
    return found


@pytest.mark.parametrize("positions", [None, 1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_same_curvature_by_fewer_columns(positions, bias, monkeypatch):
    model, (x, y) = network(bias=bias), data(positions)
    head = 1 + bias
    T = positions or 1
    assert columns(model, x, y) == [2 * T] * 4 + [8 * T] * head
    exact = reference.ggn(model, reference.nll("classification"), x, y)
    diagonal = DiagonalGGN(model, "classification", (x, y)).diagonal()
    torch.testing.assert_close(diagonal, exact.diagonal(), rtol=1e-12, atol=1e-13)
    options = [(kind, join) for kind in (KFAC, EKFAC) for join in ("separate", "joint")]
    narrow = [kind(model, "classification", (x, y), weight_and_bias=join).to_dense() for kind, join in options]
    monkeypatch.setattr(layerpass, "_DECOMPOSITION", float("inf"))
    assert columns(model, x, y) == [8 * T] * (4 + head)
    for (kind, join), matrix in zip(options, narrow, strict=True):
        wide = kind(model, "classification", (x, y), weight_and_bias=join).to_dense()
        torch.testing.assert_close(matrix, wide, rtol=1e-10, atol=1e-12)


class Mixed(nn.Module):
    """Adds to each position the mean of its sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def test_sketched_positions_keep_their_mean():
    model, (x, y) = network(), data(4)
    model = nn.Sequential(*model[:2], Mixed(), *model[2:])
    exact = KFAC(model, "classification", (x, y), tokens="separate").to_dense()
    draws = torch.stack([
        KFAC(model, "classification", (x, y), tokens="sketched", generator=torch.Generator().manual_seed(s)).to_dense()
        for s in range(25)
    ])  # fmt: skip
    spread = (draws - exact).flatten(1).norm(dim=1).square().mean().sqrt()
    assert spread > 0.01 * exact.norm()
    assert (draws.mean(0) - exact).norm() <= 4 * spread / 5


def test_only_a_linear_last_layer_used_once_is_one():
    x, y = data(None)
    scaled = Scaled()
    assert columns(scaled, x, y) == [8] * 6
    frozen = network()
    frozen[4].requires_grad_(False)
    assert columns(frozen, x, y)[:4] == [2] * 4
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False)).double()
    model[2].weight = model[0].weight  # type: ignore[assignment]
    assert columns(model, x, y) == [15]
