"""Roots behind a last layer: the product is what counts, however confident the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvops.nets.categorical import Categorical
from curvops.nets.head import Head

D, C, B, T = 24, 40, 7, 3

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def head(dtype: torch.dtype, device: torch.device) -> Head:
    weight = torch.randn(D, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Head(None, None, weight.to(device, dtype), frozenset(), True)  # type: ignore[arg-type]


def outputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits from flat to certain, some of a spread that leaves their product no Cholesky factor."""
    f = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = f * torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 50.0, 100.0], dtype=torch.float64)[:, None, None]
    y = torch.zeros(B, T, dtype=torch.long)
    y[2, 1] = -100
    return f.to(device, dtype), y.to(device)


def hessian(f: Tensor) -> Tensor:
    """Λ of one datum, entry by entry."""
    p = f.double().softmax(0)
    block = -p.outer(p)
    for c in range(C):
        block[c, c] = p[c] * p[torch.arange(C) != c].sum()
    return block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_root_of_the_product_row_by_row(dtype: torch.dtype, device: torch.device) -> None:
    mine, (f, y) = head(dtype, device), outputs(dtype, device)
    likelihood = Categorical()
    L = mine.root(lambda W: (likelihood.output_hessian_sqrt_through(f[n], y[n], W) for n in range(B)))
    assert L.shape == (B * T, D, D)
    L = L.unflatten(0, (B, T))
    assert L.dtype == dtype
    assert torch.equal(L, L.tril())
    assert (L[2, 1] == 0).all()
    W = mine.weight.cpu().double()
    for n in range(B):
        for t in range(T):
            if y[n, t] >= 0:
                expected = W @ hessian(f[n, t].cpu()) @ W.T
                one = L[n, t].cpu().double()
                assert (one @ one.T - expected).norm() <= 30 * U[dtype] * expected.norm()


def test_only_rows_without_a_cholesky_factor_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda X, mode: decomposed.append(len(X)) or qr(X, mode=mode))
    likelihood = Categorical()
    for dtype in (torch.float32, torch.float64):
        f, y = outputs(dtype, torch.device("cpu"))
        f, y = f.flatten(0, 1), y.flatten()
        head(dtype, f.device).root(lambda W, f=f, y=y: [likelihood.output_hessian_sqrt_through(f, y, W)])
        assert bool(decomposed) == (dtype == torch.float64)
    assert len(decomposed) <= 2 * T
