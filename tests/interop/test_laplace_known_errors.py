"""What laplace-torch 0.3 is known to get wrong with its own backends, and ours beside it, against loops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reference
import torch
from laplace_subjects import close, data, dense, drawn, fitted, loader, network
from torch import Tensor, nn
from untouched import untouched

pytest.importorskip("laplace", reason="laplace-torch is not installed")

import laplace.curvature as stock

import curvops.interop.laplace as ours

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),  # of laplace-torch's ASDL
]

F64 = torch.float64
LAST = ["2.weight", "2.bias"]


def _far(one: Tensor, other: Tensor, rtol: float = 0.05) -> bool:
    return float((one - other).abs().max()) > rtol * float(other.abs().max())


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_the_diagonal_empirical_fisher_of_the_last_layer_is_not_zero(likelihood: str) -> None:
    x, y = data(likelihood)
    scale = 2.0 if likelihood == "regression" else 1.0  # factor · Σ g gᵀ, of the unscaled loss
    right = scale * reference.empirical_fisher(network(), reference.nll(likelihood), x, y, LAST).diagonal()
    assert not bool(fitted(stock.CurvlinopsEF, likelihood, "last_layer", "diag").H.any())
    for backend in (ours.CurvlinopsEF, ours.NativeEF):
        close(fitted(backend, likelihood, "last_layer", "diag").H, right, 1e-10)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_noise_has_a_gradient_through_kron(subset: str) -> None:
    def gradient(backend: Any) -> tuple[Tensor, Tensor]:
        la = fitted(backend, "regression", subset, "kron")
        sigma = torch.tensor(0.8, dtype=F64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Converting a tensor with requires_grad=True to a scalar"
            (found,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=sigma), sigma)
        with torch.no_grad():
            up, down = (la.log_marginal_likelihood(sigma_noise=sigma.detach() + s) for s in (1e-5, -1e-5))
        return found, (up - down) / 2e-5

    theirs, right = gradient(stock.CurvlinopsGGN)
    assert _far(theirs, right)
    mine, right = gradient(ours.NativeGGN)
    close(mine, right)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("name", ["NativeGGN", "CurvlinopsGGN"])
def test_class_weights_count(name: str, structure: str) -> None:
    weight = torch.tensor([0.2, 3.0], dtype=F64)
    loss = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    x, y = data("classification")
    right = reference.ggn(network(), loss, x, y)

    def sized(backend: Any, **options: Any) -> Any:
        la = fitted(backend, "classification", "all", structure, **options)
        if not options:
            la.backend.lossfunc = loss
            la.fit(loader("classification"))
        close(la.loss, loss(network()(x), y))
        return la

    plain = dense(fitted(getattr(ours, name), "classification", "all", structure).H)
    for la in (sized(getattr(ours, name), backend_kwargs={"lossfunc": loss}), sized(getattr(ours, name))):
        if structure == "full":
            close(la.H, right, 1e-10)
        elif structure == "diag":
            close(la.H, right.diagonal(), 1e-10)
        else:
            # KFAC's bias blocks are exact where the layer is the last one.
            close(la.H_facs.kfacs[3][0], right[30:, 30:], 1e-10)
            assert _far(dense(la.H), plain)
    if structure != "full":
        theirs = sized(stock.CurvlinopsGGN)
        unweighted = dense(fitted(stock.CurvlinopsGGN, "classification", "all", structure).H)
        close(dense(theirs.H), unweighted)  # as if all classes weighed the same


def test_float64_curvature_is_float64() -> None:
    """laplace-torch multiplies with an identity in float32."""
    x, y = data("classification")
    right = reference.ggn(network(), reference.nll("classification"), x, y)
    assert _far(fitted(stock.CurvlinopsGGN, "classification").H, right, 1e-10)
    close(fitted(ours.CurvlinopsGGN, "classification").H, right, 1e-13)
    close(fitted(ours.NativeGGN, "classification").H, right, 1e-13)


def test_the_hessian_of_a_layer_norm() -> None:
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = data("classification")
    right = reference.hessian(model, reference.nll("classification"), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fitted(stock.CurvlinopsHessian, "classification", model=model).H
    assert _far(theirs, right, 0.01)
    for backend in (ours.CurvlinopsHessian, ours.NativeHessian):
        close(fitted(backend, "classification", model=model).H, right, 1e-10)


def test_draws_are_private() -> None:
    x, y = data("classification")
    backend, other = (
        cls(network(), "classification", stochastic=True) for cls in (ours.NativeGGN, stock.CurvlinopsGGN)
    )
    before = torch.get_rng_state()
    backend.diag(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    other.diag(x, y)
    assert not torch.equal(torch.get_rng_state(), before)


def test_models_are_not_extended() -> None:
    model = network()
    stock.BackPackGGN(model, "classification")
    assert any(model[0]._forward_hooks)
    model = network()
    with untouched(model):
        backend = ours.NativeGGN(model, "classification")
        backend.diag(*data("classification"))
