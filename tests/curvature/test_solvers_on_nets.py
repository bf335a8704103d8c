"""Solvers, determinants, traces, spectra and samples of a trained network's curvatures against the dense matrices."""

from __future__ import annotations

import pytest
import reference
import torch
from curvature_subjects import randn
from torch import Tensor, nn

import curvops as co
from curvops.errors import ConvergenceError
from curvops.operators.functionspace import function_space

DELTA = 0.1


class Problem:
    """A small classifier of noisy clusters on an 8 x 8 image's scale of sizes, P = 299, trained a little."""

    def __init__(self, dtype: torch.dtype = torch.float64, data: int = 60) -> None:
        g = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 7)).double()
        self.y = torch.randint(7, (data,), generator=g)
        centres = torch.randn(7, 16, generator=g, dtype=torch.float64)
        self.x = centres[self.y] + 0.7 * torch.randn(data, 16, generator=g, dtype=torch.float64)
        optimiser = torch.optim.Adam(self.model.parameters(), lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            optimiser.step()
        optimiser.zero_grad()
        self.model.to(dtype)
        self.x = self.x.to(dtype)

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(25), self.y.split(25), strict=True))

    def operator(self, kind: type, **options) -> co.LinearOperator:
        return kind(self.model, "classification", self.data, **options)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def few() -> Problem:
    return Problem(data=25)  # n = 150 < P = 295


@pytest.fixture(scope="module")
def G(problem) -> Tensor:
    return reference.ggn(problem.model, reference.nll("classification"), problem.x, problem.y)


@pytest.fixture(scope="module")
def H(problem) -> Tensor:
    return reference.hessian(problem.model, reference.nll("classification"), problem.x, problem.y, together=True)


@pytest.fixture(scope="module")
def E(problem) -> Tensor:
    return reference.empirical_fisher(problem.model, reference.nll("classification"), problem.x, problem.y)


def damped(M: Tensor, delta: float | Tensor = DELTA) -> Tensor:
    return M + torch.diag(torch.as_tensor(delta, dtype=M.dtype).expand(len(M)))


DAMPINGS = {
    "scalar": lambda model: 0.1,
    "vector": lambda model: torch.linspace(0.05, 2.0, 295, dtype=torch.float64),
    "dict": lambda model: {name: 0.1 * (i + 1) for i, (name, _) in enumerate(model.named_parameters())},
}


def flat(delta, model) -> float | Tensor:
    if not isinstance(delta, dict):
        return delta
    return torch.cat([p.new_full((p.numel(),), delta[n]) for n, p in model.named_parameters()])


# ---------------------------------------------------------------- solve


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize(
    "method", [None, co.CG(rtol=1e-9), co.Cholesky(), co.Eigh(), co.MINRES(rtol=1e-9), co.FunctionSpace()],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_solve(problem, G, damping, method):
    delta = DAMPINGS[damping](problem.model)
    A = problem.operator(co.GGN).add_diagonal(delta)
    M = damped(G, flat(delta, problem.model))
    B = randn(295, 3)
    X, report = A.solve(B, method, return_report=True)
    assert report.converged
    rtol = 1e-6 if method is None else 1e-8
    assert float(((B - M @ X).norm(dim=0) / B.norm(dim=0)).max()) <= rtol
    assert reference.relative_error(X, torch.linalg.solve(M, B)) <= rtol * float(torch.linalg.cond(M))


def test_an_undamped_ggn_gives_the_shortest_solution(problem, G):
    A = problem.operator(co.GGN)
    b = G @ randn(295)
    x = A.solve(b)
    assert float((G @ x - b).norm() / b.norm()) <= 1e-6
    values, vectors = torch.linalg.eigh(G)
    null = vectors[:, values < 1e-9 * values[-1]]
    assert null.shape[1] > 10
    assert float((null.T @ x).norm()) <= 1e-6 * float(x.norm())
    with pytest.raises(ConvergenceError):
        A.solve(randn(295), co.CG(max_iters=200))  # not in the range


def test_an_indefinite_hessian_by_minres(problem, H):
    A = problem.operator(co.Hessian).add_diagonal(0.05)
    M = damped(H, 0.05)
    assert float(torch.linalg.eigvalsh(M)[0]) < 0
    b = randn(295)
    x, report = A.solve(b, return_report=True)
    assert report.algorithm == "MINRES"
    assert float((b - M @ x).norm() / b.norm()) <= 1e-6


@pytest.mark.parametrize("kind", [co.EmpiricalFisher, co.MCFisher])
def test_fishers(problem, E, kind):
    A = problem.operator(kind).add_diagonal(DELTA)
    M = damped(E) if kind is co.EmpiricalFisher else A.to_dense()
    b = randn(295)
    assert float((b - M @ A.solve(b)).norm() / b.norm()) <= 1e-6
    assert float(A.logdet()) == pytest.approx(float(torch.logdet(M)), rel=1e-10)


# ---------------------------------------------------------------- logdet, trace, diagonal


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("method", [None, co.Cholesky(), co.Eigh(), co.FunctionSpace()], ids=lambda m: type(m).__name__)
def test_exact_logdet(problem, G, damping, method):
    delta = DAMPINGS[damping](problem.model)
    A = problem.operator(co.GGN).add_diagonal(delta)
    value, report = A.logdet(method, return_report=True)
    exact = float(torch.logdet(damped(G, flat(delta, problem.model))))
    assert float(value) == pytest.approx(exact, rel=1e-10)
    assert report.half_width == 0.0


def test_function_space_is_chosen_where_data_are_few(few):
    M = reference.ggn(few.model, reference.nll("classification"), few.x, few.y)
    A = few.operator(co.GGN).add_diagonal(DELTA)
    value, report = A.logdet(return_report=True)
    assert report.algorithm == "function space (determinant lemma)"
    assert "n = 150 < P = 295" in report.reason
    assert float(value) == pytest.approx(float(torch.logdet(damped(M))), rel=1e-10)
    scaled = (2.5 * few.operator(co.GGN)).add_diagonal(DELTA)
    assert float(scaled.logdet(co.FunctionSpace())) == pytest.approx(float(torch.logdet(damped(2.5 * M))), rel=1e-10)
    b = randn(295)
    x = scaled.solve(b, co.FunctionSpace())
    assert float((damped(2.5 * M) @ x - b).norm() / b.norm()) <= 1e-9


def test_function_space_of_a_sum_of_a_fisher(few):
    A = few.operator(co.EmpiricalFisher).add_diagonal(DELTA)
    form = function_space(A)
    assert form.rows == 25
    assert float(form.logdet()) == pytest.approx(float(torch.logdet(A.to_dense())), rel=1e-10)


def test_stochastic_logdet_and_trace_cover_the_exact_ones(problem, G):
    A = problem.operator(co.GGN).add_diagonal(DELTA)
    M = damped(G)
    value, report = A.logdet(co.SLQ(), return_report=True)
    assert abs(float(value) - float(torch.logdet(M))) <= 2 * report.half_width
    assert report.half_width <= max(0.5, 0.01 * abs(float(value)))
    value, report = A.trace(co.Hutchinson(), return_report=True)
    assert abs(float(value) - float(M.trace())) <= 2 * report.half_width + 1e-10
    assert float(A.trace()) == pytest.approx(float(M.trace()), rel=1e-12)
    assert reference.relative_error(A.diagonal(), M.diagonal()) <= 1e-12


# ---------------------------------------------------------------- spectra, functions, samples


@pytest.mark.parametrize(("kind", "which"), [(co.GGN, "LA"), (co.Hessian, "BE"), (co.Hessian, "SA")])
def test_eigenpairs(problem, G, H, kind, which):
    M = G if kind is co.GGN else H
    pairs = problem.operator(kind).eigsh(6, which=which)
    exact = torch.linalg.eigvalsh(M)
    chosen = {"LA": exact[-6:], "SA": exact[:6], "BE": torch.cat([exact[:3], exact[-3:]])}[which]
    assert torch.allclose(pairs.values, chosen, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
    residuals = (M @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert float(residuals.max()) <= 1e-8 * float(exact.abs().max())


@pytest.mark.parametrize("method", [None, co.Lanczos(rtol=1e-8)], ids=lambda m: type(m).__name__)
def test_roots_and_functions(problem, G, method):
    A = problem.operator(co.GGN).add_diagonal(DELTA)
    values, vectors = torch.linalg.eigh(damped(G))
    v = randn(295)

    def exact(f):
        return vectors @ (f(values) * (vectors.T @ v))

    assert reference.relative_error(A.sqrt_matvec(v, method), exact(torch.sqrt)) <= 1e-6
    assert reference.relative_error(A.inv_sqrt_matvec(v, method), exact(torch.rsqrt)) <= 1e-6
    assert reference.relative_error(A.function(torch.log, v, method), exact(torch.log)) <= 1e-6


def test_spectrum_serves_every_delta(problem, G):
    S = problem.operator(co.GGN).spectrum(probes=20, steps=80)
    for delta in (0.1, 1.0, 10.0):
        report = S.logdet(delta)
        assert abs(report.value - float(torch.logdet(damped(G, delta)))) <= 2 * report.half_width
    report = S.trace_of(lambda x: x)
    assert abs(report.value - float(G.trace())) <= 2 * report.half_width


def test_samples_have_the_inverse_as_covariance(few):
    M = damped(reference.ggn(few.model, reference.nll("classification"), few.x, few.y), 1.0)
    A = few.operator(co.GGN).add_diagonal(1.0)
    draws = co.Gaussian(torch.zeros(295).double(), A, generator=torch.Generator().manual_seed(0)).sample(4000)
    assert draws.shape == (4000, 295)
    covariance = torch.linalg.inv(M)
    ratio = draws.var(0) / covariance.diagonal()
    assert float((ratio.log().abs()).max()) < 5 * (2 / 4000) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 0.01


# ---------------------------------------------------------------- gradients


def test_gradients_of_logdet_and_solve(few):
    M = reference.ggn(few.model, reference.nll("classification"), few.x, few.y)
    b, w = randn(295), randn(295, seed=8)
    names = [name for name, _ in few.model.named_parameters()]
    log_deltas = torch.tensor([-1.0, 0.0, 0.5, -0.5], dtype=torch.float64)
    sizes = [p.numel() for p in few.model.parameters()]

    def by_operator(log_deltas: Tensor, scale: Tensor, method) -> Tensor:
        deltas = dict(zip(names, log_deltas.exp(), strict=True))
        A = (scale * few.operator(co.GGN)).add_diagonal(deltas)
        return A.logdet(method) + w @ A.solve(b, co.CG(rtol=1e-11))

    def by_hand(log_deltas: Tensor, scale: Tensor) -> Tensor:
        D = torch.cat([d.expand(n) for d, n in zip(log_deltas.exp(), sizes, strict=True)])
        A = scale * M + torch.diag(D)
        return torch.logdet(A) + w @ torch.linalg.solve(A, b)

    scale = torch.tensor(1.7, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (log_deltas, scale)]
    expected = torch.autograd.grad(by_hand(*inputs), inputs)
    for method in (None, co.Cholesky(), co.FunctionSpace()):
        found = torch.autograd.grad(by_operator(*inputs, method), inputs)
        for a, e in zip(found, expected, strict=True):
            assert reference.relative_error(a, e) <= 1e-7


# ---------------------------------------------------------------- float32


def test_float32_logdet_takes_the_twin_where_products_cannot_resolve_delta():
    rough, fine = Problem(torch.float32), Problem()
    M = reference.ggn(fine.model, reference.nll("classification"), fine.x, fine.y)
    norm, u = float(torch.linalg.matrix_norm(M, 2)), 2.0**-24
    A = rough.operator(co.GGN)
    small, large = 2 * u * norm, 100 * u * norm
    for delta, in_double in ((small, True), (large, False)):
        value, report = A.add_diagonal(delta).logdet(return_report=True)
        assert ("float64" in report.reason) == in_double
        twin = A.to(torch.float64).to_dense()  # the float32 parameters and data, to the last bit
        exact = float(torch.logdet(damped(twin, float(torch.tensor(delta).float()))))
        assert float(value) == pytest.approx(exact, rel=1e-6 if in_double else 2e-2)


def test_float32_solve_shows_its_true_residual():
    rough, fine = Problem(torch.float32), Problem()
    M = damped(reference.ggn(fine.model, reference.nll("classification"), fine.x, fine.y))
    b = randn(295).float()
    x, report = rough.operator(co.GGN).add_diagonal(DELTA).solve(b, return_report=True)
    true = float((b.double() - M @ x.double()).norm() / b.double().norm())
    assert report.converged
    assert true <= 2e-4  # the target, and the rounding of float32 parameters
