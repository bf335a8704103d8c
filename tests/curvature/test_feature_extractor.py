"""A model seen as features and a last layer: found or named, registered once, no hook left."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.curvature import GGNInterface
from curvops.errors import DataError, UnsupportedLayerError
from curvops.testing import problems


def net() -> nn.Module:
    return problems.problem("mlp").model()


def test_features_and_outputs() -> None:
    model = net()
    x, _ = problems.problem("mlp").data()
    extractor = co.FeatureExtractor(model)
    assert extractor.last_layer is None
    with untouched(model):
        f, features = extractor.forward_with_features(x)
    assert extractor.last_layer is model[2]  # type: ignore[index]
    assert not features.requires_grad
    assert torch.equal(extractor.last_layer(features), f)
    assert torch.equal(f, model(x))
    assert torch.equal(extractor(x), f)


def test_registered_once() -> None:
    extractor = co.FeatureExtractor(net(), "2")
    names = [name for name, _ in extractor.named_parameters(remove_duplicate=False)]
    assert names == ["model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"]
    assert list(extractor.state_dict()) == names
    twin = copy.deepcopy(extractor)
    assert twin.last_layer is twin.model[2]  # type: ignore[index]
    assert twin.last_layer is not extractor.last_layer


def test_backprop_through_features() -> None:
    x, _ = problems.problem("mlp").data()
    x = x.requires_grad_()
    _, features = co.FeatureExtractor(net(), "2", enable_backprop=True).forward_with_features(x)
    (g,) = torch.autograd.grad(features.sum(), x)
    assert float(g.abs().sum()) > 0


@pytest.mark.parametrize("reduction", ["pick_first", "pick_last", "average"])
def test_reductions(reduction: str) -> None:
    x, _ = problems.problem("tokens").data()
    model = problems.problem("tokens").model()
    hidden = torch.tanh(model[0](x)).detach()  # type: ignore[index]
    _, features = co.FeatureExtractor(model, "2", feature_reduction=reduction).forward_with_features(x)
    wanted = {"pick_first": hidden[:, 0], "pick_last": hidden[:, -1], "average": hidden.mean(1)}[reduction]
    assert torch.allclose(features, wanted, atol=1e-12)
    _, whole = co.FeatureExtractor(model, "2").forward_with_features(x)
    assert torch.allclose(whole, hidden, atol=1e-12)


def test_mappings() -> None:
    p = problems.problem("keywords")
    x, _ = p.data()
    extractor = co.FeatureExtractor(p.model())
    f, features = extractor.forward_with_features(x)
    assert isinstance(f, Tensor)
    assert extractor.last_layer is not None
    assert torch.equal(extractor.last_layer(features), f)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x)))


def test_a_mapping_keyed_as_the_wrapper_names_its_argument() -> None:
    """It is handed on whole, not taken for keywords of the wrapper."""

    class OfMappings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["x"] * batch["scale"])

    x, y = problems.problem("mlp").data()
    assert isinstance(x, Tensor)
    mapping = {"x": x, "scale": torch.full_like(x, 0.5)}
    extractor = co.FeatureExtractor(OfMappings(), "net.2")
    backend = GGNInterface(extractor, "classification", last_layer=True, dict_key_x="x")
    plain = GGNInterface(co.FeatureExtractor(net(), "2"), "classification", last_layer=True)
    assert torch.allclose(backend.full(mapping, y)[1].to_dense(), plain.full(0.5 * x, y)[1].to_dense(), rtol=1e-12)


def test_refusals() -> None:
    with pytest.raises(DataError, match="no module named 'head'"):
        co.FeatureExtractor(net(), "head")
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        co.FeatureExtractor(net(), "1")
    with pytest.raises(DataError, match="pick_first"):
        co.FeatureExtractor(net(), feature_reduction="sum")
    normed = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(UnsupportedLayerError, match="LayerNorm"):
        co.FeatureExtractor(normed)(torch.ones(2, 3))
    assert not normed[1]._forward_hooks
    with pytest.raises(UnsupportedLayerError, match="2 times"):
        co.FeatureExtractor(Reused(), "shared").forward_with_features(torch.ones(2, 3))
    with pytest.raises(UnsupportedLayerError, match="no module with parameters"):
        co.FeatureExtractor(nn.Sequential(nn.Tanh()))(torch.ones(2, 3))


class OldExtractor(nn.Module):
    """Registers the last layer a second time, as extractors of old did."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.last_layer = model[2]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model[:2](x)  # type: ignore[index]
        return self.last_layer(features), features


@pytest.mark.parametrize("cls", [GGNInterface, co.CurvlinopsGGN, co.CurvlinopsHessian, co.CurvlinopsEF])
@pytest.mark.parametrize("kind", [co.FeatureExtractor, OldExtractor])
def test_last_layer_curvatures(cls: type, kind: type) -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model = net()
    extractor = kind(model)
    backend = cls(extractor, "classification", last_layer=True)
    tail = ["2"]
    nll = reference.problem_nll(p)
    if cls is co.CurvlinopsHessian:
        wanted = reference.hessian(model, nll, x, y, tail)
    elif cls is co.CurvlinopsEF:
        wanted = reference.empirical_fisher(model, nll, x, y, tail)
    else:
        wanted = reference.ggn(model, nll, x, y, tail)
    for _ in range(2):
        _, H = backend.full(x, y)
        assert reference.relative_error(H.to_dense(), wanted) < 1e-9
        assert reference.relative_error(backend.diag(x, y)[1].diagonal(), wanted.diagonal()) < 1e-9
    J, f = backend.last_layer_jacobians(x)
    assert reference.relative_error(J, reference.jacobian(model, x, tail)) < 1e-10
    assert torch.allclose(f, model(x), atol=1e-12)
    assert model[2].weight.grad_fn is None  # type: ignore[index]


def test_the_interface_finds_the_layer_by_one_forward() -> None:
    p = problems.problem("mlp")
    x, _ = p.data()
    extractor = co.FeatureExtractor(net())
    backend = GGNInterface(extractor, "classification", last_layer=True)
    with pytest.raises(DataError, match="find_last_layer"):
        _ = backend.params
    backend.jacobians(x)
    assert len(backend.params) == 2
