"""The examples of laplace-torch's documentation, small, with our backends beside its own: equal within 1e-5.

Each example is a function of the backend and returns all numbers that the documentation prints or plots.
"""

from __future__ import annotations

import io
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from laplace_subjects import close, drawn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace", reason="laplace-torch is not installed")

import laplace.curvature as stock
from laplace import Laplace, marglik_training

import curvops.interop.laplace as ours
from curvops.report.digits import digits

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # of laplace-torch's BackPACK
]

Example = Callable[[Any], list[Any]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """laplace-torch reminds users of the link approximation at every tuning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx`")
        yield


def alike(
    example: Example, names: tuple[str, ...] = ("NativeGGN", "CurvlinopsGGN"), theirs: Any = stock.CurvlinopsGGN
) -> None:
    """The example's numbers with each of our backends are those with one of laplace-torch's, its default."""
    torch.manual_seed(711)
    wanted = example(theirs)
    for name in names:
        torch.manual_seed(711)
        close(example(getattr(ours, name)), wanted, rtol=1e-5)


# -------------------------------------------------------------------- regression


def _sinusoid() -> tuple[DataLoader, Tensor]:
    generator = torch.Generator().manual_seed(711)
    x = 8 * torch.rand(150, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(x) + 0.3 * torch.randn(150, 1, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=150), torch.linspace(-5, 13, 50, dtype=torch.float64)[:, None]


def _trained(model: nn.Module, loader: DataLoader, loss: nn.Module, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model


def _regressor() -> nn.Module:
    return drawn(nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))


def test_regression_after_training() -> None:
    loader, x_test = _sinusoid()
    model = _trained(_regressor(), loader, nn.MSELoss(), 60)

    def example(backend: Any) -> list[Any]:
        la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full", backend=backend)
        la.fit(loader)
        log_prior, log_sigma = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        hyper_optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
        for _ in range(15):
            hyper_optimizer.zero_grad()
            neg_marglik = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
            neg_marglik.backward()
            hyper_optimizer.step()
        f_mu, f_var = la(x_test)
        joint_mu, joint_cov = la(x_test, joint=True)
        pred_std = (f_var.squeeze() + la.sigma_noise.detach() ** 2).sqrt()
        return [log_prior, log_sigma, f_mu, f_var, joint_mu, joint_cov, pred_std, neg_marglik]

    alike(example, theirs=stock.BackPackGGN)  # whose matrix is float64 throughout, as its default's is not


def test_regression_trained_by_marginal_likelihood() -> None:
    loader, x_test = _sinusoid()

    def example(backend: Any) -> list[Any]:
        la, _, margliks, losses = marglik_training(
            model=_regressor(), train_loader=loader, likelihood="regression", hessian_structure="full",
            backend=backend, n_epochs=10, n_hypersteps=3, optimizer_kwargs={"lr": 1e-2}, prior_structure="scalar",
        )  # fmt: skip
        f_mu, f_var = la(x_test)
        return [la.sigma_noise, la.prior_precision, torch.tensor(margliks), torch.tensor(losses), f_mu, f_var]

    alike(example, theirs=stock.BackPackGGN)


def test_differentiating_the_marginal_likelihood() -> None:
    """Of the default flavour, Kronecker factors of the last layer."""
    loader, _ = _sinusoid()
    model = _trained(_regressor(), loader, nn.MSELoss(), 20)

    def example(backend: Any) -> list[Any]:
        la = Laplace(model, likelihood="regression", backend=backend)
        la.fit(loader)
        prior_prec = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        ml = la.log_marginal_likelihood(prior_prec)
        ml.backward()
        assert prior_prec.grad is not None
        return [ml, prior_prec.grad]

    alike(example)


# -------------------------------------------------------------------- classification and calibration


@pytest.fixture(scope="module")
def classifier() -> tuple[nn.Module, DataLoader, DataLoader]:
    """A trained 64-16-10 network, its training and its test data."""
    (x, y), (x_test, y_test) = digits()
    loader = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=150)
    model = drawn(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
    model = _trained(model, loader, nn.CrossEntropyLoss(), 30)
    return model, loader, DataLoader(TensorDataset(x_test[:200], y_test[:200]), batch_size=100)


def _measures(probabilities: Tensor, y: Tensor) -> list[Tensor]:
    """Accuracy, expected calibration error in 15 bins, and negative log-likelihood."""
    confidence, predicted = probabilities.max(-1)
    hit = (predicted == y).double()
    bins = (15 * confidence).long().clamp(max=14)
    error = sum(((hit - confidence)[bins == i].sum().abs() for i in range(15)), torch.zeros(())) / len(y)
    return [hit.mean(), error, -probabilities.gather(1, y[:, None]).log().mean()]


@torch.no_grad()
def _predicted(predict: Callable[[Tensor], Tensor], loader: DataLoader) -> tuple[Tensor, Tensor]:
    return torch.cat([predict(x) for x, _ in loader]), torch.cat([y for _, y in loader])


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_calibration_by_the_last_layer(classifier: tuple[nn.Module, DataLoader, DataLoader], structure: str) -> None:
    model, train_loader, test_loader = classifier

    def example(backend: Any) -> list[Any]:
        la = Laplace(
            model, "classification", subset_of_weights="last_layer", hessian_structure=structure, backend=backend
        )
        la.fit(train_loader)
        la.optimize_prior_precision(method="marglik", n_steps=20)
        probabilities, y = _predicted(la, test_loader)
        return [la.prior_precision, probabilities, *_measures(probabilities, y)]

    alike(example)
    # What it is for: better calibrated than the point estimate.
    torch.manual_seed(711)
    calibrated = example(ours.NativeGGN)
    point, y = _predicted(lambda x: model(x).softmax(-1), test_loader)
    assert float(calibrated[-3]) >= float(_measures(point, y)[0]) - 0.02


def test_tuning_on_validation_data(classifier: tuple[nn.Module, DataLoader, DataLoader]) -> None:
    """A diagonal over all weights, tuned by grid search, kept in a file and read back."""
    model, train_loader, val_loader = classifier
    x = next(iter(val_loader))[0]

    def example(backend: Any) -> list[Any]:
        la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=backend)
        la.fit(train_loader)
        la.optimize_prior_precision(
            method="gridsearch", pred_type="glm", link_approx="probit", val_loader=val_loader, grid_size=4
        )
        pred = la(x, pred_type="glm", link_approx="probit")
        file = io.BytesIO()
        torch.save(la.state_dict(), file)
        file.seek(0)
        la2 = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=backend)
        la2.load_state_dict(torch.load(file, weights_only=False))
        return [la.prior_precision, pred, la2(x, pred_type="glm", link_approx="probit")]

    alike(example, ("NativeGGN",))


def test_a_subnetwork(classifier: tuple[nn.Module, DataLoader, DataLoader]) -> None:
    from laplace.utils import LargestMagnitudeSubnetMask, ModuleNameSubnetMask

    model, train_loader, test_loader = classifier

    def example(backend: Any) -> list[Any]:
        answers = []
        for mask in (
            LargestMagnitudeSubnetMask(model, n_params_subnet=60),
            ModuleNameSubnetMask(model, module_names=["2"]),
        ):
            la = Laplace(
                model, "classification", subset_of_weights="subnetwork", hessian_structure="full",
                subnetwork_indices=torch.LongTensor(mask.select()), backend=backend,
            )  # fmt: skip
            la.fit(train_loader)
            answers += [la.log_marginal_likelihood(), _predicted(la, test_loader)[0]]
        return answers

    alike(example)


# -------------------------------------------------------------------- Hugging Face


class _Classifier(nn.Module):
    """A language model's classifier that is handed the whole batch, as laplace-torch's documentation wraps one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2ForSequenceClassification

        config = GPT2Config(
            vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=2, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.hf_model = drawn(GPT2ForSequenceClassification(config))

    def forward(self, data: MutableMapping[str, Any]) -> Tensor:
        output = self.hf_model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
        return output.logits


def _batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 12, (10, 5), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(0, 10, 3):
        ids[i, 3:], mask[i, 3:] = 0, 0
    rows = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": torch.tensor(i % 2)} for i in range(10)]

    def collate(chosen: list[dict[str, Tensor]]) -> UserDict[str, Tensor]:
        return UserDict({key: torch.stack([row[key] for row in chosen]) for key in chosen[0]})

    return DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_language_model(subset: str) -> None:
    model = _Classifier()
    for name, p in model.named_parameters():
        p.requires_grad_("score" in name or subset == "last_layer")
    batches = _batches()
    options = {"feature_reduction": "pick_last"} if subset == "last_layer" else {}

    def example(backend: Any) -> list[Any]:
        la = Laplace(
            model, likelihood="classification", subset_of_weights=subset, hessian_structure="diag", backend=backend,
            **options,
        )  # fmt: skip
        la.fit(batches)
        la.optimize_prior_precision(n_steps=10)
        return [la.H, la.prior_precision, la(next(iter(batches)))]

    if subset == "all":
        alike(example)
    else:
        # laplace-torch reduces the features of the wrapped score layer itself, where padding ends a row early; the
        # oracle is the same parameters selected by requires_grad.
        found = example(ours.NativeGGN)
        for name, p in model.named_parameters():
            p.requires_grad_("score" in name)
        options.clear()
        subset = "all"
        close(found, example(stock.CurvlinopsGGN), 1e-5)
