"""Every bad input is refused by a sentence: what was given, what was expected, and the way out."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from curvature_subjects import CURVATURES, KINDS, Counted, Loader, batches, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvops as co
from curvops.errors import (
    DataError,
    MemoryBudgetError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedError,
)

KIND = pytest.mark.parametrize("kind", KINDS)
SQUARE = pytest.mark.parametrize("kind", CURVATURES)


def refused(error: type[Exception], *words: str):
    """`pytest.raises` whose message holds all of these words."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def one(width: int = 4, size: int = 5) -> tuple[Tensor, Tensor]:
    return batches(1, size=size + 1, width=width)[0]


# ---------------------------------------------------------------- vectors


@KIND
def test_wrong_vector(kind):
    A = KINDS[kind](Counted(), "classification", one())
    rows, columns = A.shape
    line = repr(A)
    with refused(ShapeError, f"({columns + 1},)", f"({columns},)", line):
        A @ randn(columns + 1)
    with refused(ShapeError, f"({columns + 1}, 2)", f"({columns}, K)", line):
        A @ randn(columns + 1, 2)
    with refused(ShapeError, f"({rows + 1},)", f"({rows},)", line):
        A.rmatvec(randn(rows + 1))
    with refused(ShapeError, "torch.float32", "torch.float64", ".to("):
        A @ randn(columns).float()
    with refused(ShapeError, "meta", "cpu", ".to("):
        A @ torch.empty(columns, dtype=torch.float64, device="meta")
    with refused(ShapeError, "ndarray", "to_scipy()"):
        A @ randn(columns).numpy()
    with refused(ShapeError, "(1, 1, "):
        A @ randn(1, 1, columns)


@SQUARE
def test_right_hand_sides_must_be_finite(kind):
    A = KINDS[kind](Counted(), "classification", one()).add_diagonal(1.0)
    for bad in (float("nan"), float("inf")):
        b = randn(43)
        b[3] = bad
        with refused(DataError, "right-hand side", "NaN or Inf", repr(A)):
            A.solve(b)


# ---------------------------------------------------------------- parameters and network


@KIND
def test_parameters_that_cannot_be(kind):
    class Integer(Counted):
        def __init__(self):
            super().__init__()
            self.net[0].weight.requires_grad_(False)
            self.table = nn.Parameter(torch.ones(2).half())

    with refused(UnsupportedError, "'table'", "torch.float16", "float32 or float64"):
        KINDS[kind](Integer(), "classification", one())
    nan = Counted()
    nan.net[2].bias.data[1] = float("nan")
    with refused(DataError, "net.2.bias", "NaN", "checkpoint"):
        KINDS[kind](nan, "classification", one())
    with refused(DataError, "requires_grad=True"):
        KINDS[kind](Counted().requires_grad_(False), "classification", one())
    with refused(DataError, "params is an empty list"):
        KINDS[kind](Counted(), "classification", one(), params=[])
    with refused(DataError, "'net.1.weight'", "near:"):
        KINDS[kind](Counted(), "classification", one(), params=["net.1.weight"])
    with refused(DataError, "duplicates"):
        KINDS[kind](Counted(), "classification", one(), params=torch.tensor([1, 1]))
    with refused(DataError, "[0, 43)"):
        KINDS[kind](Counted(), "classification", one(), params=torch.tensor([43]))
    with refused(DataError, "last_layer", "FeatureExtractor"):
        KINDS[kind](Counted(), "classification", one(), params="last_layer")


def test_integer_parameters_are_refused():
    class Integer(Counted):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

    # An integer tensor cannot require a gradient, so it can only be asked for by name.
    with refused(DataError, "'codes' is frozen", "unfreeze it or leave it out"):
        co.GGN(Integer(), "classification", one(), params=["codes"])
    assert co.GGN(Integer(), "classification", one()).shape == (43, 43)


@KIND
def test_modes_that_make_no_function(kind):
    for layer, word in ((nn.Dropout(0.5), "drops at random"), (nn.BatchNorm1d(5), "normalises by the batch")):
        model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double().train()
        A = KINDS[kind](model, "classification", one())
        with untouched(model), refused(DataError, type(layer).__name__, "train mode", word, "model.eval()"):
            A.to_dense()


@KIND
def test_outputs_that_do_not_fit(kind):
    class Shaped(Counted):
        def __init__(self, shape):
            super().__init__()
            self.shape = shape

        def forward(self, x):
            return super().forward(x).reshape(self.shape)

    flat, mixed = KINDS[kind](Shaped((-1,)), "classification", one()), KINDS[kind](Shaped((15, 1)), "regression", one())
    with refused(ShapeError, "(15,)", "(B, C)", "unsqueeze"):
        flat @ randn(flat.shape[1])
    with refused(ShapeError, "15 outputs for 5 inputs", "one per datum"):
        mixed @ randn(mixed.shape[1])

    class Overflowing(Counted):
        def forward(self, x):
            return super().forward(x) * float("inf")

    with refused(DataError, "outputs hold NaN or infinite"):
        KINDS[kind](Overflowing(), "classification", one()).to_dense()


@KIND
def test_inputs_of_another_dtype(kind):
    x, y = one()
    A = KINDS[kind](Counted(), "classification", (x.float(), y))
    with refused(DataError, "torch.float32", "torch.float64", ".to("):
        A.to_dense()


# ---------------------------------------------------------------- data


@KIND
def test_data_that_are_no_data(kind):
    x, y = one()

    def build(data, **options):
        return KINDS[kind](Counted(), "classification", data, **options)

    with refused(DataError, "generator", "only once", "list("):
        build(batch for batch in [(x, y)])
    with refused(DataError, "list_iterator", "only once"):
        build(iter([(x, y)]))
    with refused(DataError, "empty"):
        build((x[:0], y[:0]))
    with refused(DataError, "no batch"):
        build([])
    with refused(DataError, "Tensor of shape (5, 4)", "without targets"):
        build(x)
    with refused(DataError, "TensorDataset", "DataLoader"):
        build(TensorDataset(x, y))
    with refused(DataError, "5 inputs and 4 targets"):
        build((x, y[:4]))
    with refused(DataError, "num_data is 6", "5"):
        build((x, y), num_data=6)
    with refused(DataError, "'labels'", "dict_key_y"):
        build({"input_ids": x, "y": y})
    with refused(DataError, "'input_ids'", "dict_key_x"):
        build({"x": x, "labels": y})
    with refused(DataError, "ndarray", "torch.from_numpy"):
        build([(x.numpy(), y)])


@KIND
def test_loaders_found_out_in_the_first_pass(kind):
    x, y = one()
    good = [(x, y), (x, y)]

    def product(data, **options):
        A = KINDS[kind](Counted(), "classification", data, **options)
        return A.to_dense()

    with refused(DataError, "no data"):
        product(Loader([]))
    with refused(DataError, "Batch 1", "5 inputs and 3 targets"):
        product(Loader([*good[:1], (x, y[:3])]))
    with refused(DataError, "Batch 1", "expected a pair (x, y)"):
        product(Loader([*good[:1], (x, y, y)]))
    with refused(DataError, "10 data in 2 batches", "num_data is 11", "num_data=10"):
        product(Loader(good), num_data=11)


@KIND
def test_values_that_are_not_finite_name_the_batch(kind):
    x, y = one()
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[2, 1] = bad
        with refused(DataError, "x in batch 1", "NaN or Inf", "(2, 1)"):
            KINDS[kind](Counted(), "classification", [(x, y), (broken, y)]).to_dense()
    if kind not in ("Jacobian", "NTK"):  # which have no likelihood, and do not look at targets
        t = torch.zeros(5, 3, dtype=torch.float64)
        t[4, 0] = float("nan")
        with refused(DataError, "y in batch 0", "(4, 0)"):
            KINDS[kind](Counted(), "regression", [(x, t)]).to_dense()


# ---------------------------------------------------------------- targets and likelihoods

CURVED = pytest.mark.parametrize("kind", [*CURVATURES, "Gram"])


@CURVED
def test_targets_that_do_not_fit(kind):
    x, y = one()

    def product(likelihood, targets, outputs=3):
        return KINDS[kind](Counted(outputs=outputs), likelihood, (x, targets)).to_dense()

    with refused(DataError, "3 to 3", "0 … 2", "ignore_index"):
        product("classification", torch.full_like(y, 3))
    with refused(DataError, "-1 to -1"):
        product("classification", torch.full_like(y, -1))
    with refused(ShapeError, "torch.float64", "integers", "y.long()"):
        product("classification", y.double())
    with refused(ShapeError, "(5, 1)", "squeeze(-1)"):
        product("classification", y.unsqueeze(-1))
    with refused(ShapeError, "one class", '"binary"'):
        product("classification", torch.zeros_like(y), outputs=1)
    # The classic: (B,) against (B, 1) would broadcast to (B, B).
    for likelihood in ("regression", "binary"):
        with refused(ShapeError, "(5,)", "(5, 1)", "broadcast to (5, 5)", "y.unsqueeze(-1)"):
            product(likelihood, torch.zeros(5, dtype=torch.float64), outputs=1)
        with refused(ShapeError, "torch.float32", "torch.float64", "y.to("):
            product(likelihood, torch.zeros(5, 3))
    with refused(DataError, "2", "[0, 1]", "(y + 1) / 2"):
        product("binary", torch.full((5, 3), 2.0, dtype=torch.float64))
    with refused(ShapeError, "2 class weights", "3 outputs"):
        product(nn.CrossEntropyLoss(weight=torch.ones(2), reduction="sum"), y)


@CURVED
def test_likelihoods_that_are_none(kind):
    def build(likelihood):
        return KINDS[kind](Counted(), likelihood, one())

    with refused(DataError, "'softmax'", '"classification"', '"regression"', '"binary"'):
        build("softmax")
    with refused(DataError, "likelihood is None", '"classification"', "Jacobian"):
        build(None)
    with refused(UnsupportedError, "reward_modeling", '"regression"'):
        build("reward_modeling")
    with refused(UnsupportedError, 'reduction="mean"', 'reduction="sum"'):
        build(nn.CrossEntropyLoss())
    with refused(DataError, "NLLLoss", "from_loss"):
        build(nn.NLLLoss(reduction="sum"))


def test_a_root_of_a_likelihood_that_is_not_convex():
    wave = co.likelihoods.Likelihood.from_loss(lambda f, y: f.cos().sum())
    with refused(UnsupportedError, "Gram", "convex", "is_convex=True", "weighted=False"):
        co.Gram(Counted(), wave, one())
    A = co.GGN(Counted(), wave, one())
    assert not A.is_psd
    assert A.lower_bound is None
    assert A._gram() is None


def test_options_that_are_none():
    for kind in KINDS:
        with refused(ValueError, "cache='all'", '"auto"', "True"):
            KINDS[kind](Counted(), "classification", one(), cache="all")
        with pytest.raises(TypeError, match="epochs"):
            KINDS[kind](Counted(), "classification", one(), epochs=3)
    with refused(ValueError, "datum='word'", '"token"', '"example"'):
        co.EmpiricalFisher(Counted(), "classification", one(), datum="word")
    for samples in (0, -1, 1.5, True):
        with refused(ValueError, f"num_samples={samples}", "at least 1"):
            co.MCFisher(Counted(), "classification", one(), num_samples=samples)


# ---------------------------------------------------------------- what needs definiteness, memory, a file


def test_what_needs_a_definite_matrix_says_so():
    G, H = (KINDS[kind](Counted(), "classification", one()) for kind in ("GGN", "Hessian"))
    for A in (G, H):
        with refused(NotPositiveDefiniteError, "add_diagonal"):
            A.logdet()
        with refused(NotPositiveDefiniteError, "add", "diagonal"):
            A.inv_sqrt_matvec(randn(43))
        with refused(NotPositiveDefiniteError, "add_diagonal"):
            co.Gaussian(torch.zeros(43, dtype=torch.float64), A).sample(2)
    with refused(NotPositiveDefiniteError, "add_diagonal"):
        H.add_diagonal(1e-3).logdet()
    for delta in (0.0, -1.0):
        with refused(NotPositiveDefiniteError, "add_diagonal"):
            G.add_diagonal(delta).logdet()
    with refused(ShapeError, "square", "15 x 43"):
        co.Jacobian(Counted(), one()).logdet()
    with refused(UnsupportedError, "FunctionSpace()", "GGN"):
        H.add_diagonal(1.0).logdet(co.FunctionSpace())


@KIND
def test_a_dense_matrix_beyond_the_budget(kind):
    A = KINDS[kind](Counted(), "classification", one(), memory_budget=500)
    with refused(MemoryBudgetError, "dense matrix", repr(A), "500 B", "memory_budget"):
        A.to_dense()
    assert (A @ randn(A.shape[1])).shape == (A.shape[0],)


@KIND
def test_what_holds_a_network_cannot_be_pickled(kind):
    A = KINDS[kind](Counted(), "classification", one())
    for operator in (A, A.T, 2.0 * A):
        with refused(UnsupportedError, "state_dict", "to_dense()"):
            pickle.dumps(operator)


@KIND
def test_parameters_in_a_dict_of_delta(kind):
    if kind not in CURVATURES:
        pytest.skip("damping by parameter is for curvatures in parameter space")
    A = KINDS[kind](Counted(), "classification", one())
    with pytest.raises(co.errors.CurvopsError, match=r"net\.2\.bias"):
        A.add_diagonal({"net.0.weight": 1.0, "net.0.bias": 1.0, "net.2.weight": 1.0})
    by_index = KINDS[kind](Counted(), "classification", one(), params=torch.tensor([3, 1]))
    with pytest.raises(co.errors.CurvopsError):
        by_index.add_diagonal({"net.0.weight": 1.0})


def test_a_loader_over_the_data_reports_its_batches_by_number():
    x, y = one(size=6)
    y = y.clone()
    y[5] = 9
    A = co.GGN(Counted(), "classification", DataLoader(TensorDataset(x, y), batch_size=2))
    with refused(DataError, "9 to 9"):
        A @ randn(43)
