"""`MatrixFreeLaplace`: the numbers of laplace-torch's `FullLaplace`, by operators; the user's model left alone."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvops as co
from curvops.errors import DataError, NumericalWarning, ShapeError, UnsupportedError

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:By default `link_approx`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _known() -> None:
    """The import makes "matrix_free" known to `laplace.Laplace`."""
    import curvops.interop.laplace  # noqa: F401


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(
    outputs: int = 3, dtype: torch.dtype = torch.float64, hidden: int = 6, middle: nn.Module | None = None
) -> Any:
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), middle or nn.Identity(), nn.Linear(hidden, outputs))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(i)))
    return model.to(dtype)


def tensors(likelihood: str, outputs: int = 3, count: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, dtype=torch.float64, generator=seeded(7))
    if likelihood == "classification":
        return x, torch.arange(count) % outputs
    return x, torch.randn(count, outputs, dtype=torch.float64, generator=seeded(8))


def loader(likelihood: str, outputs: int = 3, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*tensors(likelihood, outputs)), **{"batch_size": 8, **options})


def made(structure: str, likelihood: str, model: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    from laplace import Laplace

    import curvops.interop.laplace as ours

    outputs = 2 if likelihood == "regression" else 3
    la = Laplace(
        network(outputs) if model is None else model, likelihood, "all", structure,
        **{"backend": ours.NativeGGN, **options},
    )  # fmt: skip
    la.fit(loader(likelihood, outputs) if data is None else data)
    return la


def both(likelihood: str, **options: Any) -> tuple[Any, Any]:
    return made("matrix_free", likelihood, **options), made("full", likelihood, **options)


def priors(likelihood: str) -> dict[str, dict[str, Any]]:
    size = sum(p.numel() for p in network(2 if likelihood == "regression" else 3).parameters())
    d = torch.float64
    return {
        "scalar": {"prior_precision": 0.7},
        "layerwise": {"prior_precision": torch.tensor([0.3, 1.0, 2.0, 0.5], dtype=d)},
        "diagonal": {
            "prior_precision": torch.linspace(0.2, 3.0, size, dtype=d),
            "prior_mean": torch.linspace(-0.5, 0.5, size, dtype=d),
            "temperature": 0.6,
        },
        "with a mean, cold": {"prior_precision": 0.4, "prior_mean": 0.3, "temperature": 1.7},
    }


CASES = [(likelihood, name) for likelihood in ("regression", "classification") for name in priors("regression")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    likelihood, name = request.param
    options = priors(likelihood)[name]
    if likelihood == "regression":
        options["sigma_noise"] = 0.6
    return both(likelihood, **options)


def close(one: Any, other: Any, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=rtol, atol=atol)


# -------------------------------------------------------------------- same numbers


def test_every_number_is_that_of_full_laplace(pair: tuple[Any, Any]) -> None:
    ours, full = pair
    assert type(ours).__name__ == "MatrixFreeLaplace"
    close(ours.posterior_precision.to_dense(), full.posterior_precision)
    close(ours.posterior_covariance.to_dense(), full.posterior_covariance)
    numbers = ["log_likelihood", "scatter", "log_det_prior_precision", "log_det_posterior_precision", "log_det_ratio"]
    for name in numbers:
        close(getattr(ours, name), getattr(full, name))
    close(ours.log_marginal_likelihood(), full.log_marginal_likelihood())
    for name in ("log_det_posterior_precision", "log_det_ratio", "log_marginal_likelihood"):
        assert ours.reports[name].half_width == 0
    assert ours.reports["log_marginal_likelihood"].value == float(ours.log_marginal_likelihood())
    value = full.mean + 0.1
    close(ours.square_norm(value), full.square_norm(value))
    close(
        ours.square_norm(torch.stack([value, full.mean])), torch.stack([full.square_norm(value), value.new_zeros(())])
    )
    for normalized in (True, False):
        close(ours.log_prob(value, normalized), full.log_prob(value, normalized))
    assert ours.reports["log_prob"].value == pytest.approx(float(full.log_prob(value)))


def test_every_prediction_is_that_of_full_laplace(pair: tuple[Any, Any]) -> None:
    ours, full = pair
    x = torch.randn(5, 2, dtype=torch.float64, generator=seeded(3))
    Js, _ = full.backend.jacobians(x)
    close(ours.functional_variance(Js), full.functional_variance(Js))
    close(ours.functional_covariance(Js), full.functional_covariance(Js))
    if ours.likelihood == "classification":
        for link in ("probit", "bridge", "bridge_norm"):
            close(ours(x, link_approx=link), full(x, link_approx=link))
    else:
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            for one, other in zip(ours(x, **options), full(x, **options), strict=True):
                close(one, other)
    assert ours.reports["predictive"].converged
    assert ours.reports["functional_variance"].algorithm


def test_gradients_reach_prior_precision_and_noise(pair: tuple[Any, Any]) -> None:
    ours, full = pair
    found = []
    for la in (ours, full):
        delta = la.prior_precision.clone().requires_grad_()
        sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True) if la.likelihood == "regression" else None
        value = la.log_marginal_likelihood(delta, sigma)
        found.append([value, *torch.autograd.grad(value, [delta] if sigma is None else [delta, sigma])])
    for one, other in zip(*found, strict=True):
        close(one, other, rtol=1e-7)


def test_a_number_asked_under_no_grad_does_not_cut_later_gradients() -> None:
    la = made("matrix_free", "regression")
    delta = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = la.log_marginal_likelihood(delta)
    value = la.log_marginal_likelihood()
    close(value, plain)
    (gradient,) = torch.autograd.grad(value, delta)
    assert float(gradient.abs()) > 0


def test_prior_precision_and_noise_may_be_written_in_place_too() -> None:
    ours, full = both("regression")
    before = float(ours.log_marginal_likelihood())
    for la in (ours, full):
        la.prior_precision.mul_(3.0)
        la.sigma_noise.fill_(0.5)
    assert float(ours.log_marginal_likelihood()) != before
    close(ours.log_marginal_likelihood(), full.log_marginal_likelihood())


# -------------------------------------------------------------------- prior precision


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_marginal_likelihood_goes_to_the_maximum_from_one_spectrum(likelihood: str) -> None:
    options = {"sigma_noise": 0.5} if likelihood == "regression" else {"temperature": 0.4}
    ours, full = both(likelihood, **options)
    ours.optimize_prior_precision()
    best, report = ours.prior_precision, ours.reports["optimize_prior_precision"]
    assert report.value == pytest.approx(float(best))
    assert report.half_width < 1e-6 * float(best)
    delta = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(full.log_marginal_likelihood(delta), delta)
    assert abs(float(slope * best)) < 1e-4  # d evidence / d log δ
    spectrum = ours.spectrum()
    ours.sigma_noise = ours.sigma_noise
    ours.temperature = 2.0
    ours.optimize_prior_precision()
    assert ours.spectrum() is spectrum
    full.temperature = 2.0
    best = ours.prior_precision
    delta = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(full.log_marginal_likelihood(delta), delta)
    assert abs(float(slope * best)) < 1e-4


@pytest.mark.parametrize("road", ["Gram matrix", "products"])
def test_the_spectra_of_large_problems_find_the_same_maximum(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvops.interop.laplace.matrixfree.MAX_DENSE", 1)
    if road == "products":
        monkeypatch.setattr("curvops.interop.laplace.matrixfree.MAX_ROWS", 1)
    x, y = tensors("regression", 2, count=9)  # 18 rows, 32 parameters
    exact = made("matrix_free", "regression", data=[(x, y)])
    with monkeypatch.context() as patch:
        patch.setattr("curvops.interop.laplace.matrixfree.MAX_DENSE", 4096)
        exact.optimize_prior_precision()
    la = made("matrix_free", "regression", data=[(x, y)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # ten probes leave more than 10 %
        la.optimize_prior_precision()
    spectrum, report = la.spectrum(), la.reports["optimize_prior_precision"]
    assert not spectrum.is_exact
    assert spectrum.zeros == (14 if road == "Gram matrix" else 0)
    assert abs(report.value - float(exact.prior_precision)) <= 1.5 * report.half_width
    assert la.spectrum() is spectrum


def test_release_drops_what_is_made_again_at_need() -> None:
    la = made("matrix_free", "regression")
    value = la.log_marginal_likelihood()
    la.release()
    assert la._made is None
    assert not la.H._cache
    close(la.log_marginal_likelihood(), value)


@pytest.mark.parametrize("structure", ["layerwise", "diag"])
def test_other_structures_take_the_same_steps(structure: str) -> None:
    ours, full = both("classification")
    for la in (ours, full):
        la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=8)
    assert len(ours.prior_precision) == (4 if structure == "layerwise" else ours.n_params)
    close(ours.prior_precision, full.prior_precision, rtol=1e-7)


def test_grid_search_chooses_the_same() -> None:
    def miscalibration(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        return (variance.diagonal(dim1=1, dim2=2).sum(1) - 1).abs().mean()

    ours, full = both("regression")
    for la in (ours, full):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=loader("regression", 2), grid_size=6, log_prior_prec_min=-2,
            log_prior_prec_max=1, loss=miscalibration,
        )  # fmt: skip
    close(ours.prior_precision, full.prior_precision)


def test_a_maximum_at_the_bounds_is_said() -> None:
    la = made("matrix_free", "classification")
    la.mean = torch.zeros_like(la.mean)  # nothing speaks for a wide prior
    with pytest.warns(NumericalWarning, match="at the end"):
        la.optimize_prior_precision()
    assert not la.reports["optimize_prior_precision"].converged
    with pytest.warns(UserWarning, match="val_loader"), pytest.warns(NumericalWarning):
        la.optimize_prior_precision(val_loader=loader("classification"))


def test_marglik_training_runs_on_it() -> None:
    from laplace.marglik_training import marglik_training

    import curvops.interop.laplace as ours

    def trained(structure: str) -> tuple[Any, list[float]]:
        la, _, margliks, _ = marglik_training(
            network(2), loader("regression", 2), "regression", structure, ours.NativeGGN, n_epochs=3, n_hypersteps=2,
            prior_structure="layerwise",
        )  # fmt: skip
        return la, margliks

    (la, margliks), (full, expected) = trained("matrix_free"), trained("full")
    close(margliks, expected, rtol=1e-6)
    close(la.prior_precision, full.prior_precision, rtol=1e-6)
    close(la.sigma_noise, full.sigma_noise, rtol=1e-6)


# -------------------------------------------------------------------- draws


def test_samples_have_the_law_of_the_posterior() -> None:
    ours, full = both("classification", prior_precision=2.0)
    samples = ours.sample(4000, seeded(1))
    assert samples.shape == (4000, ours.n_params)
    assert ours.reports["sample"].algorithm
    scale = torch.linalg.cholesky(full.posterior_precision)
    white = (samples - full.mean) @ scale
    assert float(white.mean(0).abs().max()) * math.sqrt(4000) < 5
    assert float((white.T @ white / 4000 - torch.eye(ours.n_params)).abs().max()) * math.sqrt(4000) < 7


def test_draws_come_from_the_generator_given_or_the_own_one() -> None:
    x = tensors("classification")[0][:3]
    la = made("matrix_free", "classification", generator=seeded(5))
    twin = made("matrix_free", "classification", generator=seeded(5))
    asks = [
        lambda la, g: la.sample(2, g),
        lambda la, g: la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=g),
        lambda la, g: la(x, link_approx="mc", n_samples=3, generator=g),
        lambda la, g: la.predictive_samples(x, n_samples=3, generator=g),
        lambda la, g: la.predictive_samples(x, pred_type="nn", n_samples=3, generator=g),
        lambda la, g: la.functional_samples(x, n_samples=3, generator=g),
    ]
    before = torch.get_rng_state()
    for ask in asks:
        assert torch.equal(ask(la, seeded(2)), ask(la, seeded(2)))
        own = ask(la, None)
        assert torch.equal(own, ask(twin, None))
        assert not torch.equal(own, ask(la, None))
        ask(twin, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_networks_predict_as_laplace_does() -> None:
    ours, full = both("classification", prior_precision=50.0)
    x = tensors("classification")[0][:4]
    one = ours(x, pred_type="nn", link_approx="mc", n_samples=3000, generator=seeded(0))
    torch.manual_seed(0)
    other = full(x, pred_type="nn", link_approx="mc", n_samples=3000)
    close(one, other, rtol=0, atol=0.02)
    close(one.sum(-1), torch.ones(4, dtype=torch.float64))
    ours, full = both("regression", prior_precision=50.0)
    mean, variance = ours(x, pred_type="nn", link_approx="mc", n_samples=3000, generator=seeded(0))
    _, linearised = ours(x)
    assert mean.shape == variance.shape == (4, 2)
    close(variance, linearised.diagonal(dim1=1, dim2=2), rtol=0.3, atol=1e-3)
    close(
        ours.predictive_samples(x, n_samples=4000, generator=seeded(1)).var(0),
        linearised.diagonal(dim1=1, dim2=2), rtol=0.15, atol=1e-4,
    )  # fmt: skip


def test_many_draws_come_in_blocks_within_the_budget() -> None:
    la = made("matrix_free", "classification", memory_budget=20_000)
    blocks = []
    sample = la.sample

    def counted(n: int, generator: Any) -> Tensor:
        blocks.append(n)
        return sample(n, generator)

    la.sample = counted
    assert len(list(la._draws(11, seeded()))) == 11
    assert len(blocks) > 1
    assert sum(blocks) == 11


# -------------------------------------------------------------------- the user's things


def test_the_model_is_left_as_it_was_in_whatever_mode() -> None:
    model = network(middle=nn.Dropout(0.5))
    model.train()
    model[0].eval()
    x = tensors("classification")[0][:3]
    from laplace import Laplace

    with untouched(model):
        la = Laplace(model, "classification", "all", "matrix_free")
        la.fit(loader("classification"))
        la.log_marginal_likelihood()
        la.optimize_prior_precision()
        la.sample(2)
        la(x)
        la(x, pred_type="nn", link_approx="mc", n_samples=2)
        la.predictive_samples(x, pred_type="nn", n_samples=2)
    same = made("matrix_free", "classification")
    same.optimize_prior_precision()
    close(la.log_marginal_likelihood(), same.log_marginal_likelihood())  # without the dropout


def test_the_fit_outlives_further_training() -> None:
    model = network()
    la = made("matrix_free", "classification", model)
    x = tensors("classification")[0][:3]
    before, predicted = la.log_marginal_likelihood(), la(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.train()
    la.prior_precision = 1.0
    close(la.log_marginal_likelihood(), before)
    close(la(x), predicted)


def test_an_error_leaves_the_model_alone() -> None:
    model = network()
    x, y = tensors("classification")
    with untouched(model):
        with pytest.raises(DataError, match="batch 1"):
            made("matrix_free", "classification", model, [(x, y), (x * math.nan, y)])
        with pytest.raises(ShapeError):
            made("matrix_free", "regression", model, [(x, torch.zeros(len(x), 2, dtype=torch.float64))])


# -------------------------------------------------------------------- fitting


def test_shuffling_loaders_are_read_in_order() -> None:
    la = made("matrix_free", "classification", data=loader("classification", shuffle=True))
    close(la.log_marginal_likelihood(), made("full", "classification").log_marginal_likelihood())
    la(tensors("classification")[0][:3])


def test_further_fits_add_up() -> None:
    x, y = tensors("classification")
    found = []
    for structure in ("matrix_free", "full"):
        model = network()
        la = made(structure, "classification", model, DataLoader(TensorDataset(x[:12], y[:12]), batch_size=5))
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        la.fit(DataLoader(TensorDataset(x[12:], y[12:]), batch_size=5), override=False)
        found.append(la)
    ours, full = found
    assert ours.n_data == full.n_data == 20
    close(ours.log_marginal_likelihood(), full.log_marginal_likelihood())
    close(ours(x[:3]), full(x[:3]))
    ours.fit(loader("classification"))
    assert ours.n_data == 20
    assert isinstance(ours.H, co.GGN)


class OfMapping(nn.Module):
    """Takes the mapping as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, data: Any) -> Tensor:
        return self.inner(data["input_ids"])


def test_mappings_of_a_loader_and_of_a_prediction() -> None:
    x, y = tensors("classification")
    data = DataLoader([{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=8)
    la = made("matrix_free", "classification", OfMapping(), data)
    plain = made("matrix_free", "classification")
    close(la.log_marginal_likelihood(), plain.log_marginal_likelihood())
    for batch in ({"input_ids": x[:3]}, {"input_ids": x[:3], "labels": y[:3]}):
        close(la(batch), plain(x[:3]))
        assert la(batch, pred_type="nn", link_approx="mc", n_samples=2).shape == (3, 3)


def test_frozen_parameters_are_no_part_of_the_posterior() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    la = made("matrix_free", "classification", model)
    assert la.posterior_precision.shape == (27, 27)
    x = tensors("classification")[0][:3]
    assert la(x).shape == (3, 3)
    assert la(x, pred_type="nn", link_approx="mc", n_samples=2).shape == (3, 3)


@pytest.mark.parametrize("name", ["CurvlinopsEF", "NativeEF", "NativeHessian", "CurvlinopsGGN"])
def test_backends_say_which_curvature(name: str) -> None:
    import laplace.curvature as theirs

    import curvops.interop.laplace as ours

    backend = getattr(theirs, name, None) or getattr(ours, name)
    for likelihood in ("regression", "classification"):
        la = made("matrix_free", likelihood, backend=backend, prior_precision=300.0)
        full = made("full", likelihood, backend=getattr(ours, name), prior_precision=300.0)
        close(la.log_marginal_likelihood(), full.log_marginal_likelihood(), rtol=1e-7)


def test_backend_options_reach_the_curvature() -> None:
    weights = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction="sum")
    ours, full = both("classification", backend_kwargs={"lossfunc": weights})
    close(ours.log_marginal_likelihood(), full.log_marginal_likelihood())
    sampled = made("matrix_free", "classification", backend_kwargs={"stochastic": True, "generator": seeded()})
    assert isinstance(sampled.H, co.MCFisher)


# -------------------------------------------------------------------- estimates, precision, keeping


def test_estimated_evidence_keeps_its_error_and_has_a_gradient() -> None:
    la = made("matrix_free", "classification", logdet_method=co.SLQ(probes=40, steps=40), sample_method=co.Lanczos())
    full = made("full", "classification")
    delta = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    value, exact = la.log_marginal_likelihood(delta), full.log_marginal_likelihood(delta)
    report = la.reports["log_marginal_likelihood"]
    assert report.algorithm == "SLQ"
    assert report.half_width > 0
    assert abs(float((value - exact).detach())) <= 1.5 * report.half_width
    close(torch.autograd.grad(value, delta)[0], torch.autograd.grad(exact, delta)[0], rtol=0.1, atol=0.5)
    la.prior_precision = 1.3
    la.sample(3)
    assert "Lanczos" in la.reports["sample"].algorithm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_float32_networks(dtype: torch.dtype) -> None:
    x, y = tensors("classification")
    data = DataLoader(TensorDataset(x.float(), y), batch_size=8)
    la = made("matrix_free", "classification", network(dtype=torch.float32), data, dtype=dtype)
    reference = made("full", "classification", network(dtype=torch.float32).double())
    assert la.H.dtype == dtype
    rtol = 1e-6 if dtype == torch.float64 else 1e-4
    close(la.log_marginal_likelihood().double(), reference.log_marginal_likelihood(), rtol=rtol)
    predicted = la(x[:3].float())
    assert predicted.dtype == la.sample(2).dtype == torch.float32
    close(predicted.double(), reference(x[:3]), rtol=1e-4, atol=1e-4)
    Js, _ = la.backend.jacobians(x[:3].float())
    close(la.functional_variance(Js).double(), reference.functional_variance(Js.double()), rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_inputs_of_a_prediction() -> None:
    ours, full = both("regression", enable_backprop=True)
    found = []
    for la in (ours, full):
        x = tensors("regression")[0][:3].clone().requires_grad_()
        mean, variance = la(x)
        found.append(torch.autograd.grad(mean.sum() + variance.square().sum(), x)[0])
    close(*found, rtol=1e-6)


def test_states_go_and_come_with_the_loader() -> None:
    la = made("matrix_free", "classification", prior_precision=0.3)
    x = tensors("classification")[0][:3]
    state = la.state_dict()
    assert state["H"] is None
    model = network()
    other = made("matrix_free", "classification", model)
    other.load_state_dict(state)
    assert other.n_data == 20
    with pytest.raises(AttributeError, match="load_state_dict"):
        other.log_marginal_likelihood()
    other.load_state_dict(state, loader("classification"))
    close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    close(other(x), la(x))
    with pytest.raises(DataError, match="expected the same data"):
        other.load_state_dict(state, [tensors("classification", count=12)])


def test_from_laplace_takes_it_as_it_is() -> None:
    from curvops.interop.laplace import from_laplace

    la = made("matrix_free", "regression", prior_precision=0.3, sigma_noise=0.7)
    fitted = from_laplace(la)
    assert fitted.curvature is la.H
    close(fitted.log_evidence(), la.log_marginal_likelihood())


def test_questions_before_a_fit_and_likelihoods_and_backends_are_refused() -> None:
    from laplace import Laplace
    from laplace.curvature import CurvatureInterface

    la = Laplace(network(), "classification", "all", "matrix_free")
    for ask in (la.sample, la.log_marginal_likelihood, lambda: la(torch.zeros(1, 2)), lambda: la.posterior_precision):
        with pytest.raises(AttributeError, match="fit"):
            ask()
    with pytest.raises(UnsupportedError, match="reward"):
        Laplace(network(), "reward_modeling", "all", "matrix_free")
    with pytest.raises(UnsupportedError, match="backend"):
        Laplace(network(), "classification", "all", "matrix_free", backend=CurvatureInterface)
    with pytest.raises(DataError, match="dtype"):
        Laplace(network(), "classification", "all", "matrix_free", dtype=torch.float16)
    from curvops.interop.laplace import NativeHessian

    indefinite = made("matrix_free", "classification", backend=NativeHessian, prior_precision=1e-6)
    with pytest.raises(co.errors.NotPositiveDefiniteError):
        indefinite.log_marginal_likelihood()


# -------------------------------------------------------------------- large


@pytest.mark.slow
def test_a_hundred_thousand_parameters() -> None:
    """P x P would be 80 GB; everything here is function space of 900 rows."""
    model = nn.Sequential(nn.Linear(64, 280), nn.Tanh(), nn.Linear(280, 280), nn.Tanh(), nn.Linear(280, 10))
    x = torch.randn(100, 64, generator=seeded())
    y = torch.arange(100) % 10
    began = time.perf_counter()
    from laplace import Laplace

    la = Laplace(model, "classification", "all", "matrix_free")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=50))
    assert la.n_params > 99_000
    value = la.log_marginal_likelihood()
    report = la.reports["log_marginal_likelihood"]
    assert report.half_width == 0
    estimate = la.posterior_precision.logdet(co.SLQ(probes=10, steps=30), return_report=True)[1]
    assert abs(estimate.value - la.reports["log_det_posterior_precision"].value) <= 2 * estimate.half_width
    la.optimize_prior_precision()
    assert float(la.log_marginal_likelihood()) > float(value)
    assert la.sample(20).shape == (20, la.n_params)
    assert la(x[:20]).shape == (20, 10)
    assert time.perf_counter() - began < 120
