"""Block CG against prescribed spectra and dense solves; its claims against float64 residuals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg.cg import cg, iterate
from curvops.linalg.minres import minres

P = 120


def rotation(size: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def matrix(values: Tensor, number: int = 0) -> Tensor:
    Q = rotation(values.numel(), number)
    return (Q * values) @ Q.T


def columns(size: int, count: int, number: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def true_residual(M: Tensor, X: Tensor, B: Tensor) -> Tensor:
    B = B.double()
    return torch.linalg.vector_norm(B - M.double() @ X.double(), dim=0) / torch.linalg.vector_norm(B, dim=0)


def log_spectrum(size: int, kappa: float) -> Tensor:
    return torch.logspace(-math.log10(kappa), 0, size, dtype=torch.float64)


class TestPrescribedSpectra:
    @pytest.mark.parametrize(
        ("kind", "kappa", "limit"),
        [("power", 150, 35), ("power", 1500, 80), ("log", 150, 160), ("log", 1500, 480)],
    )
    def test_iterations_and_scale_invariance(self, kind: str, kappa: float, limit: int) -> None:
        size = 1000
        k = torch.arange(1, size + 1, dtype=torch.float64)
        M = matrix(1 + (kappa - 1) * k**-2 if kind == "power" else kappa * log_spectrum(size, kappa))
        B = columns(size, 1)
        counts = []
        for scale in (1.0, 2.0**-20, 2.0**20, 1e-6, 1e6):
            A = scale * M
            X, report = cg(lambda V, A=A: A @ V, B, rtol=1e-10)
            assert report.converged
            assert float(true_residual(A, X, B).max()) <= 1e-10
            counts.append(report.iterations)
        assert max(counts) <= limit
        assert counts[1:3] == counts[:1] * 2  # powers of two round alike, and others take another path

    def test_scaling_the_right_hand_side_by_a_power_of_two_changes_no_bit(self, dtype: torch.dtype) -> None:
        M = matrix(log_spectrum(P, 100.0)).to(dtype)
        B = columns(P, 3).to(dtype)
        X, report = cg(lambda V: M @ V, B, rtol=1e-4)
        for scale in (2.0**-80, 2.0**80):
            Y, other = cg(lambda V: M @ V, scale * B, rtol=1e-4)
            assert torch.equal(Y, scale * X)
            assert other.iterations == report.iterations

    def test_one_hard_column_among_nineteen_easy_ones(self) -> None:
        values = log_spectrum(P, 1e4)
        Q = rotation(P)
        M = (Q * values) @ Q.T
        B = Q[:, -19:].clone()
        B = torch.cat((B[:, :7], columns(P, 1), B[:, 7:]), 1)
        sizes: list[int] = []

        def matmat(V: Tensor) -> Tensor:
            sizes.append(V.shape[1])
            return M @ V

        X, report = cg(matmat, B, rtol=1e-9)
        assert report.converged
        assert float(true_residual(M, X, B).max()) <= 1e-9
        # Easy columns leave the products: the count is honest and far below 20 per iteration.
        assert report.matvecs == sum(sizes)
        assert report.matvecs < 3 * report.iterations
        assert report.residual.shape == (20,)


class TestAnswers:
    def test_against_dense_solve(self, dtype: torch.dtype) -> None:
        M = matrix(torch.linspace(0.5, 3, P, dtype=torch.float64))
        B = columns(P, 4)
        rtol = 1e-12 if dtype == torch.float64 else 2e-6
        X, report = cg(lambda V: M.to(dtype) @ V, B.to(dtype), rtol=rtol)
        assert report.converged
        assert X.dtype == dtype
        exact = torch.linalg.solve(M.to(dtype).double(), B.to(dtype).double())
        assert float((X.double() - exact).norm() / exact.norm()) < 10 * rtol

    def test_reported_residual_is_the_true_one(self) -> None:
        M, B = matrix(log_spectrum(P, 1e3)), columns(P, 3)
        X, report = cg(lambda V: M @ V, B, rtol=1e-8)
        torch.testing.assert_close(report.residual, true_residual(M, X, B), rtol=1e-6, atol=1e-14)

    def test_zero_columns_and_no_columns(self) -> None:
        M, B = matrix(log_spectrum(P, 10.0)), columns(P, 3)
        B[:, 1] = 0
        X, report = cg(lambda V: M @ V, B, rtol=1e-8)
        assert report.converged
        assert torch.equal(X[:, 1], torch.zeros(P, dtype=torch.float64))
        assert float(report.residual[1]) == 0
        X, report = cg(lambda V: M @ V, torch.zeros(P, 2, dtype=torch.float64), rtol=1e-8)
        assert (report.converged, report.matvecs, float(X.abs().max())) == (True, 0, 0.0)
        X, report = cg(lambda V: M @ V, B[:, :0], rtol=1e-8)
        assert report.converged
        assert X.shape == (P, 0)

    def test_a_good_start_costs_one_product_and_a_bad_one_is_not_believed(self) -> None:
        M, B = matrix(log_spectrum(P, 100.0)), columns(P, 2)
        exact = torch.linalg.solve(M, B)
        X, report = cg(lambda V: M @ V, B, rtol=1e-8, x0=exact)
        assert (report.converged, report.matvecs, report.iterations) == (True, 2, 0)
        torch.testing.assert_close(X, exact)
        X, report = cg(lambda V: M @ V, B, rtol=1e-8, x0=1e3 * torch.ones_like(B))
        assert report.converged
        assert float(true_residual(M, X, B).max()) <= 1e-8

    def test_an_indefinite_matrix_raises_with_the_curvature(self, dtype: torch.dtype) -> None:
        M = matrix(torch.linspace(-1, 2, P, dtype=torch.float64)).to(dtype)
        with pytest.raises(NotPositiveDefiniteError, match=r"p'Ap/p'p = -.*MINRES"):
            cg(lambda V: M @ V, columns(P, 2).to(dtype), rtol=1e-6)

    def test_consistent_semidefinite_gives_the_minimum_norm_solution(self, dtype: torch.dtype) -> None:
        values = torch.cat((torch.zeros(50, dtype=torch.float64), torch.linspace(0.5, 2, P - 50, dtype=torch.float64)))
        M = matrix(values)
        B = M @ columns(P, 3)
        rtol = 1e-11 if dtype == torch.float64 else 1e-5
        X, report = cg(lambda V: M.to(dtype) @ V, B.to(dtype), rtol=rtol)
        assert report.converged
        least = torch.linalg.pinv(M, hermitian=True, rtol=1e-10) @ B
        assert float((X.double() - least).norm() / least.norm()) < 20 * rtol

    def test_inconsistent_semidefinite_is_named(self, dtype: torch.dtype) -> None:
        values = torch.cat((torch.zeros(50, dtype=torch.float64), torch.linspace(0.5, 2, P - 50, dtype=torch.float64)))
        M = matrix(values).to(dtype)
        X, report = cg(lambda V: M @ V, columns(P, 2).to(dtype), rtol=1e-4)
        assert not report.converged
        assert "not in the range" in report.reason
        assert bool((report.residual <= 1).all())
        assert bool(torch.isfinite(X).all())
        _, report = cg(lambda V: 0 * V, columns(P, 2).to(dtype), rtol=1e-4)
        assert not report.converged
        assert "not in the range" in report.reason

    def test_iteration_limit(self) -> None:
        M = matrix(log_spectrum(P, 1e4))
        B = columns(P, 2)
        X, report = cg(lambda V: M @ V, B, rtol=1e-8, max_iters=5)
        assert (report.converged, report.iterations) == (False, 5)
        assert "iteration limit" in report.reason
        torch.testing.assert_close(report.residual, true_residual(M, X, B))

    def test_float32_names_what_it_can_attain(self) -> None:
        M = matrix(log_spectrum(P, 1e4)).float()
        B = columns(P, 1).float()
        X, report = cg(lambda V: M @ V, B, rtol=1e-7)
        assert not report.converged
        assert report.attainable is not None
        assert report.attainable > 1e-7
        assert "float32 attains" in report.reason
        # What it names is what it gets, within an order of magnitude.
        assert 0.03 < float(true_residual(M, X, B).max()) / report.attainable < 30


class TestPreconditioner:
    def test_exact_inverse_takes_one_iteration(self) -> None:
        M = matrix(log_spectrum(P, 1e5))
        inverse = torch.linalg.inv(M)
        X, report = cg(lambda V: M @ V, columns(P, 2), rtol=1e-8, preconditioner=lambda R: inverse @ R)
        assert report.converged
        assert report.iterations <= 2
        assert float(true_residual(M, X, columns(P, 2)).max()) <= 1e-8

    @pytest.mark.parametrize("solver", [cg, minres])
    def test_not_positive_definite_is_named(self, solver) -> None:
        M = matrix(log_spectrum(P, 10.0))
        with pytest.raises(NotPositiveDefiniteError, match="preconditioner is not positive definite"):
            solver(lambda V: M @ V, columns(P, 2), rtol=1e-8, preconditioner=lambda R: -R)

    @pytest.mark.parametrize("solver", [cg, minres])
    def test_wrong_size_is_named(self, solver) -> None:
        with pytest.raises(ShapeError, match="the preconditioner returned shape"):
            solver(lambda V: V, columns(P, 2), rtol=1e-8, preconditioner=lambda R: R[:-1])


class TestRareLooks:
    """The stopping test looked at every few iterations, as on accelerators."""

    @pytest.mark.parametrize("every", [2, 7, 64])
    def test_columns_that_end_together_have_the_same_bits(self, every: int) -> None:
        M = matrix(log_spectrum(P, 1e4))
        B = columns(P, 1).repeat(1, 2)
        X, report = iterate(lambda V: M @ V, B, 1e-8, every=every)
        same, reference = iterate(lambda V: M @ V, B, 1e-8, every=1)
        assert torch.equal(X, same)
        assert report.residual is not None
        assert torch.equal(report.residual, reference.residual)
        assert reference.iterations <= report.iterations < reference.iterations + 2 * every
        assert torch.allclose(report.residual, true_residual(M, X, B), rtol=1e-3)

    @pytest.mark.parametrize("every", [3, 8])
    @pytest.mark.parametrize("preconditioned", [False, True])
    def test_columns_that_end_apart(self, every: int, preconditioned: bool) -> None:
        M = matrix(log_spectrum(P, 1e3))
        easy = torch.linalg.eigh(M).eigenvectors[:, :3]
        B = torch.cat([easy @ columns(3, 3), columns(P, 3), torch.zeros(P, 1, dtype=torch.float64)], 1)
        scale = M.diagonal()[:, None] if preconditioned else None
        M_inverse = None if scale is None else lambda V: V / scale
        X, report = iterate(lambda V: M @ V, B, 1e-10, None, M_inverse, every=every)
        assert report.converged
        assert bool((true_residual(M, X, B)[:-1] <= 1e-10).all())
        exact = torch.linalg.solve(M, B)
        assert torch.linalg.norm(X - exact) <= 1e-7 * torch.linalg.norm(exact)
        once, _ = iterate(lambda V: M @ V, B, 1e-10, None, M_inverse, every=1)
        assert torch.linalg.norm(X - once) <= 1e-10 * torch.linalg.norm(once)

    @pytest.mark.parametrize("count", [1, 3])
    def test_nothing_is_read_back_between_looks(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        M = matrix(log_spectrum(P, 1e4))
        seen: list[int] = []
        products = 0

        def product(V: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return M @ V

        for name in ("__bool__", "__float__", "item", "tolist"):
            stock = getattr(Tensor, name)
            read = lambda t, stock=stock: (seen.append(products), stock(t))[1]  # noqa: E731
            monkeypatch.setattr(Tensor, name, read)
        iterate(product, columns(P, count), 1e-30, 40, every=10)
        during = [n for n in seen if 0 < n < 40]
        assert sorted(set(during)) == [10, 20, 30]

    def test_the_iteration_limit_is_a_look(self) -> None:
        M = matrix(log_spectrum(P, 1e2))
        B = columns(P, 2)
        iterations = cg(lambda V: M @ V, B, rtol=1e-6)[1].iterations
        X, report = iterate(lambda V: M @ V, B, 1e-6, iterations, every=1000)
        assert report.converged
        assert report.iterations == iterations
        assert bool((true_residual(M, X, B) <= 1e-6).all())

    @pytest.mark.parametrize("every", [1, 5])
    @pytest.mark.parametrize("count", [1, 2])
    def test_refusals(self, every: int, count: int) -> None:
        B = columns(P, count)
        values = log_spectrum(P, 1e2)
        M, indefinite, wrong = (matrix(torch.cat([values[: P - k], -values[P - k :]])) for k in (0, 3, 9))
        with pytest.raises(NotPositiveDefiniteError, match="MINRES"):
            iterate(lambda V: indefinite @ V, B, 1e-8, every=every)
        with pytest.raises(NotPositiveDefiniteError, match="preconditioner"):
            iterate(lambda V: M @ V, B, 1e-8, None, lambda V: wrong @ V, every=every)
        with pytest.raises(DataError, match="NaN"):
            iterate(lambda V: V * math.nan, B, 1e-8, every=every)


@pytest.mark.parametrize("solver", [cg, minres])
class TestBadInput:
    def test_arguments(self, solver) -> None:
        B = columns(P, 2)
        for rtol in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="rtol"):
                solver(lambda V: V, B, rtol=rtol)
        with pytest.raises(ValueError, match="max_iters"):
            solver(lambda V: V, B, rtol=1e-3, max_iters=0)
        with pytest.raises(ShapeError, match=r"expected \(P, K\)"):
            solver(lambda V: V, B[:, 0], rtol=1e-3)
        with pytest.raises(ShapeError, match="float16"):
            solver(lambda V: V, B.half(), rtol=1e-3)
        with pytest.raises(ShapeError, match="x0"):
            solver(lambda V: V, B, rtol=1e-3, x0=B[:, :1])
        with pytest.raises(ShapeError, match="product returned shape"):
            solver(lambda V: V[:-1], B, rtol=1e-3)

    def test_nan(self, solver) -> None:
        B = columns(P, 2)
        B[3, 1] = math.nan
        with pytest.raises(DataError, match=r"columns \[1\]"):
            solver(lambda V: V, B, rtol=1e-3)
        with pytest.raises(DataError, match="product holds NaN"):
            solver(lambda V: V * math.nan, columns(P, 2), rtol=1e-3)

    def test_an_interrupt_returns_within_one_product(self, solver) -> None:
        M = matrix(log_spectrum(P, 1e4))
        calls = 0

        def matmat(V: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return M @ V

        with pytest.raises(KeyboardInterrupt):
            solver(matmat, columns(P, 1), rtol=1e-8)
        assert calls == 4

    def test_progress_is_shown_only_when_asked_for(self, solver, capsys: pytest.CaptureFixture[str]) -> None:
        M, B = matrix(log_spectrum(P, 10.0)), columns(P, 1)
        X, _ = solver(lambda V: M @ V, B, rtol=1e-6)
        assert capsys.readouterr().err == ""
        Y, _ = solver(lambda V: M @ V, B, rtol=1e-6, progress=True)
        assert "it/s" in capsys.readouterr().err
        assert torch.equal(X, Y)

    def test_nothing_of_the_callers_changes(self, solver) -> None:
        M, B = matrix(log_spectrum(P, 10.0)), columns(P, 2).requires_grad_()
        x0 = torch.ones(P, 2, dtype=torch.float64)
        before = B.detach().clone()
        rng = torch.get_rng_state()
        X, _ = solver(lambda V: M @ V, B, rtol=1e-6, x0=x0)
        assert not X.requires_grad
        assert torch.equal(B.detach(), before)
        assert torch.equal(x0, torch.ones_like(x0))
        assert torch.equal(torch.get_rng_state(), rng)


@st.composite
def systems(draw):
    """Ill-conditioned systems: κ to 1e8, scales 1e-8 to 1e8, both precisions, easy and hard right-hand sides."""
    size = draw(st.integers(1, 60))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kappa = 10 ** draw(st.floats(0, 8))
    values = {
        "log": log_spectrum(size, kappa),
        "power": 1 / kappa + (1 - 1 / kappa) * torch.arange(1, size + 1, dtype=torch.float64) ** -2,
        "outlier": torch.cat((torch.ones(1), torch.full((size - 1,), 1 / kappa))).double(),
        "flat": torch.linspace(1 / kappa, 1, size, dtype=torch.float64),
    }[draw(st.sampled_from(["log", "power", "outlier", "flat"]))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    scale, length = 10 ** draw(st.floats(-8, 8)), 10 ** draw(st.floats(-8, 8))
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0).double()
    count = draw(st.integers(1, 3))
    B = torch.randn(size, count, generator=generator, dtype=torch.float64)
    side = draw(st.sampled_from(["random", "range", "smallest", "root"]))
    if side == "range":
        B = (Q * values) @ (Q.T @ B)
    elif side == "smallest":
        B = Q[:, [int(values.argmin())]] + 0.01 * B
    elif side == "root":
        B = Q @ (values.sqrt()[:, None] * B)
    B = (length * B / torch.linalg.vector_norm(B, dim=0)).to(dtype)
    start = None
    if draw(st.booleans()):
        start = (length / scale * torch.randn(size, count, generator=generator, dtype=torch.float64)).to(dtype)
    rtol = 10 ** draw(st.floats(-12, -2) if dtype == torch.float64 else st.floats(-6, -1))
    definite = ((Q * (scale * values)) @ Q.T).to(dtype)
    indefinite = ((Q * (scale * values * signs)) @ Q.T).to(dtype)
    preconditioner = None
    if draw(st.booleans()):
        # |A|⁻¹ up to a factor of two either way.
        off = torch.rand(size, generator=generator, dtype=torch.float64) * 1.5 + 0.5
        inverse = ((Q / (scale * values * off)) @ Q.T).to(dtype)

        def preconditioner(R: Tensor) -> Tensor:
            return inverse @ R

    return definite, indefinite, B, start, rtol, preconditioner


def check_claim(solver, M: Tensor, B: Tensor, start: Tensor | None, rtol: float, preconditioner) -> None:
    try:
        X, report = solver(lambda V: M @ V, B, rtol=rtol, x0=start, preconditioner=preconditioner)
    except NotPositiveDefiniteError:
        # A stored matrix or preconditioner may have lost its definiteness to rounding; refusing it claims nothing.
        assert solver is cg or preconditioner is not None
        return
    residual = true_residual(M, X, B)
    assert bool(torch.isfinite(X).all())
    if report.converged:
        assert float(residual.max()) <= rtol
    else:
        assert report.reason
        assert float(report.residual.max()) + (report.attainable or 0) > rtol


def certificate(drawn) -> None:
    definite, indefinite, B, start, rtol, preconditioner = drawn
    check_claim(cg, definite, B, start, rtol, preconditioner)
    check_claim(minres, indefinite, B, start, rtol, preconditioner)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@seed(0)
@settings(max_examples=60, **_SETTINGS)
@given(systems())
def test_converged_is_never_claimed_falsely(drawn) -> None:
    certificate(drawn)


@pytest.mark.slow
@seed(1)
@settings(max_examples=2500, **_SETTINGS)
@given(systems())
def test_converged_is_never_claimed_falsely_over_thousands(drawn) -> None:
    certificate(drawn)
