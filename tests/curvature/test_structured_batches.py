"""Structured curvatures of batches that the forward treats differently: nothing left out, nothing counted twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

from curvops.curvature.matrixfree import GGN, Gram
from curvops.curvature.structured import EKFAC, KFAC, BlockGGN, BlockHessian, DiagonalGGN
from curvops.errors import CurvopsError, ShapeError
from curvops.testing.problems import problem

NLL = reference.nll("classification")


def check(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert reference.relative_error(got, expected) < tolerance


def drawn(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model.double()


class Pooled(nn.Module):
    """Sequences of any length, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).mean(1))


class UntilDone(nn.Module):
    """A cell called as often as the batch's longest example needs; finished examples keep their state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, steps = x[:, :3], x[:, 3].round()
        for t in range(int(steps.max())):
            h = torch.where((t < steps)[:, None], torch.tanh(self.cell(h)), h)
        return self.head(h)


class Branching(nn.Module):
    """A weight that is a factor of a product in most batches, and something that no rule knows in others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.zeros(3, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 3:  # a batch of another kind
            return self.head(x[:, :3] @ torch.exp(self.weight))
        return self.head(torch.tanh(x @ self.weight))


def sequences(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, T, 4, generator=g, dtype=torch.float64), torch.randint(2, (3,), generator=g)) for T in lengths
    ]


def stepped(*steps: list[int]) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    batches = []
    for each in steps:
        x = torch.randn(len(each), 4, generator=g, dtype=torch.float64)
        x[:, 3] = torch.tensor(each)
        batches.append((x, torch.randint(2, (len(each),), generator=g)))
    return batches


def widths(*each: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(4, n, generator=g, dtype=torch.float64), torch.randint(2, (4,), generator=g)) for n in each]


CASES = [
    (Pooled, sequences(5, 7, 2, 5)),
    (UntilDone, stepped([1, 2, 1, 1, 2], [1, 1, 1, 4, 1, 1, 1, 1], [3, 3])),
]


@pytest.mark.parametrize(("build", "batches"), CASES, ids=["lengths", "calls"])
class TestDifferentBatches:
    def exact(self, model: nn.Module, batches: Any) -> Tensor:
        return sum(reference.ggn(model, reference.nll("classification"), *batch) for batch in batches)  # type: ignore

    def test_exact_curvatures(self, build, batches):
        model = drawn(build())
        exact = self.exact(model, batches)
        D = DiagonalGGN(model, "classification", batches)
        check(D.diagonal(), exact.diagonal())
        assert "per-example" not in repr(D)
        blocks = BlockGGN(model, "classification", batches)
        check(blocks.to_dense(), torch.block_diag(*(b.to_dense() for b in blocks.blocks)))
        for where, block in zip(blocks.layout.values(), blocks.blocks, strict=True):
            check(block.to_dense(), exact[where, where])

    @pytest.mark.parametrize("weight_and_bias", ["separate", "joint"])
    def test_factors_of_all_batches_enter(self, build, batches, weight_and_bias):
        model = drawn(build())
        options = {"weight_and_bias": weight_and_bias}
        whole = KFAC(model, "classification", batches, **options)
        merged = KFAC(model, "classification", batches[0], **options)
        for batch in batches[1:]:
            merged = merged.merge(KFAC(model, "classification", batch, **options))
        check(whole.to_dense(), merged.to_dense())
        assert "per-example" not in repr(whole)
        exact = self.exact(model, batches)
        E = EKFAC(model, "classification", batches, **options)
        ends = torch.tensor([0, *E.sizes]).cumsum(0).tolist()
        target = torch.block_diag(*(exact[a:b, a:b] for a, b in zip(ends, ends[1:], strict=False)))
        assert (E.to_dense() - target).norm() <= (whole.to_dense() - target).norm()


class TestAParameterOfTwoUses:
    @pytest.mark.parametrize("order", [(3, 4), (4, 3), (3, 3, 4, 3)])
    def test_exact_in_all_batches_where_it_has_no_factors_in_one(self, order):
        model, batches = drawn(Branching()), widths(*order)
        exact = sum(reference.ggn(model, reference.nll("classification"), *batch) for batch in batches)
        for kind in (KFAC, EKFAC):
            with untouched(model):
                K = kind(model, "classification", batches)
                check(K.blocks[0].to_dense(), exact[:9, :9].diagonal().diag())
                assert "per-example rows" in repr(K)
            full = kind(model, "classification", batches, fallback="full")
            check(full.blocks[0].to_dense(), exact[:9, :9])

    def test_merge_refuses_to_mix_them(self):
        model = drawn(Branching())
        one, two = (KFAC(model, "classification", batch) for batch in widths(3, 4))
        with pytest.raises(ShapeError, match="one KFAC over all the data"):
            one.merge(two).to_dense()


def test_a_small_budget_makes_many_chunks_and_the_same_numbers(monkeypatch):
    from curvops.nets.capture import Capture

    p = problem("conv2d")
    x, y = (torch.cat([t] * 64) for t in p.data())
    seen: list[tuple[int, int]] = []
    factors = Capture.factors

    def counted(self: Any, U: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((len(U), U.shape[-1]))
        return factors(self, U, *rest, **options)

    monkeypatch.setattr(Capture, "factors", counted)
    for kind in (DiagonalGGN, KFAC, EKFAC, BlockGGN):
        seen.clear()
        whole = kind(p.model(), p.loss(), (x, y)).to_dense()
        assert len(seen) <= 2
        few, most = len(seen), max(n for n, _ in seen)
        seen.clear()
        small = kind(p.model(), p.loss(), (x, y), memory_budget=50_000).to_dense()
        assert len(seen) >= 8 * few
        assert max(n for n, _ in seen) <= most / 4
        check(small, whole)


def test_what_is_free_is_asked_for_where_it_matters(monkeypatch):
    from curvops.curvature import objective
    from curvops.curvature.matrixfree import layerpass

    asked: list[int] = []
    monkeypatch.setattr(objective, "default_budget", lambda device: asked.append(1) or 2**26)
    covered, uncovered = problem("mlp"), Angles()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    KFAC(covered.model(), covered.loss(), covered.data()).trace()
    assert not asked
    KFAC(uncovered, "classification", [(x, y), (x + 1, y)]).trace()
    assert asked == [1]  # the rows of what no rule covers come in chunks of it, of one size in a pass
    asked.clear()
    monkeypatch.setattr(layerpass, "CPU_COLUMN_BYTES", 1)
    KFAC(covered.model(), covered.loss(), covered.data()).trace()
    assert asked


class Angles(nn.Module):
    """A parameter that no rule of layers covers."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.angles.cos()


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_in_stacks_of_fewer_examples_give_the_same_numbers(monkeypatch, groups):
    from curvops.curvature.matrixfree import layerpass
    from curvops.nets import factors
    from curvops.nets.capture import Capture

    model = drawn(nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)))
    x, y = torch.randn(20, 2, 5, 5, dtype=torch.float64), torch.randint(5, (20,))
    seen: list[tuple[int, int]] = []
    multiplied: list[int] = []
    asked, squares = Capture.factors, factors.Outer.squares

    def counted(self: Any, U: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((len(U), U.shape[-1]))
        return asked(self, U, *rest, **options)

    def together(self: Any, *others: Any) -> Tensor:
        multiplied.append(sum(len(part.g) for part in (self, *others)))
        return squares(self, *others)

    monkeypatch.setattr(Capture, "factors", counted)
    monkeypatch.setattr(factors.Outer, "squares", together)
    check(DiagonalGGN(model, "classification", (x, y)).diagonal(), reference.ggn(model, NLL, x, y).diagonal())
    assert seen == [(20, 4)]
    assert multiplied == [4]
    seen.clear()
    multiplied.clear()
    monkeypatch.setattr(layerpass, "CPU_COLUMN_BYTES", 1)
    monkeypatch.setattr(layerpass, "STACKED_EXAMPLES", 2)
    monkeypatch.setattr(layerpass, "STACKED_BYTES", 3 * 8 * layer_bytes(model, x))
    monkeypatch.setattr(factors, "SQUARED", 2 * 3 * 4 * (9 + 18))
    check(DiagonalGGN(model, "classification", (x, y)).diagonal(), reference.ggn(model, NLL, x, y).diagonal())
    assert seen == [*[(7, 1)] * 8, *[(6, 1)] * 4]
    assert multiplied == [3, 1] * 3


def layer_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes per example that a pass over the layers counts on."""
    from curvops.nets.capture import Layers
    from curvops.nets.forward import Network
    from curvops.nets.parameters import ParameterSelection

    layers = Layers(Network(model), ParameterSelection(model))
    layers.learn(x, len(x))
    return layers.bytes_per_example


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Offset(nn.Module):
    """Mixes the batch in its own forward, between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h / h.std(0))


MIXING = [
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), Centred()), nn.Linear(3, 2)),
     r"module '1.1' \(Centred\)"),
    (Offset, r"module '\(the model itself\)' \(Offset\)"),
    (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train(), r"module '1' \(BatchNorm1d\) is in train mode"),
    (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
     r"module '1' \(BatchNorm1d\) has no running statistics"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "words"), MIXING)
@pytest.mark.parametrize("kind", [KFAC, EKFAC, DiagonalGGN, BlockGGN])
def test_what_mixes_examples_is_named(kind, build, words):
    model = build()
    drawn(model).train(model.training) if "train mode" in words else drawn(model).eval()
    handle = model[0].register_forward_hook(lambda *_: None) if isinstance(model, nn.Sequential) else None
    data = (torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(6) % 2)
    with untouched(model), pytest.raises(CurvopsError, match=words):
        kind(model, "classification", data).to_dense()
    if handle is not None:
        handle.remove()


class SequenceFirst(nn.Module):
    """A layer on rows that are positions first; of some batches its weight scales what it makes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1)))
        h = h * self.c.weight.diagonal() if x[0, 0, 0] > 5 else torch.tanh(self.c(h))
        return self.head(h).sum(0)


@pytest.mark.parametrize("fallback", ["diag", "full"])
def test_an_exact_block_puts_together_what_is_of_one_example(fallback):
    model, g = drawn(SequenceFirst()), torch.Generator().manual_seed(1)
    x = [torch.randn(4, 3, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    x[1][:, 0, 0] = 10.0
    batches = [(part, torch.arange(4) % 2) for part in x]
    K = KFAC(model, "classification", batches, fallback=fallback)
    expected = sum(reference.ggn(model, NLL, part, y) for part, y in batches)
    block, rows = K.blocks[2].to_dense(), slice(16, 32)
    expected = expected[rows, rows]
    check(block, expected if fallback == "full" else expected.diagonal().diag())


class Mixture(nn.Module):
    """Experts, of which each example asks one, and the last one is asked by none; inputs `(B, 2, 3)`."""

    def __init__(self, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([expert() for _ in range(3)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        asked = (x[:, 0, 0] > 0).long()
        h = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            h[asked == i] = expert(x[asked == i])
        return self.head(torch.tanh(h))


EXPERTS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.LayerNorm(4)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.AvgPool1d(2), nn.Flatten()
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_no_example_of_a_batch_asks(name):
    model = drawn(Mixture(EXPERTS[name])).eval()
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(7, 2, 3, generator=g, dtype=torch.float64), torch.arange(7) % 2
    x[:4, 0, 0].abs_()  # the first batches ask one expert only
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 4), (4, 7))]
    exact, hessian = reference.ggn(model, NLL, x, y), reference.hessian(model, NLL, x, y)
    for data in ((x, y), batches):
        check(DiagonalGGN(model, "classification", data).diagonal(), exact.diagonal())
        check(GGN(model, "classification", data).to_dense(), exact)
        gram = Gram(model, "classification", data)
        check(gram.to_dense(), gram @ torch.eye(gram.shape[0], dtype=torch.float64))
        for kind, whole in ((BlockGGN, exact), (BlockHessian, hessian)):
            blocks = kind(model, "classification", data)
            for where, block in zip(blocks.layout.values(), blocks.blocks, strict=True):
                check(block.to_dense(), whole[where, where])
        K, E = (kind(model, "classification", data, fallback="full") for kind in (KFAC, EKFAC))
        assert not torch.cat([K.to_dense()[K.layout[n]] for n in K.layout if n.startswith("experts.2")]).any()
        target = torch.block_diag(*(exact[where, where] for where in K.layout.values()))
        assert (E.to_dense() - target).norm() <= (K.to_dense() - target).norm()


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_parameter_seen_as_two_matrices_has_an_exact_block(kind):
    class TwoViews(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.zeros(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.W.view(3, 4))[:, :2] + torch.cat([x, x.sin()], 1) @ self.W

    model, g = drawn(TwoViews()), torch.Generator().manual_seed(5)
    x, y = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.arange(5) % 2
    K = kind(model, "classification", (x, y), fallback="full")
    check(K.to_dense(), reference.ggn(model, NLL, x, y))


class Skipping(nn.Module):
    """A layer that examples with negative entries alone go through; other batches do without it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        asked = (x[:, :1] < 0).to(x.dtype)
        return self.head(x + asked * torch.tanh(self.layer(x)) if asked.any() else x)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, DiagonalGGN, BlockGGN])
def test_what_a_later_batch_uses_is_not_reported_as_unused(kind):
    model, g = drawn(Skipping()), torch.Generator().manual_seed(6)
    x, y = torch.randn(6, 3, generator=g, dtype=torch.float64), torch.arange(6) % 2
    x[:3, 0].abs_()
    x[3:, 0].abs_().neg_()
    exact = reference.ggn(model, NLL, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        K = kind(model, "classification", [(x[:3], y[:3]), (x[3:], y[3:])])
        assert K.diagonal()[:12].any()
    if kind in (DiagonalGGN, BlockGGN):
        check(K.diagonal(), exact.diagonal())
