from __future__ import annotations

import pytest
import torch
from torch import nn

from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.nets.parameters import ParameterSelection, flatten, unflatten, unwrap
from curvops.testing.problems import problem, problems


def mlp() -> nn.Module:
    return problem("mlp").model()


class TestSelection:
    def test_order_is_that_of_named_parameters_row_major(self):
        model = mlp()
        selection = ParameterSelection(model)
        assert selection.names == ("0.weight", "0.bias", "2.weight", "2.bias")
        assert selection.offsets == (0, 16, 20, 32)
        expected = torch.cat([model[0].weight.reshape(-1), model[0].bias, model[2].weight.reshape(-1), model[2].bias])
        assert torch.equal(selection.vector(), expected.detach())
        assert all(a is b for a, b in zip(selection.tensors, model.parameters(), strict=True))

    def test_tied_parameter_counts_once_under_its_first_name(self):
        selection = ParameterSelection(problem("tied").model())
        assert selection.names == ("embedding.weight", "mix.weight", "mix.bias", "decoder.bias")

    def test_tied_parameter_is_found_under_its_second_name(self):
        selection = ParameterSelection(problem("tied").model(), ["decoder.weight"])
        assert selection.names == ("embedding.weight",)

    def test_prefix_takes_what_is_trainable_below(self):
        model = problem("frozen").model()
        assert ParameterSelection(model, ["0"]).names == ("0.weight",)
        assert ParameterSelection(model, ["2", "0"]).names == ("0.weight", "2.bias")

    def test_prefix_stops_at_the_dot(self):
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(11)])
        assert ParameterSelection(model, ["1"]).names == ("1.weight", "1.bias")

    def test_last_layer(self):
        assert ParameterSelection(problem("last-layer").model(), "last_layer").names == (
            "last_layer.weight",
            "last_layer.bias",
        )

    def test_indices_keep_their_order(self):
        model, indices = mlp(), torch.tensor([33, 2, 17])
        selection = ParameterSelection(model, indices)
        full = ParameterSelection(model).vector()
        assert selection.size == 3
        assert torch.equal(selection.vector(), full[indices])
        tree = selection.unflatten(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        assert torch.equal(flatten(tree).nonzero().squeeze(1), torch.tensor([2, 17, 33]))
        assert torch.equal(selection.flatten(tree), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def test_indices_are_kept_apart_from_the_users_tensor(self):
        indices = torch.tensor([1, 2])
        selection = ParameterSelection(mlp(), indices)
        indices.zero_()
        assert selection.indices.tolist() == [1, 2]

    @pytest.mark.parametrize("columns", [None, 3])
    def test_unflatten_then_flatten_is_the_identity(self, columns):
        for p in problems():
            selection = ParameterSelection(p.model(), p.params)
            shape = (selection.size,) if columns is None else (selection.size, columns)
            v = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            tree = selection.unflatten(v)
            trailing = () if columns is None else (columns,)
            assert [t.shape for t in tree.values()] == [(*s, *trailing) for s in selection.shapes]
            assert torch.equal(selection.flatten(tree), v)

    def test_rows_and_columns_agree(self):
        selection = ParameterSelection(mlp(), torch.tensor([3, 30, 0]))
        v = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows = selection.split_rows(v.T)
        tree = selection.unflatten(v)
        for row, column in zip(rows, tree.values(), strict=True):
            assert torch.equal(row.movedim(0, -1), column)
        assert torch.equal(selection.join_rows(rows, 4).T, v)

    def test_none_stands_for_zero_rows(self):
        selection = ParameterSelection(mlp())
        rows = selection.join_rows([None, torch.ones(2, 4, dtype=torch.float64), None, None], 2)
        assert rows.sum() == 8
        assert torch.equal(rows[:, 16:20], torch.ones(2, 4, dtype=torch.float64))

    def test_compiled_model_has_the_names_of_the_module_inside(self):
        model = mlp()
        compiled = torch.compile(model)
        assert unwrap(compiled) is model
        assert ParameterSelection(compiled).names == ParameterSelection(model).names


class TestRefusals:
    @pytest.mark.parametrize(
        ("params", "error", "words"),
        [
            ([], DataError, "empty list"),
            (["0.wieght"], DataError, "near: 0.weight"),
            (["7"], DataError, "no parameter is named '7'"),
            ("0.weight", DataError, "names go into a list"),
            ("last_layer", DataError, "FeatureExtractor"),
            ([3], DataError, "flat indices go into a LongTensor"),
            (torch.tensor([0, 0]), DataError, "1 duplicates"),
            (torch.tensor([35]), DataError, r"\[0, 35\)"),
            (torch.tensor([-1]), DataError, r"\[0, 35\)"),
            (torch.tensor([], dtype=torch.int64), DataError, "no flat index"),
            (torch.tensor([1.0]), ShapeError, "LongTensor"),
            (torch.tensor([[1]]), ShapeError, "1-dimensional"),
        ],
    )
    def test_bad_params(self, params, error, words):
        with pytest.raises(error, match=words):
            ParameterSelection(mlp(), params)

    def test_frozen_name(self):
        with pytest.raises(DataError, match=r"'2.weight' is frozen"):
            ParameterSelection(problem("frozen").model(), ["2.weight"])

    def test_frozen_prefix(self):
        model = mlp()
        model[2].requires_grad_(False)
        with pytest.raises(DataError, match="every parameter below '2' is frozen"):
            ParameterSelection(model, ["2"])

    def test_frozen_entries_have_no_index(self):
        with pytest.raises(DataError, match=r"\[0, 19\)"):
            ParameterSelection(problem("frozen").model(), torch.tensor([20]))

    def test_nothing_trainable(self):
        with pytest.raises(DataError, match="no parameter is selected"):
            ParameterSelection(mlp().requires_grad_(False))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        model = mlp()
        with torch.no_grad():
            model[2].bias[1] = value
        with pytest.raises(DataError, match=r"2\.bias"):
            ParameterSelection(model)

    def test_a_sum_that_overflows_is_no_infinity(self):
        model = nn.Linear(4, 1)
        nn.init.constant_(model.weight, 3e38)
        assert ParameterSelection(model).size == 5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dtype(self, dtype):
        with pytest.raises(UnsupportedError, match=r"float32 or float64"):
            ParameterSelection(nn.Linear(2, 2).to(dtype))

    def test_integer_parameter_is_named_when_asked_for(self):
        model = mlp()
        model.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
        assert "count" not in ParameterSelection(model).names
        with pytest.raises(DataError, match="'count' is frozen"):
            ParameterSelection(model, ["count"])

    def test_mixed_dtypes(self):
        model = mlp()
        model[2].float()
        with pytest.raises(UnsupportedError, match="mix dtypes"):
            ParameterSelection(model)
        assert ParameterSelection(model, ["2"]).dtype == torch.float32

    def test_lazy(self):
        with pytest.raises(UnsupportedError, match="lazy"):
            ParameterSelection(nn.LazyLinear(2))

    def test_made_under_inference_mode(self):
        with torch.inference_mode():
            model = nn.Linear(2, 2)
        with pytest.raises(UnsupportedError, match="inference_mode"):
            ParameterSelection(model)

    def test_wrong_length(self):
        selection = ParameterSelection(mlp())
        with pytest.raises(ShapeError, match=r"\(35,\) or \(35, K\), got \(34,\)"):
            selection.unflatten(torch.zeros(34))
        with pytest.raises(ShapeError, match="expected tensors for the names"):
            selection.flatten({"0.weight": torch.zeros(4, 4)})
        tree = selection.unflatten(torch.zeros(35))
        tree["0.bias"] = torch.zeros(5)
        with pytest.raises(ShapeError, match=r"0\.bias: expected \(4,\)"):
            selection.flatten(tree)


class TestPublic:
    def test_flatten_follows_the_mapping(self):
        tree = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)}
        v = flatten(tree)
        assert v.tolist() == [1.0, 2.0, 3.0]
        back = unflatten(v, tree)
        assert list(back) == ["b", "a"]
        assert all(torch.equal(back[k], tree[k]) for k in tree)

    def test_like_a_module(self):
        model = problem("frozen").model()
        tree = unflatten(torch.arange(19.0), model)
        assert {k: tuple(v.shape) for k, v in tree.items()} == {"0.weight": (4, 4), "2.bias": (3,)}
        assert tree["2.bias"].tolist() == [16.0, 17.0, 18.0]

    def test_columns(self):
        tree = unflatten(torch.arange(6.0).reshape(3, 2), {"a": torch.zeros(1, 2), "b": torch.zeros(())})
        assert tree["a"].shape == (1, 2, 2)
        assert tree["b"].tolist() == [4.0, 5.0]

    def test_gradient_passes(self):
        v = torch.ones(3, requires_grad=True)
        (flatten(unflatten(v, {"a": torch.zeros(1, 3)})) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert v.grad.tolist() == [1.0, 2.0, 3.0]

    def test_refusals(self):
        with pytest.raises(DataError, match="empty"):
            flatten({})
        with pytest.raises(ShapeError, match=r"\(2,\) or \(2, K\), got \(3,\)"):
            unflatten(torch.zeros(3), {"a": torch.zeros(2)})
