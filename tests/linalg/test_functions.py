"""f(A)V by Lanczos against eigh; the certified roots against their own claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spectra import function, matrix, spectra
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.linalg.functions import apply_function, inv_sqrt, sqrt, stieltjes_power

P = 120


def columns(count: int, size: int = P) -> Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def errors(X: Tensor, exact: Tensor) -> Tensor:
    return (X.double() - exact).norm(dim=0) / exact.norm(dim=0)


@pytest.mark.parametrize("kind", spectra(P))
@pytest.mark.parametrize("root", [sqrt, inv_sqrt])
def test_certified_roots(kind: str, root, dtype: torch.dtype) -> None:
    M = matrix(spectra(P)[kind]).to(dtype)
    stored = M.double()
    floor = 0.5 * float(spectra(P)[kind].min())
    V = columns(5).to(dtype)
    exact = function(stored, lambda x: x ** (0.5 if root is sqrt else -0.5)) @ V.double()
    X, report = root(lambda W: M @ W, V, rtol=1e-8 if dtype == torch.float64 else 1e-3, lower_bound=floor)
    assert X.dtype == dtype
    # The certificate holds for every column whether or not the target was met.
    assert bool((errors(X, exact) <= report.residual + 20 * torch.finfo(dtype).eps).all())
    if dtype == torch.float64:
        assert report.converged, report.reason
        assert float(errors(X, exact).max()) <= 1e-8
    elif not report.converged:
        assert "rounding of the products" in report.reason


def test_certificate_holds_at_every_depth() -> None:
    M = matrix(spectra(P)["geometric"])
    V = columns(3)
    for root, p in ((sqrt, 0.5), (inv_sqrt, -0.5)):
        exact = function(M, lambda x, p=p: x**p) @ V
        for steps in (1, 2, 5, 11, 30, 60):
            X, report = root(lambda W: M @ W, V, rtol=1e-13, lower_bound=0.009, max_steps=steps)
            assert report.iterations == steps
            assert not report.converged
            assert bool((errors(X, exact) * exact.norm(dim=0) <= report.residual * X.norm(dim=0) * (1 + 1e-9)).all())


@pytest.mark.parametrize("p", [-0.9, -0.5, 0.3, 0.5, 0.9])
def test_stieltjes_weights(p: float) -> None:
    w = stieltjes_power(p)
    x, y = 0.7, 3.1
    u = torch.linspace(-300, 300, 30_001, dtype=torch.float64).numpy()
    t = np.exp(u)
    found = np.trapezoid(w(t) * t * (y - x) / ((x + t) * (y + t)), u)
    assert abs(found) == pytest.approx(abs(x**p - y**p), rel=1e-6)


@pytest.mark.parametrize("f", [torch.exp, torch.sin, torch.log, lambda x: x**3 - x, lambda x: 1 / (x + 0.1)])
def test_any_function(f) -> None:
    M = matrix(torch.linspace(0.2, 4, P, dtype=torch.float64))
    V = columns(4)
    X, report = apply_function(lambda W: M @ W, f, V, rtol=1e-9)
    assert report.converged
    assert float(errors(X, function(M, f) @ V).max()) <= 1e-8
    assert report.matvecs < 4 * P


def test_full_depth_is_exact_for_any_vector() -> None:
    M = matrix(torch.linspace(-1, 1.1, 25, dtype=torch.float64))
    V = columns(3, 25)
    X, report = apply_function(lambda W: M @ W, torch.sign, V, rtol=1e-12)
    assert report.converged
    assert report.iterations == 25
    assert float(errors(X, function(M, torch.sign) @ V).max()) < 1e-10


def test_columns_stop_on_their_own() -> None:
    values = torch.logspace(-3, 2, P, dtype=torch.float64)
    M = torch.diag(values)
    V = torch.zeros(P, 3, dtype=torch.float64)
    V[0, 0] = 1.0
    V[:4, 1] = 1.0
    V[:, 2] = 1.0
    widths: list[int] = []

    def product(W: Tensor) -> Tensor:
        widths.append(W.shape[1])
        return M @ W

    X, report = inv_sqrt(product, V, rtol=1e-8, lower_bound=1e-3)
    assert widths[:5] == [3, 2, 2, 2, 1]
    assert widths[-1] == 1
    assert report.matvecs == sum(widths)
    assert float(errors(X, values[:, None] ** -0.5 * V).max()) < 1e-8


def test_many_columns_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvops.linalg.functions._SLAB_BYTES", P * 128 * 8 * 3)
    M = matrix(spectra(P)["flat"])
    V = columns(8)
    widths: list[int] = []

    def product(W: Tensor) -> Tensor:
        widths.append(W.shape[1])
        return M @ W

    X, report = sqrt(product, V, rtol=1e-9, lower_bound=0.4)
    assert max(widths) == 3
    assert report.residual.shape == (8,)
    assert report.matvecs == sum(widths)
    assert float(errors(X, function(M, torch.sqrt) @ V).max()) <= 1e-9


def test_singular_square_root() -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[:5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    M = matrix(values)
    V = columns(3)
    X, report = sqrt(lambda W: M @ W, V, rtol=1e-6, lower_bound=0.0)
    Y, _ = sqrt(lambda W: M @ W, X, rtol=1e-6, lower_bound=0.0)
    assert report.converged
    assert float(errors(Y, M @ V).max()) < 1e-6


def test_zero_columns_and_none() -> None:
    M = matrix(spectra(P)["flat"])
    V = columns(2)
    V[:, 0] = 0
    X, report = inv_sqrt(lambda W: M @ W, V, rtol=1e-8, lower_bound=0.4)
    assert report.converged
    assert not X[:, 0].any()
    assert X[:, 1].any()
    empty, report = inv_sqrt(lambda W: M @ W, V[:, :0], rtol=1e-8, lower_bound=0.4)
    assert empty.shape == (P, 0)
    assert report.converged


def test_what_limits_it_is_said() -> None:
    M = matrix(torch.logspace(-8, 0, P, dtype=torch.float64))
    V = columns(2)
    _, report = inv_sqrt(lambda W: M @ W, V, rtol=1e-8, lower_bound=1e-8, max_steps=12)
    assert not report.converged
    assert "12 steps were allowed" in report.reason
    single = matrix(torch.logspace(-4, 1, P, dtype=torch.float64)).float()
    _, report = inv_sqrt(lambda W: single @ W, V.float(), rtol=1e-6, lower_bound=5e-5)
    assert not report.converged
    assert "rounding of the products allows" in report.reason
    assert report.attainable is not None
    assert 1e-6 < report.attainable < 1e-1


def test_refusals() -> None:
    M = matrix(spectra(P)["flat"])
    V = columns(2)
    for bound in (None, -1.0):
        with pytest.raises(NotPositiveDefiniteError, match="non-negative lower bound"):
            sqrt(lambda W: M @ W, V, rtol=1e-6, lower_bound=bound)
    with pytest.raises(NotPositiveDefiniteError, match="proven positive lower bound"):
        inv_sqrt(lambda W: M @ W, V, rtol=1e-6, lower_bound=0.0)
    with pytest.raises(NotPositiveDefiniteError, match=r"bounded below by 0\.9"):
        inv_sqrt(lambda W: M @ W, V, rtol=1e-6, lower_bound=0.9)
    with pytest.raises(NotPositiveDefiniteError, match="Stieltjes"):
        apply_function(lambda W: M @ W, torch.sqrt, V, rtol=1e-6, weight=stieltjes_power(0.5))
    with pytest.raises(ValueError, match="rtol must be > 0"):
        apply_function(lambda W: M @ W, torch.exp, V, rtol=0)
    with pytest.raises(ShapeError, match=r"\(P, K\)"):
        apply_function(lambda W: M @ W, torch.exp, V[:, 0], rtol=1e-6)
    with pytest.raises(ShapeError, match="max_steps"):
        apply_function(lambda W: M @ W, torch.exp, V, rtol=1e-6, max_steps=0)
    with pytest.raises(ValueError, match="-1 < p < 1"):
        stieltjes_power(-1.0)
