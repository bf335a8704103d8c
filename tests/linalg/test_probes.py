"""Probes are indexed: growing, chunking and precision change none of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.linalg.probes import derive_seed, gaussian, rademacher, resolve_seed

CPU = {"dtype": torch.float64, "device": "cpu"}
both = pytest.mark.parametrize("draw", [rademacher, gaussian])


@both
def test_growth_and_chunks_reuse_the_first_probes(draw: Callable[..., Tensor]) -> None:
    whole = draw(37, 0, 12, seed=5, **CPU)
    parts = torch.cat([draw(37, start, 4, seed=5, **CPU) for start in (0, 4, 8)], dim=1)
    assert whole.shape == (37, 12)
    assert torch.equal(whole, parts)
    assert torch.unique(whole, dim=1).shape[1] == 12
    assert not torch.equal(whole, draw(37, 0, 12, seed=6, **CPU))


@both
def test_precision_and_global_rng_do_not_matter(draw: Callable[..., Tensor]) -> None:
    before = torch.get_rng_state()
    double = draw(100, 3, 2, seed=1, **CPU)
    single = draw(100, 3, 2, seed=1, dtype=torch.float32, device="cpu")
    assert torch.equal(double.float(), single)
    assert torch.equal(before, torch.get_rng_state())


@both
def test_moments(draw: Callable[..., Tensor]) -> None:
    z = draw(50, 0, 20_000, seed=0, **CPU)
    assert float(z.mean().abs()) < 4e-3  # 4 standard errors of 10⁶ draws
    second = z @ z.T / 20_000 - torch.eye(50, dtype=torch.float64)
    assert float(second.abs().max()) < 6 * (2 / 20_000) ** 0.5


def test_rademacher_is_signs() -> None:
    z = rademacher(1001, 0, 3, seed=0, **CPU)
    assert torch.equal(z.abs(), torch.ones_like(z))


def test_seeds() -> None:
    g = torch.Generator().manual_seed(3)
    first, second = resolve_seed(g), resolve_seed(g)
    assert resolve_seed(None) == 0
    assert first != second
    assert first == resolve_seed(torch.Generator().manual_seed(3))
    assert len({derive_seed(s, stream) for s in range(50) for stream in range(4)}) == 200


@both
@pytest.mark.parametrize("bad", [(0, 0, 1), (3, -1, 1), (3, 0, 0)])
def test_empty_requests_are_refused(draw: Callable[..., Tensor], bad: tuple[int, int, int]) -> None:
    with pytest.raises(ShapeError, match="Probes need"):
        draw(*bad, seed=0, **CPU)
