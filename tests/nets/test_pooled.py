"""Convolutions read behind their pooling: the same gradients, held where they are not zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor, nn

from curvops.curvature.structured import DiagonalGGN
from curvops.nets import pooled
from curvops.nets.capture import Capture, Layers
from curvops.nets.factors import Outer
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.nets.pooled import Pooled
from curvops.nets.squares import SquareSums

F64 = torch.float64


def behind(*pooling: nn.Module, **options: object) -> nn.Module:
    """A convolution, its pooling, and another layer."""
    convolution = nn.Conv2d(4, 6, 3, **options)  # type: ignore[arg-type]
    return nn.Sequential(convolution, *pooling, nn.Tanh(), nn.Conv2d(6, 2, 2), nn.Flatten())


class Seen(nn.Module):
    """A kernel whose parameter has another shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.zeros(shape)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.conv2d(x, self.kernel.view(3, 2, 3, 3), padding=1)
        return self.head(nn.functional.max_pool2d(h.relu(), 2).flatten(1))


class Experts(nn.Module):
    """One convolution asked twice, the second time by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.pool = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        everyone, nobody = self.convolution(x), self.convolution(x[:0]).flatten(1).sum()
        return self.pool(everyone).flatten(1) + nobody


class Hooked(nn.Module):
    """A forward that has gradients changed between the convolution and its pooling."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.convolution, self.pool = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x)
        r = h.relu()
        if h.requires_grad:
            (r if self.rectified else h).register_hook(lambda g: 2 * g)
        return self.pool(r).flatten(1)


POOLED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ReLU": (lambda: behind(nn.ReLU(), nn.MaxPool2d(2)), (4, 8, 10)),
    "in place": (lambda: behind(nn.ReLU(inplace=True), nn.MaxPool2d(2), bias=False), (4, 8, 8)),
    "ReLU after": (lambda: behind(nn.MaxPool2d(2), nn.ReLU()), (4, 8, 8)),
    "uneven": (lambda: behind(nn.MaxPool2d((2, 3), stride=(3, 3), padding=(1, 0), ceil_mode=True)), (4, 9, 10)),
    "groups": (lambda: behind(nn.ReLU(), nn.MaxPool2d(2), groups=2, stride=2, padding=(2, 1)), (4, 13, 12)),
    "dilated": (lambda: behind(nn.ReLU(), nn.MaxPool2d(3, 3), dilation=2, padding="same"), (4, 8, 8)),
    "circular": (lambda: behind(nn.MaxPool2d(2), padding=1, padding_mode="circular"), (4, 8, 8)),
    "space": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(24, 2)),
        (1, 5, 6, 5),
    ),
    "output": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Flatten()), (2, 5, 5)),
    "one vector": (lambda: Seen(54), (2, 4, 4)),
    "matrix": (lambda: Seen(3, 18), (2, 4, 4)),
    "other matrix": (lambda: Seen(6, 9), (2, 4, 4)),
}  # fmt: skip


class Shortcut(nn.Module):
    """Uses what it pools once more."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.pool = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x)
        return self.pool(h).flatten(1) + h[:, :, ::2, ::2].flatten(1)


class Twice(nn.Module):
    """One convolution on two images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.pool = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.convolution(x)).flatten(1) + self.pool(self.convolution(x.flip(-1))).flatten(1)


class Frames(nn.Module):
    """Images of one example as rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(0, 1).unsqueeze(1)).unflatten(0, x.shape[:2]).flatten(1)


WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "overlapping": (lambda: behind(nn.ReLU(), nn.MaxPool2d(3, 2)), (4, 9, 9)),
    "dilated windows": (lambda: behind(nn.MaxPool2d(2, 2, dilation=2)), (4, 9, 9)),
    "windows of one": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 4), nn.MaxPool2d(1), nn.Conv2d(3, 2, 1), nn.Flatten()), (2, 4, 4)
    ),
    "average": (lambda: behind(nn.ReLU(), nn.AvgPool2d(2)), (4, 8, 8)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), (2, 5, 5)
    ),
    "used again": (Shortcut, (2, 8, 8)),
    "used twice": (Twice, (2, 8, 8)),
    "frames": (Frames, (3, 5, 5)),
    "hooked": (lambda: Hooked(False), (2, 8, 8)),
    "hooked behind the ReLU": (lambda: Hooked(True), (2, 8, 8)),
    "asked by nobody": (Experts, (2, 8, 8)),
}  # fmt: skip


def captured(
    build: Callable[[], nn.Module], shape: tuple[int, ...], K: int, B: int = 5
) -> tuple[Capture, Tensor, list[Tensor]]:
    """A batch that is read behind pools, cotangents, and the per-example gradients that they should have."""
    g = torch.Generator().manual_seed(1)
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    x = torch.randn(B, *shape, generator=g, dtype=F64)
    selection = ParameterSelection(model)
    batch = Layers(Network(model), selection, pooled=True).capture(x, B)
    U = torch.randn(*batch.outputs.shape, K, generator=g, dtype=F64)
    rows = torch.einsum("bcp,bck->kbp", reference.jacobian(model, x), U)
    return batch, U, list(rows.split(list(selection.sizes), -1))


def check(got: Tensor, expected: Tensor) -> None:
    assert reference.relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("K", [1, 12])
@pytest.mark.parametrize("name", POOLED)
def test_gradients_behind_pools(name, K):
    batch, U, expected = captured(*POOLED[name], K)
    factors = batch.factors(U)
    assert factors[0] is not None
    assert isinstance(factors[0].parts[0], Pooled)
    for found, rows in zip(factors, expected, strict=True):
        assert found is not None
        check(found.per_example(), rows)
        check(found.squares(), rows.square().sum((0, 1)))
        check(found.examples(slice(1, 3)).squares(), rows[:, 1:3].square().sum((0, 1)))


@pytest.mark.parametrize("name", WHOLE)
def test_other_outputs_are_read_whole(name):
    batch, U, expected = captured(*WHOLE[name], 12)
    factors = batch.factors(U)
    for found, rows in zip(factors, expected, strict=True):
        assert found is not None
        assert not any(isinstance(part, Pooled) for part in found.parts)
        check(found.squares(), rows.square().sum((0, 1)))


@pytest.mark.parametrize("name", ["ReLU", "groups", "space"])
@pytest.mark.parametrize("entries", [1, 400, 2000])
def test_gathered_a_few_at_a_time(monkeypatch, name, entries):
    """Some outputs of one example, then some examples, the last of them fewer."""
    monkeypatch.setattr(pooled, "GATHERED", entries)
    batch, U, expected = captured(*POOLED[name], 12)
    for found, rows in zip(batch.factors(U), expected, strict=True):
        assert found is not None
        check(found.squares(), rows.square().sum((0, 1)))


def test_columns_are_held_where_they_are_few(monkeypatch):
    """Of a window of 4 there is room for four times the columns; few of them are multiplied as a whole."""
    calls: list[tuple[type, int]] = []
    for kind in (Outer, Pooled):

        def counted(self, *others, kind=kind, squares=kind.squares):
            calls.append((kind, sum(len(part.g) for part in (self, *others))))
            return squares(self, *others)

        monkeypatch.setattr(kind, "squares", counted)
    batch, U, expected = captured(*POOLED["in place"], 14)
    total = SquareSums([expected[0].shape[-1]], expected[0])
    for u in U.split(1, -1):
        total.add(batch.factors(u)[:1], hold=3)
    total.flush()
    check(total.values[0], expected[0].square().sum((0, 1)))
    assert calls == [(Pooled, 12), (Pooled, 2), (Outer, 2)]


@pytest.mark.parametrize("columns", [1, 2**30])
def test_diagonal_behind_pools(monkeypatch, columns):
    from curvops.curvature.matrixfree import layerpass

    monkeypatch.setattr(layerpass, "CPU_COLUMN_BYTES", columns)
    g = torch.Generator().manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 10),
    ).double()  # fmt: skip
    x, y = torch.randn(7, 2, 8, 8, generator=g, dtype=F64), torch.randint(10, (7,), generator=g)
    diagonal = DiagonalGGN(model, "classification", (x, y)).diagonal()
    check(diagonal, reference.ggn(model, reference.nll("classification"), x, y).diagonal())
