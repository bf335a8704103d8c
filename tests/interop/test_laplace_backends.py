"""Our backends within laplace-torch, beside its own: every structure, subset, likelihood and backend."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import laplace_subjects as subjects
import pytest
import torch
from laplace_subjects import CELLS, close, data, dense, fitted, loader, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvops as co
from curvops.errors import DataError, NumericalWarning, UnsupportedError

pytest.importorskip("laplace", reason="laplace-torch is not installed")

import laplace
import laplace.curvature as stock

import curvops.interop.laplace as ours

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),  # of laplace-torch's ASDL
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # of laplace-torch's BackPACK
]

LIKELIHOODS = ("regression", "classification")
NATIVE = {"NativeGGN": "CurvlinopsGGN", "NativeEF": "CurvlinopsEF", "NativeHessian": "CurvlinopsHessian"}
EIGHT = (
    "CurvlinopsGGN", "CurvlinopsEF", "CurvlinopsHessian", "BackPackGGN", "BackPackEF", "AsdlGGN", "AsdlEF",
    "AsdlHessian",
)  # fmt: skip
NAMES = (*EIGHT, *NATIVE)


def reference(name: str, subset: str, structure: str) -> str | None:
    """The class of laplace-torch to compare with: of the same name, unless that one fails or errs there."""
    name = NATIVE.get(name, name)
    if name.endswith("Hessian"):
        return "CurvlinopsHessian" if structure == "full" and subset != "subnetwork" else None
    if (name, subset, structure) == ("CurvlinopsEF", "last_layer", "diag"):
        return "AsdlEF"  # it returns zeros
    if (name, subset, structure) == ("AsdlEF", "last_layer", "full"):
        return "BackPackEF"  # it raises
    return "CurvlinopsEF" if (name, structure) == ("BackPackEF", "kron") else name  # it has none


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("subset", "structure"), CELLS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell(name: str, subset: str, structure: str, likelihood: str) -> None:
    backend = getattr(ours, name)
    if name.endswith("Hessian") and subset == "subnetwork":
        with pytest.raises(ValueError, match="GGN and EF"):
            fitted(backend, likelihood, subset, structure)
        return
    if name.endswith("Hessian") and structure == "kron":
        with pytest.raises(UnsupportedError, match="no Kronecker factors; use GGNInterface"):
            fitted(backend, likelihood, subset, structure)
        return
    la = fitted(backend, likelihood, subset, structure)
    wanted = reference(name, subset, structure)
    if wanted is None:  # the diagonal of the Hessian, which laplace-torch does not have
        close(la.H, fitted(stock.CurvlinopsHessian, likelihood, subset, "full").H.diagonal())
        return
    other = fitted(getattr(stock, wanted), likelihood, subset, structure)
    close(la.loss, other.loss)
    close(dense(la.H), dense(other.H))
    if structure == "kron":
        for F, G in zip(la.H_facs.kfacs, other.H_facs.kfacs, strict=True):
            # A factor of the whole is divided among its two: evenly here, and in some of laplace-torch's own.
            close([f / f.norm() for f in F], [g / g.norm() for g in G])
    if name.endswith("Hessian"):
        return  # not definite; the rest needs that
    x = data(likelihood)[0][:4]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ASDL backend is used")  # laplace-torch goes by the name
        close(la(x), other(x))
    close(la.log_marginal_likelihood(), other.log_marginal_likelihood())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("subset", "structure"), CELLS)
def test_everything_that_is_asked_of_a_posterior(subset: str, structure: str, likelihood: str) -> None:
    pair = [fitted(backend, likelihood, subset, structure) for backend in (ours.NativeGGN, stock.CurvlinopsGGN)]
    x = data(likelihood)[0][:4]

    def both(ask: Any) -> None:
        answers = []
        for la in pair:
            torch.manual_seed(0)
            answers.append(ask(la))
        close(*answers)

    both(lambda la: la.log_det_posterior_precision)
    both(lambda la: la.log_prob(la.mean + 0.1) if subset != "subnetwork" else la.scatter)
    both(lambda la: la.functional_samples(x, n_samples=3, generator=torch.Generator().manual_seed(1)))
    both(lambda la: la.predictive_samples(x, n_samples=3, generator=torch.Generator().manual_seed(1)))
    both(lambda la: la.sample(3, generator=torch.Generator().manual_seed(1)))
    both(lambda la: la(x, pred_type="nn", link_approx="mc", n_samples=3))
    if likelihood == "regression":
        both(lambda la: la(x, joint=True))
        both(lambda la: la(x, diagonal_output=True))
    else:
        for link in ("mc", "probit", "bridge", "bridge_norm"):
            both(lambda la, link=link: la(x, link_approx=link))


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_predictions_can_be_differentiated_in_the_inputs(subset: str, structure: str) -> None:
    gradients = []
    for backend in (ours.NativeGGN, ours.CurvlinopsGGN, stock.CurvlinopsGGN):
        la = fitted(backend, "regression", subset, structure, enable_backprop=True)
        x = data("regression")[0][:3].requires_grad_()
        mean, variance = la(x)
        gradients.append(torch.autograd.grad(mean.sum() + variance.diagonal(dim1=1, dim2=2).log().sum(), x)[0])
    close(gradients[0], gradients[2])
    close(gradients[1], gradients[2])


# -------------------------------------------------------------------- priors and marginal likelihoods


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("subset", "structure"), CELLS)
def test_prior_precision_is_optimised_alike(subset: str, structure: str, likelihood: str) -> None:
    wants = {"scalar"}
    if subset == "all":
        wants |= {"layerwise"} | ({"diag"} if structure != "kron" else set())
    for prior_structure in sorted(wants):
        found = []
        for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
            la = fitted(backend, likelihood, subset, structure)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "By default `link_approx`")
                la.optimize_prior_precision(prior_structure=prior_structure, n_steps=5)
            found.append(la.prior_precision)
        close(*found)
        assert float((found[0] - 1).abs().min()) > 1e-3


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_gridsearch_finds_the_same(subset: str, structure: str) -> None:
    found = []
    for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
        la = fitted(backend, "classification", subset, structure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "By default `link_approx`")
            la.optimize_prior_precision(method="gridsearch", val_loader=loader("classification"), grid_size=7)
        found.append(la.prior_precision)
    close(*found)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_marginal_likelihood_training(structure: str, likelihood: str) -> None:
    runs = []
    for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
        la, model, margliks, losses = laplace.marglik_training(
            network(), loader(likelihood), likelihood, structure, backend, n_epochs=4, n_hypersteps=3,
            optimizer_kwargs={"lr": 1e-2},
            fix_sigma_noise=structure == "kron",  # whose gradient laplace-torch loses; see the test below
        )  # fmt: skip
        theta = nn.utils.parameters_to_vector(model.parameters())
        runs.append((margliks, losses, la.prior_precision, la.sigma_noise, theta))
    close(*runs)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_evidence_has_its_whole_gradient_in_the_noise(subset: str, structure: str) -> None:
    la = fitted(ours.NativeGGN, "regression", subset, structure)

    def evidence(sigma: Tensor) -> Tensor:
        return la.log_marginal_likelihood(sigma_noise=sigma)

    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(evidence(sigma), sigma)
    step = 1e-5
    with torch.no_grad():
        difference = (evidence(sigma + step) - evidence(sigma - step)) / (2 * step)
    close(gradient, difference)


# -------------------------------------------------------------------- checkpoints and copies


@pytest.mark.parametrize(("subset", "structure"), CELLS)
def test_checkpoints_are_those_of_laplace_torch(subset: str, structure: str) -> None:
    pair = (ours.NativeGGN, stock.CurvlinopsGGN)
    x = data("classification")[0][:4]
    for saver, restorer in (pair, pair[::-1], (pair[0], pair[0])):
        la = fitted(saver, "classification", subset, structure)
        file = io.BytesIO()
        torch.save(la.state_dict(), file)
        file.seek(0)
        options: dict[str, Any] = {"subnetwork_indices": subjects.SUBNETWORK} if subset == "subnetwork" else {}
        other = laplace.Laplace(
            network(), "classification", subset_of_weights=subset, hessian_structure=structure, backend=restorer,
            **options,
        )  # fmt: skip
        other.load_state_dict(torch.load(file, weights_only=False))
        close(other(x), la(x))
        close(other.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("name", NAMES)
def test_fitted_approximations_are_copied_and_pickled(name: str) -> None:
    backend = getattr(ours, name)
    assert pickle.loads(pickle.dumps(backend)) is backend
    la = fitted(backend, "classification", "all", "full")
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        close(other.H, la.H)
        other.fit(loader("classification"))
        close(other.H, la.H)


def test_a_fit_goes_on() -> None:
    for structure in ("full", "kron", "diag"):
        pair = [fitted(backend, "regression", "all", structure) for backend in (ours.NativeGGN, stock.CurvlinopsGGN)]
        for la in pair:
            la.fit(loader("regression"), override=False)
        close(dense(pair[0].H), dense(pair[1].H))
        close(pair[0].log_marginal_likelihood(), pair[1].log_marginal_likelihood())


# -------------------------------------------------------------------- function space


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("independent", [True, False])
def test_subset_of_data_gp(subset: str, likelihood: str, independent: bool) -> None:
    x = data(likelihood)[0][:4]
    answers = []
    for backend in (ours.NativeGGN, ours.CurvlinopsGGN, stock.CurvlinopsGGN):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using FunctionalLaplace with the diagonal approximation")
            la = fitted(backend, likelihood, subset, "gp", n_subset=14, independent_outputs=independent)
        answers.append((la.log_marginal_likelihood(), la(x)))
    close(answers[0], answers[2])
    close(answers[1], answers[2])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_nystrom_and_variational_function_spaces(likelihood: str) -> None:
    x = data(likelihood)[0]
    choices: dict[str, dict[str, Any]] = {
        "nystrom": {"subsample_size": 12, "n_eigenvalues": 5},
        "variational": {"inducing_locations": x[:6].clone(), "seed": 0},
    }
    for approximation, options in choices.items():
        answers = []
        for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
            torch.manual_seed(0)
            model = laplace.Laplace(
                network(), likelihood, subset_of_weights="all", hessian_structure="gp", backend=backend,
                functional_approximation=approximation, **copy.deepcopy(options),
            )  # fmt: skip
            model.fit(loader(likelihood), **({"iterations": 5} if approximation == "variational" else {}))
            answers.append(model(x[:4]))
        close(*answers)


# -------------------------------------------------------------------- subnetworks and mappings


def test_subnetworks_chosen_by_variance() -> None:
    from laplace.utils import LargestMagnitudeSubnetMask, LargestVarianceDiagLaplaceSubnetMask

    chosen = []
    for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
        model = network()
        diagonal = laplace.DiagLaplace(model, "classification", backend=backend)
        mask = LargestVarianceDiagLaplaceSubnetMask(model, n_params_subnet=6, diag_laplace_model=diagonal)
        indices = mask.select(loader("classification"))
        magnitudes = LargestMagnitudeSubnetMask(model, n_params_subnet=6).select()
        la = laplace.Laplace(
            model, "classification", subset_of_weights="subnetwork", hessian_structure="full", backend=backend,
            subnetwork_indices=torch.cat([indices, magnitudes]).unique(),
        )  # fmt: skip
        la.fit(loader("classification"))
        chosen.append((indices, la.H, la.log_marginal_likelihood()))
    close(*chosen)


class OfMappings(nn.Module):
    """A network that is handed the whole batch, as laplace-torch hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["x"] * batch["scale"])


class _Mappings(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = data("classification")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "scale": torch.full((1,), 0.5, dtype=torch.float64), "y": self.y[i]}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("name", ["NativeGGN", "NativeEF", "CurvlinopsGGN", "CurvlinopsEF"])
def test_mappings(name: str, subset: str, structure: str) -> None:
    options = {"dict_key_x": "x", "dict_key_y": "y"}
    batches = DataLoader(_Mappings(), batch_size=subjects.B)
    la = fitted(getattr(ours, name), "classification", subset, structure, model=OfMappings(), loader=batches, **options)
    x, y = data("classification")
    plain = fitted(
        getattr(ours, name), "classification", subset, structure, model=_halved(),
        loader=DataLoader(TensorDataset(x, y), batch_size=subjects.B),
    )  # fmt: skip
    close(dense(la.H), dense(plain.H))
    batch = next(iter(batches))
    close(la(batch), plain(batch["x"]))


def _halved() -> nn.Module:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(0.5 * x)

    return Halved()


# -------------------------------------------------------------------- the backend itself


@pytest.mark.parametrize("name", NAMES)
def test_what_laplace_torch_asks_of_a_class(name: str) -> None:
    backend = getattr(ours, name)
    assert backend.__name__ == name
    assert issubclass(backend, stock.CurvatureInterface)
    assert issubclass(backend, stock.GGNInterface) == name.endswith("GGN")
    assert issubclass(backend, stock.EFInterface) == name.endswith("EF")
    assert not issubclass(backend, stock.BackPackInterface | stock.AsdlInterface)
    assert (backend in [stock.BackPackGGN, stock.AsdlGGN, stock.CurvlinopsGGN]) == name.endswith("GGN")
    assert backend != stock.CurvlinopsEF
    assert len({backend, stock.CurvlinopsGGN}) == 2
    assert {name for name in NAMES if getattr(ours, name) == backend} == {backend.__name__}
    inner = backend(network(), laplace.Likelihood.CLASSIFICATION, last_layer=False)
    assert isinstance(inner.curvops, backend.interface)
    assert repr(inner).startswith(f"{name}(")
    assert [p.shape for p in inner.params] == [p.shape for p in network().parameters()]
    assert list(inner.params_dict) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (inner.factor, inner.dict_key_x, inner.dict_key_y, inner.buffers_dict) == (1.0, "input_ids", "labels", {})


def test_frozen_parameters_are_left_out() -> None:
    answers = []
    for name in [name for name in NAMES if name.endswith("GGN")]:
        model = network()
        model[0].weight.requires_grad_(False)
        answers.append(fitted(getattr(ours, name), "regression", "all", "diag", model=model).H)
    keep = torch.ones(32, dtype=torch.bool)
    keep[:15] = False
    wanted = fitted(stock.CurvlinopsGGN, "regression", "all", "diag").H[keep]
    for H in answers:
        close(H, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_left_as_it_was(name: str) -> None:
    model = network()
    x, y = data("classification")
    backend = getattr(ours, name)(model, "classification")
    with untouched(model):
        backend.full(x, y, N=len(x))
        backend.diag(x, y, N=len(x))
        if not name.endswith("Hessian"):
            backend.kron(x, y, N=len(x))
        backend.jacobians(x)
        backend.gradients(x, y)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_stochastic_curvatures_have_the_right_mean(structure: str) -> None:
    options = {"stochastic": True, "num_samples": 400, "generator": torch.Generator().manual_seed(3)}
    la = fitted(ours.NativeGGN, "classification", "all", structure, backend_kwargs=options)
    wanted = dense(fitted(ours.NativeGGN, "classification", "all", structure).H)
    # 400 draws for each of 20 data: a relative error of about 1 / √8000.
    assert 0 < float((dense(la.H) - wanted).norm() / wanted.norm()) < 0.05
    assert la.backend.stochastic
    assert la.backend.num_samples == 400


def test_draws_leave_the_global_generator_alone() -> None:
    backend = ours.NativeGGN(network(), "classification", stochastic=True)
    x, y = data("classification")
    before = torch.get_rng_state()
    backend.kron(x, y, N=len(x))
    backend.full(x, y)
    assert backend._get_mc_functional_fisher(torch.zeros(3, 2, dtype=torch.float64)).shape == (3, 2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_any_interface_becomes_a_backend() -> None:
    class Doubled(co.GGNInterface):
        """Twice the GGN."""

        def _full(self, objective: Any) -> co.LinearOperator:
            return 2.0 * super()._full(objective)

    made = ours.backend(Doubled)
    assert made.__name__ == "Doubled"
    assert "Twice the GGN." in str(made.__doc__)
    assert issubclass(made, stock.GGNInterface)
    close(fitted(made, "regression").H, 2 * fitted(ours.NativeGGN, "regression").H)


def test_estimated_diagonals_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ours.NativeHessian(network(), "classification")
    x, y = data("classification")
    exact = backend.diag(x, y)[1]

    def estimated(self: Any, objective: Any) -> co.LinearOperator:
        return co.DiagonalHessian.of(objective, co.Hutchinson(probes=64))

    monkeypatch.setattr(co.HessianInterface, "_diag", estimated)
    with pytest.warns(NumericalWarning, match="keeps no error bars"):
        entries = backend.diag(x, y)[1]
    assert float((entries - exact).norm() / exact.norm()) < 0.5


def test_reward_models_are_fitted_as_the_classifiers_they_are() -> None:
    """laplace-torch hands a pair's two rewards to the backend as logits, and never the word itself."""
    with pytest.raises(UnsupportedError, match='use "regression"'):
        ours.NativeGGN(network(), "reward_modeling")

    class Rewards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = subjects.drawn(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).flatten(1)  # (pairs, 2), or (data, 1)

    x, y = data("classification")
    pairs = DataLoader(TensorDataset(torch.stack([x, x.flip(0)], 1), y), batch_size=subjects.B)
    answers = []
    for backend in (ours.NativeGGN, stock.CurvlinopsGGN):
        la = fitted(backend, "reward_modeling", "all", "diag", model=Rewards(), loader=pairs)
        answers.append((la.H, la(x[:3])))
    close(*answers)


def test_keywords_that_do_not_belong_are_refused() -> None:
    backend = ours.NativeGGN(network(), "classification")
    x, y = data("classification")
    with pytest.raises(TypeError, match="unknown keywords"):
        backend.diag(x, y, N=len(x), damping=1.0)
    with pytest.raises(DataError, match="N is 0"):
        backend.kron(x, y, N=0)
    with pytest.raises(DataError, match="last_layer"):
        ours.NativeGGN(network(), "classification", last_layer=True)
