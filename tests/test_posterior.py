"""`Gaussian`: every sampling route draws from N(0, A⁻¹); densities, predictives and evidence match dense formulas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import curvops as co
from curvops.errors import NotPositiveDefiniteError, NumericalWarning, ShapeError, UnsupportedError
from curvops.operators.base import LinearOperator
from curvops.testing import problems

DELTA = 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Net:
    """One of the zoo's networks with what is asked of it."""

    def __init__(self, name: str = "mlp") -> None:
        p = problems.problem(name)
        self.model, self.data, self.likelihood = p.model(), p.data(), p.likelihood
        self.mean = co.flatten({n: q.detach() for n, q in self.model.named_parameters()})

    def __call__(self, kind: Callable[..., LinearOperator], **options: object) -> LinearOperator:
        return kind(self.model, self.likelihood, self.data, **options)

    def jacobian(self) -> co.Jacobian:
        return co.Jacobian(self.model, self.data)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


def spd(size: int, seed: int = 0) -> Tensor:
    B = normal(size, size, seed=seed)
    return B @ B.T / size + 0.3 * torch.eye(size, dtype=torch.float64)


def structured() -> dict[str, LinearOperator]:
    """Precisions with a closed form, twelve by twelve."""
    d = torch.linspace(0.5, 3.0, 12, dtype=torch.float64)
    U = normal(12, 3, seed=3)
    return {
        "dense": co.Dense(spd(12), is_symmetric=True),
        "diagonal": co.Diagonal(d),
        "identity": co.Identity(12).add_diagonal(1.5),
        "kronecker": co.Kronecker(co.Dense(spd(3), is_symmetric=True), co.Dense(spd(4, 1), is_symmetric=True)),
        "kronecker + δI": co.Kronecker(
            co.Dense(spd(3), is_symmetric=True), co.Dense(spd(4, 1), is_symmetric=True)
        ).add_diagonal(0.7),
        "low rank + δI": co.LowRank(U).add_diagonal(0.4),
        "low rank + diagonal": co.LowRank(U).add_diagonal(d),
        "blocks": co.BlockDiagonal(co.Dense(spd(5), is_symmetric=True), co.Diagonal(d[:7])),
    }


def assert_law(draws: Tensor, covariance: Tensor) -> None:
    """`(n, P)` draws of mean zero have that covariance: entries within the errors of n draws, pooled and at worst."""
    n, size = draws.shape
    L = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(L, draws.T, upper=False)
    S = white @ white.T / n - torch.eye(size, dtype=torch.float64)
    # Entries of a Wishart matrix about I: variance 1/n off the diagonal, 2/n on it.
    z = S * math.sqrt(n)
    z[torch.arange(size), torch.arange(size)] /= math.sqrt(2)
    pairs = z[torch.triu(torch.ones_like(z)) == 1]
    assert abs(float(pairs.square().mean()) - 1) < 6 * math.sqrt(2 / len(pairs))
    assert float(pairs.abs().max()) < 5.5
    assert float((white.mean(1) * math.sqrt(n)).abs().max()) < 5


@pytest.mark.parametrize("name", structured())
def test_structured_precisions_draw_exactly(name: str) -> None:
    A = structured()[name]
    posterior = co.Gaussian(torch.zeros(12, dtype=torch.float64), A, generator=seeded())
    draws, report = posterior.sample(20_000, return_report=True)
    assert report.converged
    assert_law(draws, torch.linalg.inv(A.to_dense()))


METHODS = [
    None,
    co.Cholesky(),
    co.Eigh(),
    co.FunctionSpace(),
    co.PerturbAndSolve(rtol=1e-4),
    co.Lanczos(),
    co.Lanczos(steps=40),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_route_draws_from_the_same_law(net: Net, method: object) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    posterior = co.Gaussian(net.mean, A, generator=seeded(1))
    draws, report = posterior.sample(4_000, method, return_report=True)
    assert draws.shape == (4_000, len(net.mean))
    assert report.converged
    assert_law(draws - net.mean, torch.linalg.inv(A.to_dense()))


def sums(net: Net) -> dict[str, LinearOperator]:
    """Sums of curvatures with factors and a diagonal, scalar, vector and by name."""
    size = len(net.mean)
    D = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
    ggn, U = net(co.GGN), normal(size, 3, seed=4)
    return {
        "MC Fisher + δI": net(co.MCFisher, num_samples=2).add_diagonal(DELTA),
        "empirical Fisher + D": net(co.EmpiricalFisher).add_diagonal(D),
        "GGN + dict": ggn.add_diagonal({name: 0.5 + i for i, name in enumerate(ggn.layout or {})}),
        "c·GGN + empirical Fisher + low rank + D": 2.0 * ggn + net(co.EmpiricalFisher) + co.LowRank(U) + co.Diagonal(D),
    }


@pytest.mark.parametrize(
    "name", ["MC Fisher + δI", "empirical Fisher + D", "GGN + dict", "c·GGN + empirical Fisher + low rank + D"]
)
def test_perturb_and_solve_takes_sums_of_curvatures(net: Net, name: str) -> None:
    A = sums(net)[name]
    posterior = co.Gaussian(torch.zeros_like(net.mean), A, generator=seeded(2))
    draws, report = posterior.sample(3_000, co.PerturbAndSolve(rtol=1e-4), return_report=True)
    assert report.algorithm == "PerturbAndSolve"
    assert float(report.residual.max()) <= 1e-4
    assert_law(draws, torch.linalg.inv(A.to_dense()))


def test_perturb_and_solve_takes_kronecker_and_diagonal_terms() -> None:
    K = co.Kronecker(co.Dense(spd(3), is_psd=True), co.Dense(spd(4, 1), is_psd=True))
    A = K + co.LowRank(normal(12, 2)) + co.Diagonal(torch.linspace(0.5, 2, 12, dtype=torch.float64))
    draws = co.Gaussian(torch.zeros(12, dtype=torch.float64), A, generator=seeded()).sample(
        20_000, co.PerturbAndSolve(rtol=1e-4)
    )
    assert_law(draws, torch.linalg.inv(A.to_dense()))


def test_function_space_with_a_diagonal_prior_is_exact() -> None:
    net = Net("mlp")
    D = torch.linspace(0.5, 2.0, len(net.mean), dtype=torch.float64)
    A = net(co.GGN).add_diagonal(D)
    draws, report = co.Gaussian(torch.zeros_like(net.mean), A, generator=seeded(5)).sample(
        4_000, co.FunctionSpace(), return_report=True
    )
    assert "Matheron" in report.algorithm
    assert_law(draws, torch.linalg.inv(A.to_dense()))


def test_draws_are_fresh_and_a_generator_repeats_them(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    state = torch.random.get_rng_state()
    posterior = co.Gaussian(net.mean, A, generator=seeded(3))
    first, second = posterior.sample(2), posterior.sample(2)
    assert not torch.equal(first, second)
    assert torch.equal(first, co.Gaussian(net.mean, A, generator=seeded(3)).sample(2))
    assert not torch.equal(co.Gaussian(net.mean, A).sample(2), co.Gaussian(net.mean, A).sample(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_choice_is_askable(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    posterior = co.Gaussian(net.mean, A)
    before = A.matvec_count
    answer = posterior.explain()
    assert answer.startswith("sample: ")
    assert A.matvec_count == before
    assert "closed form" in co.Gaussian(net.mean, co.Diagonal(torch.ones_like(net.mean))).explain()


def test_perturb_and_solve_says_what_it_needs() -> None:
    A = co.Dense(spd(6), is_symmetric=True)
    with pytest.raises(UnsupportedError, match="factors"):
        co.Gaussian(torch.zeros(6, dtype=torch.float64), A).sample(1, co.PerturbAndSolve())


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_count_of_draws_is_a_whole_number(n: object) -> None:
    posterior = co.Gaussian(torch.zeros(3, dtype=torch.float64), co.Identity(3))
    with pytest.raises(ValueError, match="at least 1"):
        posterior.sample(n)  # pyright: ignore[reportArgumentType]


def test_mean_and_precision_must_fit(net: Net) -> None:
    with pytest.raises(ShapeError, match="mean has shape"):
        co.Gaussian(torch.zeros(3, dtype=torch.float64), co.Identity(4))
    with pytest.raises(ShapeError, match=r"Jacobian\(model, data\)"):
        co.Gaussian(net.mean, net(co.GGN).add_diagonal(1.0)).predictive(net(co.GGN))  # pyright: ignore


# ---------------------------------------------------------------- densities and evidence


def test_densities_match_the_dense_formulas(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    M = A.to_dense()
    posterior = co.Gaussian(net.mean, A)
    X = net.mean + normal(4, len(net.mean), seed=6)
    reference = torch.distributions.MultivariateNormal(net.mean, precision_matrix=M)
    torch.testing.assert_close(posterior.log_prob(X), reference.log_prob(X), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.log_prob(X[0]), reference.log_prob(X[0]), rtol=1e-10, atol=1e-10)
    variance = posterior.marginal_variance()
    torch.testing.assert_close(variance, torch.linalg.inv(M).diagonal(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", ["scalar", "vector", "dict"])
def test_log_evidence_matches_the_dense_formula(net: Net, prior: str) -> None:
    H = net(co.GGN)
    size = len(net.mean)
    layout = dict(H.layout or {})
    deltas = {name: 0.5 + 0.3 * i for i, name in enumerate(layout)}
    D = {
        "scalar": torch.full((size,), DELTA, dtype=torch.float64),
        "vector": torch.linspace(0.5, 2.0, size, dtype=torch.float64),
        "dict": torch.cat(
            [torch.full((layout[n].stop - layout[n].start,), d, dtype=torch.float64) for n, d in deltas.items()]
        ),
    }[prior]
    given = {"scalar": DELTA, "vector": D, "dict": deltas}[prior]
    centre = 0.1 * normal(size, seed=7)
    loss = torch.tensor(3.0, dtype=torch.float64)
    value, report = co.Gaussian(net.mean, H.add_diagonal(given)).log_evidence(
        loss, given, prior_mean=centre, log_normaliser=1.5, return_report=True
    )
    M = H.to_dense() + torch.diag(D)
    gap = net.mean - centre
    expected = -3.0 - 1.5 - 0.5 * (gap * D * gap).sum() + 0.5 * D.log().sum() - 0.5 * torch.logdet(M)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert report.value == pytest.approx(float(expected), rel=1e-10)
    assert report.half_width == 0


def test_log_evidence_halves_the_uncertainty_of_the_logdet(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    exact = co.Gaussian(net.mean, A).log_evidence(3.0, DELTA)
    method = co.SLQ(probes=10, steps=8)
    _, inner = A.logdet(method, return_report=True)
    value, report = co.Gaussian(net.mean, A).log_evidence(3.0, DELTA, method=method, return_report=True)
    assert report.half_width == pytest.approx(inner.half_width / 2)
    assert report.bracket[0] <= float(value) <= report.bracket[1]
    assert abs(float(value) - float(exact)) <= report.half_width


def test_log_evidence_is_differentiable_in_the_prior(net: Net) -> None:
    H = co.Dense(net(co.GGN).to_dense(), is_symmetric=True)

    def evidence(delta: Tensor) -> Tensor:
        return co.Gaussian(net.mean, H.add_diagonal(delta)).log_evidence(3.0, delta)

    delta = torch.tensor(DELTA, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(evidence, (delta,))
    D = torch.linspace(0.5, 2.0, len(net.mean), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(evidence, (D,))


# ---------------------------------------------------------------- predictive


@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_predictive_matches_the_dense_covariance(name: str) -> None:
    net = Net(name)
    A = net(co.GGN).add_diagonal(DELTA)
    J = net.jacobian()
    mean, covariance = co.Gaussian(net.mean, A).predictive(J)
    n = mean.shape[0]
    event = mean[0].numel()
    rows = J.to_dense().reshape(n, event, -1)
    expected = rows @ torch.linalg.inv(A.to_dense()) @ rows.transpose(1, 2)
    assert covariance.shape == (n, event, event)
    torch.testing.assert_close(mean, net.model(net.data[0]).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)


def test_predictive_goes_through_rows_in_chunks(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    whole = co.Gaussian(net.mean, A).predictive(net.jacobian())
    tight = co.Jacobian(net.model, net.data, memory_budget=60_000)
    assert len(list(tight.row_blocks())) > 1
    chunked = co.Gaussian(net.mean, A).predictive(tight)
    torch.testing.assert_close(chunked[1], whole[1], rtol=1e-10, atol=1e-12)


def test_predictive_from_samples_agrees_within_their_error(net: Net) -> None:
    A = net(co.GGN).add_diagonal(DELTA)
    n = 20_000
    _, exact = co.Gaussian(net.mean, A).predictive(net.jacobian())
    _, estimate = co.Gaussian(net.mean, A, generator=seeded(9)).predictive(net.jacobian(), samples=n)
    d = exact.diagonal(dim1=1, dim2=2)
    stderr = ((d[:, :, None] * d[:, None, :] + exact**2) / n).sqrt()
    assert float(((estimate - exact) / stderr).abs().max()) < 5


def test_iterative_precisions_predict_to_the_solvers_residual() -> None:
    """A precision without factors, gram or affordable copy goes through CG."""
    net = Net("mlp")
    M = net(co.GGN).add_diagonal(DELTA).to_dense()
    size = len(M)
    A = co.Closure(lambda V: M @ V, (size, size), batched=True, is_psd=True, lower_bound=DELTA)
    A.memory_budget = 1  # nothing dense is affordable
    mean, covariance = co.Gaussian(net.mean, A).predictive(net.jacobian())
    rows = net.jacobian().to_dense().reshape(*mean.shape, size)
    expected = rows @ torch.linalg.inv(M) @ rows.transpose(1, 2)
    torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-6)
    assert A.matvec_count > 0


# ---------------------------------------------------------------- refusals


def test_an_indefinite_precision_is_refused_with_the_damping_that_does(net: Net) -> None:
    H = net(co.Hessian)
    posterior = co.Gaussian(net.mean, H)
    low = float(torch.linalg.eigvalsh(H.to_dense())[0])
    assert low < 0
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue") as refusal:
        posterior.sample(2)
    assert f"{-low:.3g}" in str(refusal.value)
    damped = H.add_diagonal(1.01 * -low)
    draws = co.Gaussian(net.mean, damped, generator=seeded()).sample(3_000)
    assert_law(draws - net.mean, torch.linalg.inv(damped.to_dense()))


def test_a_truncated_curvature_says_what_it_leaves_to_the_prior() -> None:
    U = torch.linalg.qr(normal(20, 3))[0]
    kept = torch.tensor([9.0, 5.0, 2.0], dtype=torch.float64)
    mean = torch.zeros(20, dtype=torch.float64)
    cut = co.LowRank(U, kept, captured=0.8)
    with pytest.warns(NumericalWarning, match="raise the rank"):
        co.Gaussian(mean, cut.add_diagonal(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        co.Gaussian(mean, cut.add_diagonal(3.0))  # the prior dominates what was cut off
        co.Gaussian(mean, co.LowRank(U, kept, captured=1.0).add_diagonal(0.1))  # nothing was


def test_float32_precisions_sample_in_float32() -> None:
    p = problems.problem("mlp")
    model, data = p.model(torch.float32), p.data(torch.float32)
    mean = co.flatten({n: q.detach() for n, q in model.named_parameters()})
    A = co.GGN(model, p.likelihood, data).add_diagonal(DELTA)
    draws = co.Gaussian(mean, A, generator=seeded()).sample(4_000, co.PerturbAndSolve(rtol=1e-3))
    assert draws.dtype == torch.float32
    assert_law((draws - mean).double(), torch.linalg.inv(A.to_dense().double()))
