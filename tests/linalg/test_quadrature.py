"""Quadrature rules: exact at full depth, bracketing before, beyond rounding never wrong."""

from __future__ import annotations

import pytest
import torch
from spectra import matrix, quadratic_forms, spectra
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.linalg import quadrature
from curvops.linalg.lanczos import lanczos
from curvops.linalg.probes import rademacher

P = 80
FUNCTIONS = {
    "log": quadrature.log(),
    "inverse": quadrature.inverse(),
    "shrinkage": quadrature.shrinkage(0.3),
    "sqrt": quadrature.power(0.5),
    "inverse sqrt": quadrature.power(-0.5),
    "power 1.5": quadrature.power(1.5),
    "shifted log": quadrature.log(0.2),
}


def probes(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return rademacher(P, 0, count, seed=0, dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_full_depth_is_exact(name: str) -> None:
    f = FUNCTIONS[name]
    M = matrix(torch.linspace(0.1, 3, P, dtype=torch.float64))
    Z = probes(4)
    tri = lanczos(lambda V: M @ V, Z, P)
    exact = quadratic_forms(M, f, Z)
    assert torch.allclose(quadrature.gauss(tri, f), exact, rtol=1e-10)
    assert torch.allclose(quadrature.gauss_radau(tri, f, 0.1), exact, rtol=1e-10)
    low, high = quadrature.bracket(quadrature.rules(tri, 0.1), f)
    assert torch.allclose(low, exact, rtol=1e-9)
    assert torch.allclose(high, exact, rtol=1e-9)


def test_polynomials_are_exact_to_their_degree() -> None:
    M = matrix(torch.linspace(-1, 3, P, dtype=torch.float64))
    Z = probes(3)
    tri = lanczos(lambda V: M @ V, Z, 4)
    for degree in range(8):
        exact = quadratic_forms(M, lambda x, d=degree: x**d, Z)
        assert torch.allclose(quadrature.gauss(tri, lambda x, d=degree: x**d), exact, rtol=1e-11)
    eighth = quadratic_forms(M, lambda x: x**8, Z)
    assert not torch.allclose(quadrature.gauss(tri, lambda x: x**8), eighth, rtol=1e-6)
    # Radau: one prescribed node, degree 2k.
    assert torch.allclose(quadrature.gauss_radau(tri, lambda x: x**8, -1.0), eighth, rtol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", spectra(P))
@pytest.mark.parametrize("steps", [1, 3, 9, 30])
def test_bracket_holds_and_shrinks(name: str, kind: str, steps: int, dtype: torch.dtype) -> None:
    f = FUNCTIONS[name]
    M = matrix(spectra(P)[kind]).to(dtype)
    Z = probes(6, dtype)
    stored = M.double()
    floor = float(torch.linalg.eigvalsh(stored)[0].clamp(max=float(spectra(P)[kind].min())))
    exact = quadratic_forms(stored, f, Z.double())
    low, high = quadrature.bracket(quadrature.rules(lanczos(lambda V: M @ V, Z, steps), floor), f)
    rounding = 1e-11 * exact.abs().clamp(min=1)
    assert bool((low <= exact + rounding).all()), (low - exact).max()
    assert bool((exact <= high + rounding).all()), (exact - high).max()
    deep = quadrature.rules(lanczos(lambda V: M @ V, Z, 2 * steps), floor)
    low2, high2 = quadrature.bracket(deep, f)
    share = quadrature.rounding_share(deep, f)
    assert float((high2 - low2 - share).mean()) <= float((high - low).mean()) + 1e-9


def test_one_run_brackets_every_shift_of_a_singular_matrix() -> None:
    values = torch.zeros(P, dtype=torch.float64)
    values[:7] = torch.logspace(0, 4, 7, dtype=torch.float64)
    M = matrix(values)
    Z = probes(5)
    r = quadrature.rules(lanczos(lambda V: M @ V, Z, 5), 0.0)
    assert r.node is not None
    assert bool((r.node < 0).all())
    for delta in (1e-4, 1e-2, 1.0):
        f = quadrature.log(delta)
        exact = quadratic_forms(M, lambda x, d=delta: torch.log(x.clamp(min=0) + d), Z)
        low, high = quadrature.bracket(r, f)
        assert bool(((low <= exact + 1e-6) & (exact <= high + 1e-6)).all())
    ended = quadrature.rules(lanczos(lambda V: M @ V, Z, 20), 0.0)
    assert ended.exact.all()
    low, high = quadrature.bracket(ended, quadrature.log(1e-2))
    assert float((high - low).max()) < 1e-6


def test_a_false_lower_bound_is_refused() -> None:
    M = matrix(torch.linspace(0.1, 3, P, dtype=torch.float64))
    tri = lanczos(lambda V: M @ V, probes(3), 40)
    with pytest.raises(NotPositiveDefiniteError, match=r"bounded below by 0\.5"):
        quadrature.rules(tri, 0.5)


def test_unknown_functions_are_bracketed_by_approximation() -> None:
    M = matrix(torch.linspace(-1, 1, P, dtype=torch.float64))
    Z = probes(6)
    tri = lanczos(lambda V: M @ V, Z, 20)
    r = quadrature.rules(tri)
    for f in (torch.exp, torch.sin, torch.abs, lambda x: torch.exp(-50 * x**2)):
        exact = quadratic_forms(M, f, Z)
        low, high = quadrature.bracket(r, quadrature.SpectralFunction("f", f))
        assert bool(((low <= exact + 1e-10) & (exact <= high + 1e-10)).all())
    low, high = quadrature.bracket(r, quadrature.SpectralFunction("exp", torch.exp))
    assert float((high - low).max()) < 1e-9
    low, high = quadrature.bracket(r, quadrature.SpectralFunction("log", torch.log))
    assert torch.isinf(high - low).all() or torch.isnan(high - low).all()


def test_chebyshev_error_of_known_functions() -> None:
    degrees = torch.tensor([0, 1, 2, 3, 9])
    cubic = quadrature.chebyshev_error(lambda x: x**3, -1.0, 1.0, degrees)
    assert torch.allclose(cubic, torch.tensor([1.0, 0.25, 0.25, 0.0, 0.0], dtype=torch.float64), atol=1e-12)
    # |x| on [-1, 1]: best approximation of degree n errs by about 0.28/n.
    kink = quadrature.chebyshev_error(torch.abs, -1.0, 1.0, torch.tensor([9, 19, 39]))
    assert bool((kink >= torch.tensor([0.028, 0.014, 0.007])).all())
    assert bool((kink <= torch.tensor([0.1, 0.05, 0.025])).all())


def test_zero_vectors_and_shapes() -> None:
    Z = probes(2)
    Z[:, 1] = 0
    M = matrix(torch.linspace(0.1, 3, P, dtype=torch.float64))
    tri = lanczos(lambda V: M @ V, Z, 5)
    value = quadrature.gauss(tri, torch.log)
    assert value[1] == 0
    assert torch.isfinite(value).all()
    with pytest.raises(ShapeError, match="elementwise"):
        quadrature.gauss(tri, lambda x: x.sum())
