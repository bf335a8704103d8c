"""Parameters behind a last layer that is linear in few features need no more columns than there are features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from curvops.curvature.matrixfree import layerpass
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective
from curvops.curvature.structured import EKFAC, KFAC, DiagonalGGN
from curvops.nets.likelihoods import Bernoulli, Categorical, Likelihood, Normal


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
    monkeypatch.setattr(layerpass, "_ROOT", float("inf"))
    assert columns(model, x, y) == [8 * T] * (4 + head)
    for (kind, join), matrix in zip(options, narrow, strict=True):
        wide = kind(model, "classification", (x, y), weight_and_bias=join).to_dense()
        torch.testing.assert_close(matrix, wide, rtol=1e-10, atol=1e-12)


class Mixed(nn.Module):
    """Adds to each position the mean of its sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def some_weight() -> Tensor:
    return torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.7, 3.0, 0.2, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("positions", [None, 4])
@pytest.mark.parametrize("confidence", [1.0, 60.0])
@pytest.mark.parametrize("likelihood", [
    Categorical(some_weight(), ignore_index=3, label_smoothing=0.1),
    Normal(0.4),
    Bernoulli(some_weight()),
    Likelihood.from_loss(lambda f, y: (f - y).cosh().log().sum(), is_convex=True),
], ids=lambda likelihood: likelihood.name)  # fmt: skip
def test_of_each_likelihood(likelihood, confidence, positions, monkeypatch):
    model, (x, y) = network(), data(positions)
    with torch.no_grad():
        model[4].weight.mul_(confidence)
    if isinstance(likelihood, Categorical):
        y[0] = 3
    else:
        y = torch.rand(*y.shape, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = [(KFAC, {"approx": "expand"}), (KFAC, {"approx": "reduce"}), (EKFAC, {})]

    def matrices() -> list[Tensor]:
        return [kind(model, likelihood, (x, y), **options).to_dense() for kind, options in options]

    narrow = matrices()
    monkeypatch.setattr(layerpass, "_ROOT", float("inf"))
    for one, other in zip(narrow, matrices(), strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()
        where = slice(16 * 8 + 8 + 8 * 2 + 2, None)  # the head, which sees none of the features' derivatives
        assert (one[where, where] - other[where, where]).norm() <= 1e-12 * other[where, where].norm()


class Twice(nn.Module):
    """Two features before nine classes; in sequences of three the head's weight is also used as such."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 2)
        self.head = nn.Linear(2, 9)

    def forward(self, x: Tensor) -> Tensor:
        f = self.head(self.two(self.one(x).tanh()))
        return f if x.shape[1] != 3 else f + self.head.weight.square().sum(1)


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_exact_everywhere_where_the_head_has_no_factors_in_one_batch(order):
    model = Twice().double()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(4, T, 16, generator=generator, dtype=torch.float64), torch.randint(9, (4, T), generator=generator))
        for T in order
    ]
    exact = sum(reference.ggn(model, reference.nll("classification"), *batch) for batch in batches)
    weight = KFAC(model, "classification", batches).blocks[4].to_dense()
    start = 16 * 8 + 8 + 8 * 2 + 2
    torch.testing.assert_close(weight, exact.diagonal()[start : start + 18].diag(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("kind", "options"), [(KFAC, {}), (KFAC, {"approx": "reduce"}), (EKFAC, {})])
def test_sketched_positions_keep_their_mean(kind, options):
    model, (x, y) = network(), data(4)
    model = nn.Sequential(*model[:2], Mixed(), *model[2:])

    def matrix(**tokens: Any) -> Tensor:
        return kind(model, "classification", (x, y), **options, **tokens).to_dense()

    exact = matrix(tokens="separate")
    draws = torch.stack([
        matrix(tokens="sketched", generator=torch.Generator().manual_seed(s)) for s in range(25)
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


class Entering(nn.Module):
    """A last layer whose parameters enter in part, rearranged, or broadcast."""

    def __init__(self, enter: Any, W: tuple[int, ...] = (9, 2), b: tuple[int, ...] = (9,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh())
        self.W, self.b, self.enter = nn.Parameter(torch.randn(W)), nn.Parameter(torch.randn(b)), enter

    def forward(self, x: Tensor) -> Tensor:
        return self.enter(self, self.body(x))


ENTERING = {
    "as it is": (lambda m, h: nn.functional.linear(h, m.W, m.b), {}),
    "rearranged": (lambda m, h: nn.functional.linear(h, m.W, m.b.T.reshape(9)), {"b": (3, 3)}),
    "turned": (lambda m, h: nn.functional.linear(h, m.W.flip(0), m.b.flip(0)), {}),
    "cut": (lambda m, h: nn.functional.linear(h, m.W[:9], m.b[:9]), {"W": (12, 2), "b": (11,)}),
    "one bias": (lambda m, h: torch.addmm(m.b, h, m.W.T), {"b": ()}),
}


@pytest.mark.parametrize("name", ENTERING)
@pytest.mark.parametrize("joint", ["separate", "joint"])
def test_a_last_layer_is_summed_only_where_it_is_whole(name, joint):
    enter, shapes = ENTERING[name]
    model, (x, y) = Entering(enter, **shapes).double(), data(None)
    J = reference.jacobian(model, x)
    L = Categorical().output_hessian_sqrt(model(x).detach(), y)
    rows = torch.einsum("bcp,bcr->brp", J, L).flatten(0, 1)
    K = KFAC(model, "classification", (x, y), fallback="full", weight_and_bias=joint)
    start = 0
    for block in K.blocks:
        stop = start + block.shape[0]
        expected = rows[:, start:stop].T @ rows[:, start:stop]
        if block.shape[0] in (model.b.numel(), 8, 2):  # biases: one position, so exact; one for all has no curvature
            assert (block.to_dense() - expected).norm() <= 1e-12 * max(float(expected.norm()), 1.0)
        start = stop
    assert start == rows.shape[1]


def test_a_likelihood_with_another_hessian_brings_its_roots_along():
    class Doubled(Categorical):
        def output_hessian_sqrt(self, f: Tensor, y: Tensor) -> Tensor:
            return 2 * super().output_hessian_sqrt(f, y)

    model, batch = network(), data(None)
    single, double = (KFAC(model, likelihood, batch).trace() for likelihood in (Categorical(), Doubled()))
    assert reference.relative_error(double, 4 * single) < 1e-12


def test_features_of_every_size_keep_their_digits(device):
    model, (x, y) = network(), data(None)
    for scale in (1e-8, 0.0):
        with torch.no_grad():
            model[4].weight[:, 1] = scale * model[4].weight[:, 0].flip(0)
        exact = DiagonalGGN(model, "classification", (x, y)).diagonal()
        single = copy.deepcopy(model).float().to(device)
        rounded = DiagonalGGN(single, "classification", (x.float().to(device), y.to(device))).diagonal()
        last = slice(16 * 8 + 8 + 8, 16 * 8 + 8 + 16)  # the second feature's weights
        wanted = exact[last]
        assert ((rounded[last].cpu().double() - wanted).abs() <= 1e-5 * wanted).all()
