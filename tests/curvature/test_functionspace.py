"""Function space: one damping per parameter, what is kept, spectra by the Gram matrix, predictives without solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvops as co
from curvops.curvature.matrixfree.crossgram import functional_covariance
from curvops.curvature.matrixfree.layerdense import factors_are_cheap
from curvops.errors import ShapeError, StaleOperatorError, UnsupportedError
from curvops.operators.base import LinearOperator
from curvops.operators.functionspace import function_space
from curvops.testing.problems import problem

CHEAP = ["mlp", "mlp-weighted", "linear"]
SHARED = ["conv2d", "tokens"]
CURVATURES = {"GGN": co.GGN, "MCFisher": co.MCFisher, "EmpiricalFisher": co.EmpiricalFisher}


def build(name: str, kind: str = "GGN") -> tuple[nn.Module, object, LinearOperator]:
    p = problem(name)
    model, data = p.model(), p.data()
    return model, data, CURVATURES[kind](model, p.loss(), data, params=p.params)


def per_parameter(A: LinearOperator, *, requires_grad: bool = False) -> dict[str, Tensor]:
    assert A.layout is not None
    values = torch.linspace(0.3, 2.0, len(A.layout), dtype=torch.float64)
    return {name: v.clone().requires_grad_(requires_grad) for name, v in zip(A.layout, values, strict=True)}


def expanded(A: LinearOperator, delta: dict[str, Tensor]) -> Tensor:
    assert A.layout is not None
    return torch.cat([delta[name].detach().expand(where.stop - where.start) for name, where in A.layout.items()])


# -------------------------------------------------------------------- one damping per parameter


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", CHEAP)
def test_weighted_gram_and_its_gradient(name: str, kind: str) -> None:
    _, _, H = build(name, kind)
    assert H._weighs_parameters()
    B = H._factor().to_dense()
    weights = torch.linspace(0.5, 2.0, len(H.layout), dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([where.stop - where.start for where in H.layout.values()])
    G = H._weighted_gram(weights)
    expected = (B * weights.repeat_interleave(sizes)) @ B.T
    torch.testing.assert_close(G, expected, rtol=1e-11, atol=1e-12)
    M = torch.randn(G.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (got,) = torch.autograd.grad((M * G).sum(), weights)
    (want,) = torch.autograd.grad((M * expected).sum(), weights)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CHEAP + SHARED)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_logdet_and_gradient_with_one_damping_per_parameter(name: str, factor: float) -> None:
    _, _, H = build(name)
    c = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
    delta = per_parameter(H, requires_grad=True)
    value = (c * H).add_diagonal(delta).logdet(co.FunctionSpace())
    got = torch.autograd.grad(value, [c, *delta.values()])
    dense = c * H.to_dense() + torch.diag(torch.cat([delta[n].expand(w.stop - w.start) for n, w in H.layout.items()]))
    torch.testing.assert_close(value, dense.logdet(), rtol=1e-11, atol=1e-11)
    for one, other in zip(got, torch.autograd.grad(dense.logdet(), [c, *delta.values()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_one_damping_per_parameter_needs_no_row_of_every_parameter() -> None:
    model = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    x, y = torch.randn(12, 40, dtype=torch.float64), torch.arange(12) % 2
    H = co.GGN(model, "classification", (x, y), memory_budget=10**5)  # twice B would take 166 kB
    A = H.add_diagonal(per_parameter(H))
    form = function_space(A)
    assert form is not None
    assert form.is_affordable()
    assert not function_space(H.add_diagonal(expanded(H, per_parameter(H)))).is_affordable()
    dense = co.GGN(model, "classification", (x, y)).to_dense() + torch.diag(expanded(H, per_parameter(H)))
    torch.testing.assert_close(A.logdet(co.FunctionSpace()), torch.linalg.slogdet(dense)[1], rtol=1e-11, atol=0)


def test_logdet_ratio_is_the_difference_of_the_determinants() -> None:
    _, _, H = build("mlp")
    A, D = H.add_diagonal(0.3), co.Identity(H.shape[0], scale=0.3)
    torch.testing.assert_close(function_space(A).logdet_ratio(), A.logdet() - D.logdet(), rtol=1e-12, atol=1e-12)


def test_shared_weights_do_not_count_as_cheap() -> None:
    for name in SHARED:
        assert not factors_are_cheap(build(name)[2])


# -------------------------------------------------------------------- kept


def test_gram_and_factor_are_made_once_and_released() -> None:
    model, _, H = build("mlp")
    A = H.add_diagonal(0.5)
    first = A.logdet(co.FunctionSpace())
    gram, L = H._cache["gram"][1], A._cache["function space"][1]
    assert torch.equal(H.add_diagonal(0.7).logdet(co.FunctionSpace()), _fresh(model, 0.7))
    assert H._cache["gram"][1] is gram
    assert A.logdet(co.FunctionSpace()) == first
    assert A._cache["function space"][1] is L
    copy = H._gram().to_dense()
    copy.zero_()  # the user's own
    assert float(gram.abs().max()) > 0
    A.release()
    assert not H._cache
    assert not A._cache


def _fresh(model: nn.Module, delta: float) -> Tensor:
    p = problem("mlp")
    return co.GGN(model, p.loss(), p.data()).add_diagonal(delta).logdet(co.FunctionSpace())


def test_what_is_kept_follows_damping_and_notices_the_network() -> None:
    model, _, H = build("mlp")
    delta = torch.tensor(0.5, dtype=torch.float64)
    A = H.add_diagonal(delta)
    before = float(A.logdet(co.FunctionSpace()))
    delta.fill_(2.0)
    assert float(A.logdet(co.FunctionSpace())) == pytest.approx(float(_fresh(model, 2.0)), rel=1e-13)
    assert float(A.logdet(co.FunctionSpace())) != before
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(StaleOperatorError):
        A.logdet(co.FunctionSpace())


def test_a_gram_matrix_beyond_a_quarter_of_the_budget_is_not_kept() -> None:
    p = problem("mlp")
    n = co.Gram(p.model(), p.loss(), p.data()).shape[0]
    H = co.GGN(p.model(), p.loss(), p.data(), memory_budget=4 * 8 * n**2 - 1)
    H._gram()._dense_kept()
    assert "gram" not in H._cache


# -------------------------------------------------------------------- spectra


def wide() -> tuple[co.GGN, Tensor]:
    """A curvature with fewer rows than parameters, and its eigenvalues."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
    x = torch.randn(15, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    H = co.GGN(model, "classification", (x, torch.arange(15) % 3))
    return H, torch.linalg.eigvalsh(H.to_dense())


QUESTIONS = {
    "logdet": (lambda s: s.logdet(0.1), lambda e: (e + 0.1).log().sum()),
    "effective dimension": (lambda s: s.effective_dimension(0.1), lambda e: (e / (e + 0.1)).sum()),
    "trace": (lambda s: s.trace_of(lambda x: x), lambda e: e.sum()),
    "count with zeros": (lambda s: s.count((-1.0, 1.0)), lambda e: ((e > -1) & (e < 1)).sum()),
    "count without": (lambda s: s.count((0.5, 99.0)), lambda e: (e > 0.5).sum()),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_exact_spectrum_answers_without_error(question: str) -> None:
    H, values = wide()
    spectrum = H.spectrum(method=co.Eigh())
    assert spectrum.zeros == H.shape[0] - 30
    ask, expected = QUESTIONS[question]
    report = ask(spectrum)
    assert report.value == pytest.approx(float(expected(values)), rel=1e-9)
    assert report.stderr == 0
    assert report.half_width < 1e-6
    assert torch.allclose(spectrum.weights.sum(1), torch.tensor(float(H.shape[0]), dtype=torch.float64))
    assert bool((spectrum.nodes.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("question", QUESTIONS)
def test_spectrum_in_function_space_covers_the_truth(question: str) -> None:
    H, values = wide()
    ask, expected = QUESTIONS[question]
    inside = 0
    for seed in range(20):
        report = ask(H.spectrum(8, 30, co.FunctionSpace(), generator=torch.Generator().manual_seed(seed)))
        inside += abs(report.value - float(expected(values))) <= report.half_width + 1e-9
    assert inside >= 17


def test_full_depth_in_function_space_is_less_noisy_than_in_parameter_space() -> None:
    H, values = wide()
    truth = float((values + 0.01).log().sum())
    errors = {None: 0.0, co.FunctionSpace(): 0.0}
    for method in errors:
        for seed in range(8):
            s = H.spectrum(4, 40, method, generator=torch.Generator().manual_seed(seed))
            errors[method] += (s.logdet(0.01).value - truth) ** 2
    assert errors[co.FunctionSpace()] < errors[None]


def test_evidence_from_the_exact_spectrum() -> None:
    H, values = wide()
    mean = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64)
    spectrum = H.spectrum(method=co.Eigh())
    deltas = torch.logspace(-2, 2, 400, dtype=torch.float64)
    P = H.shape[0]
    expected = torch.stack(
        [-3.0 - 0.5 * d * mean.square().sum() + 0.5 * P * d.log() - 0.5 * (values + d).log().sum() for d in deltas]
    )
    curve = spectrum.evidence_curve(3.0, mean, deltas)
    torch.testing.assert_close(curve.value, expected, rtol=1e-9, atol=1e-7)
    assert bool((curve.stderr == 0).all())
    best = spectrum.optimal_prior_precision(3.0, mean)
    assert best.converged
    assert best.stderr == 0
    assert best.value == pytest.approx(float(deltas[expected.argmax()]), rel=0.03)
    through = H.spectrum(30, 30, co.FunctionSpace()).evidence_curve(3.0, mean, deltas)
    assert bool(((through.value - expected).abs() <= 1.5 * through.half_width + 1e-9).all())
    density = spectrum.density(torch.linspace(-1, 5, 800, dtype=torch.float64), width=0.05)
    assert float(torch.trapezoid(density.value, torch.linspace(-1, 5, 800, dtype=torch.float64))) == pytest.approx(
        float((values < 5).sum()), abs=0.6
    )


def test_eigenvalues_of_a_hessian_bound_themselves() -> None:
    p = problem("mlp")
    A = co.Hessian(p.model(), p.likelihood, p.data())
    values = torch.linalg.eigvalsh(A.to_dense())
    shift = 1.0 - float(values[0])
    report = A.spectrum(method=co.Eigh()).logdet(shift)
    assert report.value == pytest.approx(float((values + shift).log().sum()), rel=1e-10)


def test_spectra_refuse_methods_they_cannot_use() -> None:
    p = problem("mlp")
    with pytest.raises(UnsupportedError, match="Leave method out"):
        co.Hessian(p.model(), p.likelihood, p.data()).spectrum(method=co.FunctionSpace())
    with pytest.raises(UnsupportedError, match="FunctionSpace, Eigh"):
        co.GGN(p.model(), p.likelihood, p.data()).spectrum(method=co.CG())


# -------------------------------------------------------------------- predictives


def dampings(H: LinearOperator) -> dict[str, LinearOperator]:
    named = per_parameter(H)
    return {
        "scalar": H.add_diagonal(0.4),
        "scaled": (2.5 * H).add_diagonal(0.4),
        "per parameter": (0.7 * H).add_diagonal(named),
        "diagonal": H.add_diagonal(torch.linspace(0.3, 2, H.shape[0], dtype=torch.float64)),
    }


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("damping", ["scalar", "scaled", "per parameter", "diagonal"])
@pytest.mark.parametrize("name", CHEAP + SHARED)
def test_predictive_covariance_equals_the_dense_formula(name: str, damping: str, joint: bool) -> None:
    model, data, H = build(name)
    A = dampings(H)[damping]
    J = co.Jacobian(model, data, params=problem(name).params)
    rows = J.to_dense()
    dense = rows @ torch.linalg.inv(A.to_dense()) @ rows.T
    mean, covariance, report = co.Gaussian(torch.zeros(H.shape[0], dtype=torch.float64), A).predictive(
        J, joint=joint, return_report=True
    )
    N = mean.shape[0]
    E = mean.numel() // N
    expected = dense if joint else torch.stack([dense[i * E : (i + 1) * E, i * E : (i + 1) * E] for i in range(N)])
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)
    assert report.algorithm


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_predictive_by_layers_equals_the_dense_formula(joint: bool, scale: float) -> None:
    H, _ = wide()
    A = (scale * H).add_diagonal(per_parameter(H))
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = H.objective.model
    J = co.Jacobian(model, [(x[:30], torch.zeros(30)), (x[30:], torch.zeros(10))])
    got = functional_covariance(J, function_space(A), joint=joint)
    assert got is not None
    rows = J.to_dense()
    dense = rows @ torch.linalg.inv(A.to_dense()) @ rows.T
    expected = dense if joint else dense.reshape(40, 3, 40, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    before = H.matvec_count
    _, covariance, report = co.Gaussian(torch.zeros(H.shape[0], dtype=torch.float64), A).predictive(
        J, joint=joint, return_report=True
    )
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-11)
    assert "Woodbury" in report.algorithm
    assert H.matvec_count == before  # no product with the curvature


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_covariance_of_given_rows_and_its_gradient(shape: tuple[int, ...]) -> None:
    _, _, H = build("mlp")
    A = H.add_diagonal(0.4)
    posterior = co.Gaussian(torch.zeros(H.shape[0], dtype=torch.float64), A)
    rows = torch.randn(*shape, H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows.requires_grad_()
    covariance, report = posterior.functional_covariance(rows, return_report=True)
    expected = rows @ torch.linalg.inv(A.to_dense()) @ rows.transpose(-1, -2)
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=1e-11)
    assert report.converged
    weights = torch.linspace(0, 1, covariance.numel(), dtype=torch.float64).view_as(covariance)
    (got,) = torch.autograd.grad((covariance * weights).sum(), rows)
    (want,) = torch.autograd.grad((expected * weights).sum(), rows)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    with pytest.raises(ShapeError, match="got rows"):
        posterior.functional_covariance(rows[..., :-1])


def test_iterated_predictives_report_the_residual_of_every_row() -> None:
    model, data, H = build("mlp")
    P = H.shape[0]
    # A sum of two curvatures has no function-space form; beyond the dense limit its rows would be solved for by CG.
    A = (H + co.EmpiricalFisher(model, problem("mlp").loss(), data)).add_diagonal(0.5)
    posterior = co.Gaussian(torch.zeros(P, dtype=torch.float64), A)
    J = co.Jacobian(model, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curvops.posterior.dense_is_affordable", lambda A: False)
        mean, covariance, report = posterior.predictive(J, return_report=True)
    assert isinstance(report, co.SolveReport)
    assert report.residual.shape == (mean.numel(),)
    assert report.worst_residual <= 1e-6
    rows = J.to_dense()
    dense = rows @ torch.linalg.inv(A.to_dense()) @ rows.T
    C = mean.shape[1]
    torch.testing.assert_close(covariance[1], dense[C : 2 * C, C : 2 * C], rtol=1e-5, atol=1e-8)
