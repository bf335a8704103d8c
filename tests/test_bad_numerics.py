"""Bad input of the certified numerics: refused before it costs, named when it is met, control given back at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import curvops as co
from curvops.errors import (
    ConvergenceError,
    CurvopsError,
    DataError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedError,
)
from curvops.testing import problems

P = 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(low: float = 0.5, high: float = 50.0) -> Tensor:
    Q = torch.linalg.qr(normal(P, P))[0]
    M = (Q * torch.logspace(0, 1, P, base=high / low, dtype=torch.float64) * low) @ Q.T
    return (M + M.T) / 2


def free(M: Tensor, **facts: object) -> co.Closure:
    """A matrix-free operator that no dense road can answer."""
    A = co.Closure(lambda V: M @ V, tuple(M.shape), batched=True, **{"is_symmetric": True, **facts})  # type: ignore[arg-type]
    A.memory_budget = 1
    return A


def damped() -> co.Closure:
    return free(matrix(), is_psd=True, lower_bound=0.5)


# ---------------------------------------------------------------- numbers that make no sense


@pytest.mark.parametrize("kind", [co.CG, co.MINRES, co.SLQ, co.Lanczos, co.Hutchinson, co.XTrace, co.XDiag])
@pytest.mark.parametrize("rtol", [0.0, -1e-3, float("nan")])
def test_targets_are_positive(kind: Callable[..., object], rtol: float) -> None:
    with pytest.raises(ValueError, match="rtol"):
        kind(rtol=rtol)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(co.SLQ, "probes"), (co.SLQ, "steps"), (co.Lanczos, "steps"), (co.Hutchinson, "probes"), (co.Nystrom, "rank")],
)
@pytest.mark.parametrize("count", [0, -3, True])
def test_counts_are_at_least_one(kind: Callable[..., object], name: str, count: int) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**{name: count})


@pytest.mark.parametrize("counts", [{"probes": 0}, {"steps": 0}, {"probes": -1}])
def test_a_spectrum_takes_probes_and_steps(counts: dict[str, int]) -> None:
    A = damped()
    with pytest.raises(ShapeError, match="probes >= 1 and steps >= 1"):
        A.spectrum(**counts)
    assert A.matvec_count == 0


def test_perturb_and_solve_takes_a_positive_target() -> None:
    with pytest.raises(ValueError, match="rtol"):
        co.PerturbAndSolve(rtol=0.0)


def test_a_rank_is_at_most_the_size() -> None:
    A = damped()
    with pytest.raises(ShapeError, match="rank of at most 40"):
        A.solve(normal(P), co.CG(preconditioner=co.Nystrom(P + 1)))
    assert A.matvec_count == 0


# ---------------------------------------------------------------- preconditioners


def test_a_preconditioner_of_another_size_or_dtype_is_refused() -> None:
    A = damped()
    for other in (co.Identity(P + 1), co.Diagonal(torch.ones(P))):
        with pytest.raises(ShapeError, match="the preconditioner"):
            A.solve(normal(P), co.CG(preconditioner=other))
    assert A.matvec_count == 0


def test_a_preconditioner_without_an_exact_solve_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no exact solve"):
        damped().solve(normal(P), co.CG(preconditioner=damped()))
    with pytest.raises(ShapeError, match="expected None"):
        damped().solve(normal(P), co.CG(preconditioner="jacobi"))


def test_a_preconditioner_that_is_not_positive_definite_is_found_and_named() -> None:
    signs = torch.ones(P, dtype=torch.float64)
    signs[0] = -1
    with pytest.raises(NotPositiveDefiniteError, match=r"the preconditioner is not positive definite.*Diagonal\(40\)"):
        damped().solve(normal(P), co.CG(preconditioner=co.Diagonal(signs)))


@pytest.mark.parametrize(
    "preconditioner",
    [
        co.Diagonal(torch.linspace(1, 2, P, dtype=torch.float64)),
        co.Dense(matrix(), is_symmetric=True),
        co.LowRank(normal(P, 3)).add_diagonal(1.0),
        co.Nystrom(10),
        co.Nystrom(),
        "auto",
    ],
    ids=["diagonal", "dense", "low rank", "Nystrom(10)", "Nystrom()", "auto"],
)
def test_good_preconditioners_solve_and_are_reported(preconditioner: object) -> None:
    A, b = damped(), normal(P, 3)
    x, report = A.solve(b, co.CG(preconditioner=preconditioner), return_report=True)
    torch.testing.assert_close(x, torch.linalg.solve(matrix(), b), rtol=1e-4, atol=1e-5)
    assert "preconditione" in report.reason
    assert float(report.residual.max()) <= 1e-6


def test_a_vector_of_dampings_is_preconditioned_for_what_it_is() -> None:
    """G + diag(d) with d over four decades: the sketch is of G, and d enters exactly."""
    U = normal(300, 5)
    G = co.Closure(lambda V: U @ (U.T @ V), (300, 300), batched=True, is_psd=True)
    d = torch.logspace(-2, 2, 300, dtype=torch.float64)
    A, b = G.add_diagonal(d), normal(300)
    _, plain = A.solve(b, return_report=True)
    x, report = A.solve(b, co.CG(preconditioner=co.Nystrom(8)), return_report=True)
    assert report.iterations <= 5 < plain.iterations
    torch.testing.assert_close(x, torch.linalg.solve(U @ U.T + torch.diag(d), b), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- warm start, refinement


def test_a_warm_start_saves_products_and_is_held_to_the_same_residual() -> None:
    A, b = damped(), normal(P)
    x, cold = A.solve(b, return_report=True)
    y, warm = A.solve(b + 1e-4 * normal(P, seed=1), co.CG(x0=x), return_report=True)
    assert warm.matvecs < cold.matvecs
    assert float((b + 1e-4 * normal(P, seed=1) - matrix() @ y).norm() / b.norm()) <= 1.01e-6
    with pytest.raises(ShapeError, match="x0"):
        A.solve(b, co.CG(x0=normal(P, 2)))
    with pytest.raises(UnsupportedError, match="refinement starts from zero"):
        A.solve(b, co.CG(x0=x, refine=True))


def test_refinement_takes_float32_networks_to_float64_residuals() -> None:
    p = problems.problem("mlp")
    model, (x, y) = p.model(torch.float32), p.data(torch.float32)
    before = {name: q.detach().clone() for name, q in model.named_parameters()}
    A = co.GGN(model, p.likelihood, (x, y)).add_diagonal(1e-2)
    b = normal(A.shape[0]).float()
    with pytest.raises(ConvergenceError, match=r"float64|refine"):
        A.solve(b, co.CG(rtol=1e-9))
    solution, report = A.solve(b, co.CG(rtol=1e-9, refine=True), return_report=True)
    assert solution.dtype == torch.float64
    twin = A.to(torch.float64)
    residual = (b.double() - twin @ solution).norm() / b.double().norm()
    assert float(residual) <= 1e-9
    assert report.matvecs > report.iterations
    for name, q in model.named_parameters():
        assert q.dtype == torch.float32
        assert torch.equal(q, before[name])


# ---------------------------------------------------------------- false facts


def test_an_operator_that_is_not_symmetric_though_it_says_so_is_found() -> None:
    M = matrix() + torch.triu(normal(P, P, seed=2), 1)
    for ask in (
        lambda A: A.spectrum(),
        lambda A: A.logdet(co.SLQ()),
        lambda A: A.inv_sqrt_matvec(normal(P)),
        lambda A: A.function(torch.exp, normal(P)),
    ):
        with pytest.raises(DataError, match="not symmetric"):
            ask(free(M, lower_bound=1e-3))


def test_a_wrong_lower_bound_is_disproved() -> None:
    for ask in (lambda A: A.spectrum(), lambda A: A.logdet(co.SLQ()), lambda A: A.inv_sqrt_matvec(normal(P))):
        with pytest.raises(NotPositiveDefiniteError, match=r"bounded below|lower bound"):
            ask(free(matrix(), lower_bound=5.0))


def test_a_spectrum_that_is_indefinite_though_it_says_psd_is_found_by_cg() -> None:
    M = matrix() - 10 * torch.eye(P, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match=r"MINRES|add_diagonal"):
        free(M, is_psd=True).solve(normal(P), co.CG())


def test_half_precision_is_refused() -> None:
    with pytest.raises(ShapeError, match="float16"):
        co.Diagonal(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ShapeError, match="float16"):
        co.Closure(lambda v: v, (3, 3), dtype=torch.float16)
    p = problems.problem("mlp")
    with pytest.raises(CurvopsError, match=r"float16|half"):
        co.GGN(p.model().half(), p.likelihood, p.data())


# ---------------------------------------------------------------- dampings that rounding swallows


def test_a_damping_that_underflows_is_refused() -> None:
    M = matrix(1.0, 1e6)
    M = M - torch.linalg.eigvalsh(M)[0] * torch.eye(P, dtype=torch.float64)
    G = free(M, is_psd=True)
    with pytest.raises(NotPositiveDefiniteError, match=r"lost in the rounding"):
        G.add_diagonal(1e-12).logdet(co.SLQ())
    with pytest.raises(NotPositiveDefiniteError, match="underflows"):
        G.spectrum(steps=P).logdet(1e-12)


def test_float32_below_its_rounding_answers_from_the_twin() -> None:
    """u‖A‖ above δ/10: float32 products cannot tell δ; the float64 twin can, and the report says so."""
    p = problems.problem("mlp")
    single = co.GGN(p.model(torch.float32), p.likelihood, p.data(torch.float32)).add_diagonal(1e-7)
    value, report = single.logdet(return_report=True)
    exact = torch.logdet(single.to(torch.float64).to_dense())
    assert "float64" in report.reason
    assert float(value) == pytest.approx(float(exact), rel=1e-6)


# ---------------------------------------------------------------- indefinite Hessians


def test_hessians_are_solved_by_minres_and_refuse_what_needs_definiteness() -> None:
    p = problems.problem("mlp")
    model = p.model()
    H = co.Hessian(model, p.likelihood, p.data())
    M = H.to_dense()
    low = float(torch.linalg.eigvalsh(M)[0])
    assert low < 0
    b = M @ normal(len(M))
    assert "MINRES" in H.explain("solve")
    x, report = H.solve(b, return_report=True)
    assert report.algorithm == "MINRES"
    assert float((b - M @ x).norm() / b.norm()) <= 1.01e-6
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue") as refusal:
        H.logdet()
    assert f"{low:.3e}" in str(refusal.value)
    assert f"d > {-low:.3g}" in str(refusal.value)
    damped = H.add_diagonal(-1.01 * low)
    assert float(damped.logdet()) == pytest.approx(float(torch.logdet(damped.to_dense())), rel=1e-10)


def test_without_a_dense_copy_definiteness_is_established_by_lanczos_or_refused() -> None:
    """The damping that a refusal names does: the next call finds a positive bound, and says with what certainty."""
    size = 400
    Q = torch.linalg.qr(normal(size, size))[0]
    values = torch.cat((torch.linspace(-1, 1, size - 20), torch.logspace(0, 1.5, 20))).double()
    M = (Q * values) @ Q.T
    H = free((M + M.T) / 2)
    zero = torch.zeros(size, dtype=torch.float64)
    asks: list[Callable[[co.LinearOperator], object]] = [
        lambda A: A.logdet(),
        lambda A: A.inv_sqrt_matvec(normal(size)),
        lambda A: co.Gaussian(zero, A, generator=torch.Generator().manual_seed(0)).sample(2),
    ]
    for ask in asks:
        with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue met") as refusal:
            ask(H)
        damping = float(str(refusal.value).split("δ above ")[1].split(" ")[0])
        assert 1 < damping < 3
        ask(H.add_diagonal(damping))
    A = H.add_diagonal(1.5)
    value, report = A.logdet(return_report=True)
    exact = float((values + 1.5).log().sum())
    assert "with probability 0.999" in report.reason
    assert abs(float(value) - exact) <= report.half_width
    assert H.add_diagonal(0.5).explain("logdet").startswith("logdet: logdet after a Lanczos run")


def test_a_singular_curvature_is_refused_without_a_long_look() -> None:
    G = co.GGN(*_ggn_parts())
    G.memory_budget = 1
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue met"):
        G.logdet(co.SLQ())
    assert G.matvec_count <= 40


def _ggn_parts() -> tuple[torch.nn.Module, str, tuple[Tensor, Tensor]]:
    p = problems.problem("mlp")
    return p.model(), p.likelihood, p.data()


# ---------------------------------------------------------------- interrupts


@pytest.mark.parametrize(
    "ask",
    [
        lambda A: A.solve(normal(P)),
        lambda A: A.solve(normal(P), co.CG(preconditioner="auto")),
        lambda A: A.solve(normal(P), co.MINRES()),
        lambda A: A.logdet(co.SLQ()),
        lambda A: A.spectrum(),
        lambda A: A.trace(co.Hutchinson()),
        lambda A: A.diagonal(co.XDiag()),
        lambda A: A.eigsh(3),
        lambda A: A.inv_sqrt_matvec(normal(P)),
    ],
    ids=["CG", "auto", "MINRES", "SLQ", "spectrum", "Hutchinson", "XDiag", "eigsh", "Lanczos"],
)
def test_an_interrupt_returns_control_within_one_product(ask: Callable[[co.Closure], object]) -> None:
    M, calls = matrix(), []

    def product(V: Tensor) -> Tensor:
        calls.append(V.shape[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return M @ V

    A = co.Closure(product, (P, P), batched=True, is_psd=True, lower_bound=0.5)
    A.memory_budget = 1
    with pytest.raises(KeyboardInterrupt):
        ask(A)
    assert len(calls) == 2
