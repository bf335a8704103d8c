from __future__ import annotations

import warnings
from collections import UserDict

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from untouched import untouched

from curvops.errors import (
    DataError,
    NonDeterministicDataError,
    NumericalWarning,
    ShapeError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.nets.forward import Network, take
from curvops.nets.patches import PlainKernels, substituted
from curvops.testing.problems import problem, problems


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_evaluates_what_the_model_computes(p, device):
    model, (x, _) = p.model(device=device), p.data(device=device)
    expected = reference.outputs(model, x).detach()
    with untouched(model):
        f = Network(model).evaluate(x)
    assert not f.requires_grad
    assert f.shape[:1] == expected.shape[:1]
    assert reference.relative_error(f, expected) < 1e-14


class Fixed(nn.Module):
    """Returns what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.output = output

    def forward(self, x):
        return self.output


class TestOutputs:
    @pytest.mark.parametrize(
        ("output", "words"),
        [
            (torch.zeros(4), r"\(4,\); expected \(B, C\) or \(B, T, C\): return f.unsqueeze\(-1\)"),
            (torch.zeros(4, 2, 3, 3), "flatten the positions"),
            ((torch.zeros(4, 2), None), "returned tuple"),
            (torch.zeros(3, 2), "3 outputs for 4 inputs"),
        ],
    )
    def test_shapes_refused(self, output, words):
        with pytest.raises(ShapeError, match=words):
            Network(Fixed(output))(randn(4, 2))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        with pytest.raises(DataError, match="NaN or infinite"):
            Network(Fixed(torch.full((4, 2), value)))(randn(4, 2))

    def test_half_precision(self):
        with pytest.raises(UnsupportedError, match="bfloat16"):
            Network(Fixed(torch.zeros(4, 2, dtype=torch.bfloat16)))(randn(4, 2))

    def test_logits_of_a_mapping(self):
        logits = randn(4, 2)
        assert torch.equal(Network(Fixed({"logits": logits, "loss": None})).evaluate(randn(4, 2)), logits)

    def test_the_parameters_dtype(self):
        assert Network(Fixed(torch.zeros(4, 2))).evaluate(randn(4, 2)).dtype == torch.float64


class TestInputs:
    def test_mapping_that_is_no_dict_reaches_the_model_as_such(self):
        class Attributes(UserDict):
            def __getattr__(self, key):
                try:
                    return self.data[key]
                except KeyError:
                    raise AttributeError(key) from None

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2).double()

            def forward(self, batch):
                return self.layer(batch.features)

        model, batch = Model(), Attributes(features=randn(4, 3).requires_grad_())
        assert torch.equal(Network(model).evaluate(batch), model.layer(batch["features"]).detach())
        assert isinstance(take(batch, 1, 3, 4), Attributes)

    def test_surplus_keys_are_named(self):
        p = problem("keywords")
        x = {**p.data()[0], "labels": torch.zeros(4)}
        with pytest.raises(DataError, match=r"also holds \['labels'\]"):
            Network(p.model())(x)

    def test_surplus_keys_go_to_a_forward_that_takes_any(self):
        class Any(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2).double()

            def forward(self, features, **rest):
                return self.layer(features) + rest["shift"]

        x = {"features": randn(4, 3), "shift": 1.0}
        assert Network(Any()).evaluate(x).shape == (4, 2)

    def test_take_slices_what_is_batched(self):
        x = {"a": torch.arange(4), "mask": torch.ones(2, 2), "flag": True, "scalar": torch.tensor(1.0)}
        part = take(x, 1, 3, 4)
        assert part["a"].tolist() == [1, 2]
        assert part["mask"] is x["mask"]
        assert part["scalar"] is x["scalar"]
        assert part["flag"] is True
        assert take(torch.arange(4), 1, 3, 4).tolist() == [1, 2]

    def test_wrong_dtype_is_explained(self):
        with pytest.raises(DataError, match=r"inputs of dtype torch\.float32, parameters of torch\.float64"):
            Network(problem("mlp").model())(randn(4, 4).float())

    def test_errors_of_the_models_own_stay(self):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            Network(problem("mlp").model())(randn(4, 5))


class TestModes:
    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Dropout(0.1), (4, 3)),
            (nn.AlphaDropout(0.1), (4, 3)),
            (nn.BatchNorm1d(3), (4, 3)),
            (nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
            (nn.LSTM(3, 2, 2, dropout=0.1), (4, 2, 3)),
            (nn.MultiheadAttention(4, 2, dropout=0.1), (4, 4)),
            (nn.RReLU(), (4, 3)),
        ],
        ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
    )
    def test_train_mode_is_refused_by_path(self, layer, x):
        model = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), layer)}).double()
        model.train()
        with untouched(model), pytest.raises(DataError, match=rf"'deep.1' \({type(layer).__name__}\).*model.eval\(\)"):
            Network(model)(randn(*x))

    def test_train_mode_without_consequence_passes(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.LayerNorm(3)).double().train()
        assert Network(model).evaluate(randn(4, 4)).shape == (4, 3)

    def test_batchnorm_without_statistics(self):
        model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
        with pytest.raises(UnsupportedError, match="track_running_stats=True"):
            Network(model)(randn(4, 4))

    def test_random_pooling(self):
        model = nn.Sequential(nn.FractionalMaxPool2d(2, 2), nn.Flatten()).eval()
        with pytest.raises(UnsupportedError, match="random regions"):
            Network(model)(randn(4, 1, 4, 4))

    def test_functional_dropout_is_found_by_what_it_draws(self):
        class Forgetful(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3).double()

            def forward(self, x):
                return self.layer(F.dropout(x))  # training=True by default

        model = Forgetful().eval()
        with untouched(model), pytest.raises(NonDeterministicDataError, match=r"training=self\.training"):
            Network(model)(randn(4, 4))

    @pytest.mark.parametrize("in_place", [True, False])
    def test_changing_buffers_are_put_back_and_named(self, in_place):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3).double()
                self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

            def forward(self, x):
                if in_place:
                    self.calls += 1
                else:
                    self.calls = self.calls + 1
                return self.layer(x)

        model = Counting().eval()
        calls = model.calls
        with pytest.raises(UnsupportedError, match="buffers calls"):
            Network(model)(randn(4, 4))
        assert model.calls is calls
        assert calls.item() == 0


class TestEmbeddingBag:
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 2])
    @pytest.mark.parametrize("include_last_offset", [False, True])
    def test_offsets_with_empty_bags(self, mode, padding_idx, include_last_offset):
        bag = nn.EmbeddingBag(
            5, 3, mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset
        ).double()
        x = torch.tensor([0, 2, 4, 4, 1, 2])
        offsets = torch.tensor([0, 2, 2, 5, 6][: 5 if include_last_offset else 4])
        expected = bag(x, offsets)
        with PlainKernels():
            assert reference.relative_error(bag(x, offsets).detach(), expected.detach()) < 1e-15

    def test_leading_and_trailing_empty_bags(self):
        bag = nn.EmbeddingBag(5, 3, mode="mean").double()
        x, offsets = torch.tensor([1, 2]), torch.tensor([0, 0, 2, 2])
        expected = bag(x, offsets)
        with PlainKernels():
            assert torch.equal(bag(x, offsets), expected)

    @pytest.mark.parametrize("shape", [(2, 3), (6,)])
    def test_weights_per_sample(self, shape):
        bag = nn.EmbeddingBag(5, 3, mode="sum").double()
        x = torch.tensor([0, 2, 4, 4, 1, 2]).reshape(shape)
        offsets = None if len(shape) == 2 else torch.tensor([0, 1])
        weights = randn(*shape)
        expected = bag(x, offsets, per_sample_weights=weights)
        with PlainKernels():
            actual = bag(x, offsets, per_sample_weights=weights)
        assert reference.relative_error(actual.detach(), expected.detach()) < 1e-15

    def test_max_is_refused(self):
        model = nn.EmbeddingBag(5, 3, mode="max").double()
        with untouched(model), pytest.raises(UnsupportedLayerError, match="'sum' or 'mean'"):
            Network(model)(torch.zeros(4, 2, dtype=torch.int64))

    @pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
    def test_max_norm_is_refused_before_it_rewrites_the_weights(self, layer):
        model = layer(5, 3, max_norm=0.01).double()
        with untouched(model), pytest.raises(UnsupportedLayerError, match="max_norm"):
            Network(model)(torch.zeros(4, 2, dtype=torch.int64))


class TestSubstitution:
    @pytest.mark.parametrize("name", ["mlp", "tied", "module-twice", "lstm", "raw-parameters"])
    def test_other_tensors_and_back(self, name):
        p = problem(name)
        model, (x, _) = p.model(), p.data()
        old = list(model.parameters())
        before = reference.outputs(model, x).detach()
        doubled = p.model()
        with torch.no_grad():
            for t in doubled.parameters():
                t.mul_(2)
        with untouched(model):
            with substituted(model, old, [2 * t.detach() for t in old]):
                # Fused kernels for tensors without gradients may round otherwise.
                now, expected = reference.outputs(model, x), reference.outputs(doubled, x).detach()
                torch.testing.assert_close(now, expected, rtol=1e-14, atol=1e-15)
            assert torch.equal(reference.outputs(model, x), before)
            with pytest.raises(KeyboardInterrupt), substituted(model, old, [0 * t for t in old]):
                raise KeyboardInterrupt
        assert torch.equal(reference.outputs(model, x), before)


class WeightNormed(nn.Module):
    """Weight norm over the axis `dim` of a linear layer, as PyTorch's module or (`plain`) by its formula."""

    def __init__(self, dim: int, old: bool) -> None:
        super().__init__()
        make = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layer = make(nn.Linear(3, 2), dim=dim).double()

    def forward(self, x):
        return torch.tanh(self.layer(x))


class TestWeightNorm:
    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_second_derivative_is_that_of_the_first(self, dim, old):
        # Central differences of the gradient: PyTorch's own double backward through weight norm is wrong.
        model, x = WeightNormed(dim, old), randn(4, 3)
        parameters = list(model.parameters())
        directions = [randn(p.numel()).view_as(p) for p in parameters]
        f = Network(model)(x)
        gradients = torch.autograd.grad((f**2).sum(), parameters, create_graph=True)
        product = torch.autograd.grad(gradients, parameters, directions)

        def gradient(step):
            moved = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(step * d)
                values = torch.autograd.grad(_squares(model, x), parameters)
                for p, m in zip(parameters, moved, strict=True):
                    p.copy_(m)
            return values

        step = 1e-5
        for exact, ahead, behind in zip(product, gradient(step), gradient(-step), strict=True):
            assert reference.relative_error((ahead - behind) / (2 * step), exact) < 1e-7


def _squares(model, x):
    with torch.enable_grad():
        return (model(x) ** 2).sum()


class TestCutGraphs:
    def test_a_reentrant_checkpoint_over_the_data_is_refused(self):
        # None of its inputs requires a gradient, so PyTorch would drop its parameters without an error.
        model = nn.Sequential(nn.Linear(3, 2)).double()
        model.forward = lambda x: checkpoint(model[0], x, use_reentrant=True)
        with untouched(model), pytest.raises(UnsupportedError, match="use_reentrant=False"):
            Network(model)(randn(4, 3))

    def test_a_reentrant_checkpoint_of_the_users_works_afterwards(self):
        layer, x = nn.Linear(3, 2).double(), randn(4, 3).requires_grad_()
        Network(layer)(x.detach())
        checkpoint(layer, x, use_reentrant=True).sum().backward()
        assert layer.weight.grad is not None

    def test_outputs_off_the_graph_are_reported(self):
        model = nn.Linear(3, 2).double()
        model.forward = lambda x: nn.functional.linear(x, model.weight, model.bias).detach()
        with untouched(model), pytest.warns(NumericalWarning, match="none of the selected parameters"):
            Network(model)(randn(4, 3))

    def test_a_function_is_no_model(self):
        with pytest.raises(DataError, match=r"function; expected a torch\.nn\.Module"):
            Network(lambda x: x)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*")
    def test_torchscript_is_refused_by_path(self):
        model = nn.Sequential(nn.Tanh(), torch.jit.script(nn.Linear(3, 2)))
        with pytest.raises(UnsupportedError, match="module '1' is compiled to TorchScript"):
            Network(model)
        for whole in (torch.jit.script(model), torch.jit.trace(model, randn(4, 3).float())):
            with pytest.raises(UnsupportedError, match=r"module '\(the model itself\)' is compiled to TorchScript"):
                Network(whole)
