"""The user's things stay as they were, whatever happens; and what the user changes is noticed, whatever the way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from curvature_subjects import CURVATURES, KINDS, Counted, Loader, batches, randn
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvops as co
from curvops.errors import DataError, NonDeterministicDataError, StaleOperatorError

KIND = pytest.mark.parametrize("kind", KINDS)
CACHE = pytest.mark.parametrize("cache", ["auto", False])


class Planted(Exception):
    """The failure that a test plants."""


class Rich(Counted):
    """Buffers, a frozen parameter, a mixed mode, a gradient and a hook: everything that could be lost."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.net = nn.Sequential(
                nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
            ).double()
        self.eval()
        self.net[2].train()
        self.net[0].bias.requires_grad_(False)
        self.net[4].weight.grad = torch.full_like(self.net[4].weight, 3.0)
        self.calls = 0
        self.fail_at: int | None = None
        self.error: type[BaseException] = Planted
        self.net[2].register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error


class Breaking(Loader):
    """A loader that raises in the middle of a pass."""

    def __init__(self, data: list, error: type[BaseException], at: int) -> None:
        super().__init__(data)
        self.error, self.at = error, at

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == self.at:
                raise self.error
            yield batch


# ---------------------------------------------------------------- left as found


@KIND
@CACHE
def test_everything_stays_through_success(kind, cache):
    model = Rich()
    with untouched(model):
        A = KINDS[kind](model, "classification", batches(3), cache=cache)
        A @ randn(A.shape[1])
        A.T @ randn(A.shape[0], 3)
        A.to_dense()
        A.release()


@KIND
@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt])
def test_everything_stays_when_the_second_forward_fails(kind, error):
    model, data = Rich(), batches(3)
    A = KINDS[kind](model, "classification", data, num_data=8)
    v = randn(A.shape[1])
    model.calls, model.fail_at, model.error = 0, 2, error
    with untouched(model), pytest.raises(error):
        A @ v
    model.fail_at = None  # and the operator is as good as new
    assert reference.relative_error(A @ v, KINDS[kind](model, "classification", data) @ v) <= 1e-14


@KIND
@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt])
def test_everything_stays_when_the_loader_fails(kind, error):
    model, data = Rich(), batches(3)
    loader = Breaking(data, error, at=1)
    A = KINDS[kind](model, "classification", loader, num_data=8)
    v = randn(A.shape[1])
    with untouched(model), pytest.raises(error):
        A @ v
    loader.at = -1
    assert reference.relative_error(A @ v, KINDS[kind](model, "classification", data) @ v) <= 1e-14


@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt])
def test_everything_stays_when_a_verb_is_interrupted(error):
    model = Rich()
    A = co.GGN(model, "classification", batches(3), cache=False).add_diagonal(0.1)
    for verb in (A.to_dense, A.logdet, A.trace, A.diagonal, lambda: A.eigsh(3), lambda: A.solve(randn(A.shape[0]))):
        model.calls, model.fail_at, model.error = 0, 3, error
        with untouched(model), pytest.raises(error):
            verb()
        model.fail_at = None


def test_an_error_in_the_targets_leaves_everything():
    model = Rich()
    x, y = batches(1)[0]
    for kind in CURVATURES:
        A = KINDS[kind](model, "classification", [(x, y), (x, y + 5)])
        with untouched(model), pytest.raises(DataError, match="Classification targets reach"):
            A @ randn(A.shape[1])


def test_loaders_do_not_advance_the_global_random_state():
    x, y = batches(1, size=7)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    A = co.GGN(Rich(), "classification", loader, cache=False)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    A @ randn(A.shape[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# ---------------------------------------------------------------- what changed is noticed


def train_flip(model, data):
    model.net[2].eval()


def changes():
    """Name → a change of the model or the data after which numbers would be other ones."""

    def in_place(model, data):
        with torch.no_grad():
            model.net[0].weight.add_(1e-9)

    def data_write(model, data):
        model.net[4].bias.data[1] += 1e-9

    def vector(model, data):
        vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.001, model.parameters())

    def numpy_view(model, data):
        model.net[0].weight.detach().numpy()[0, 0] += 1e-9

    def state_dict(model, data):
        model.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()})

    def frozen(model, data):
        model.net[0].bias.data.mul_(2)  # not selected, but the outputs depend on it

    def buffer(model, data):
        model.net[1].running_mean += 1.0

    def buffer_by_numpy(model, data):
        model.net[1].running_var.numpy()[2] *= 2

    def replaced(model, data):
        model.net[4].weight = nn.Parameter(model.net[4].weight.detach().clone())

    def swapped_module(model, data):
        model.net[2] = nn.ReLU()

    def dtype(model, data):
        model.float()

    def requires_grad(model, data):
        model.net[4].bias.requires_grad_(False)

    def batch(model, data):
        data[1][0].mul_(1.5)

    def targets(model, data):
        data[0][1].fill_(2)

    return {f.__name__: f for f in (
        in_place, data_write, vector, numpy_view, state_dict, frozen, buffer, buffer_by_numpy, replaced, swapped_module,
        dtype, requires_grad, batch, targets, train_flip,
    )}  # fmt: skip


CHANGE = pytest.mark.parametrize("change", changes())


@CHANGE
@pytest.mark.parametrize("kind", ["GGN", "Hessian", "Jacobian", "Gram"])
@pytest.mark.parametrize("used", [False, True])
def test_a_change_is_noticed(kind, change, used):
    model, data = Rich(), batches(2)
    A = KINDS[kind](model, "classification", data)
    v = randn(A.shape[1])
    if used:
        A @ v
    changes()[change](model, data)
    with pytest.raises(StaleOperatorError, match="since the operator was built"):
        A @ v
    with pytest.raises(StaleOperatorError, match="snapshot=True"):
        A.to_dense()


@CHANGE
def test_every_verb_notices(change):
    model, data = Rich(), batches(2)
    A = co.GGN(model, "classification", data).add_diagonal(0.5)
    v = randn(A.shape[1])
    A.logdet()
    changes()[change](model, data)
    verbs = [
        A.logdet, A.trace, A.diagonal, A.slogdet, lambda: A.solve(v), lambda: A.quadratic_form(v), lambda: A.eigsh(2),
        lambda: A.inv_sqrt_matvec(v), lambda: A.spectrum(2, 3), A.frobenius_norm, lambda: A.to(torch.float32),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(StaleOperatorError):
            verb()


def test_jacobian_outputs_notice():
    model = Rich()
    J = co.Jacobian(model, batches(2))
    assert J.outputs.shape == (5, 3)
    model.net[4].bias.data += 1
    with pytest.raises(StaleOperatorError):
        _ = J.outputs


def test_a_change_while_a_verb_runs_is_noticed():
    model, data = Rich(), batches(2)
    A = co.GGN(model, "classification", data)
    A @ randn(A.shape[1])

    def f(eigenvalues: Tensor) -> Tensor:
        model.net[4].bias.data += 1e-6
        return eigenvalues

    with pytest.raises(StaleOperatorError, match=r"net.4.bias"):
        A.function(f, randn(A.shape[1]))


@KIND
def test_equal_content_rewritten_is_no_change(kind):
    model, data = Rich(), batches(2)
    A = KINDS[kind](model, "classification", data)
    v = randn(A.shape[1])
    before = A @ v
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(A @ v, before)
    with torch.no_grad():
        for t in model.parameters():
            kept = t.clone()
            t.zero_()
            t.copy_(kept)
    assert torch.equal(A @ v, before)


def test_operators_over_one_objective_survive_a_rewrite():
    model, data = Rich(), batches(2)
    A = KINDS["GGN"](model, "classification", data)
    B = type(A).of(A.objective)
    v = randn(A.shape[1])
    before = A @ v, B @ v
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(A @ v, before[0])
    assert torch.equal(B @ v, before[1])


@CHANGE
@pytest.mark.parametrize("kind", ["GGN", "MCFisher", "Hessian", "Jacobian"])
@pytest.mark.parametrize("used", [False, True])
def test_a_snapshot_is_not_affected(kind, change, used):
    model, data = Rich(), batches(2)
    expected = KINDS[kind](model, "classification", data).to_dense()
    A = KINDS[kind](model, "classification", data, snapshot=True)
    if used:
        A @ randn(A.shape[1])
    changes()[change](model, data)
    assert reference.relative_error(A.to_dense(), expected) <= 1e-14


def test_a_snapshot_copies_every_form_of_batch_in_memory():
    class Keyed(Counted):
        def forward(self, x):
            return super().forward(x["input_ids"])

    x, y = batches(1)[0]
    forms = [
        (Counted(), (x, y)), (Counted(), [(x, y)]), (Counted(), [[x, y]]),
        (Keyed(), {"input_ids": x, "labels": y}), (Keyed(), ({"input_ids": x}, y)),
    ]  # fmt: skip
    for model, data in forms:
        A = co.GGN(model, "classification", data, snapshot=True)
        for name, tensor in A.objective.source.tensors():
            assert tensor.data_ptr() not in (x.data_ptr(), y.data_ptr()), name
        assert A.objective.model is not model


def test_the_twin_in_another_precision_is_private():
    model, data = Rich(), batches(2)
    A = co.GGN(model, "classification", data)
    expected = A.to_dense()
    with untouched(model):
        twin = A.to(torch.float32)
        assert twin.dtype == torch.float32
        assert reference.relative_error(twin.to_dense().double(), expected) <= 5e-6
    model.net[4].bias.data += 1
    assert reference.relative_error(twin.to_dense().double(), expected) <= 5e-6


# ---------------------------------------------------------------- passes that differ


@pytest.mark.parametrize("kind", CURVATURES)
def test_a_shuffling_loader_is_named(kind):
    x, y = batches(1, size=12)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    A = KINDS[kind](Counted(), "classification", loader, cache=False)
    v = randn(43)
    A @ v
    with pytest.raises(NonDeterministicDataError, match="shuffle=False"):
        A @ v
    kept = KINDS[kind](Counted(), "classification", loader)  # read once, all of it kept: one sum over one data set
    assert torch.equal(kept @ v, kept @ v)


def test_the_loss_is_the_first_pass():
    x, y = batches(1, size=12)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    A = co.GGN(Counted(), "classification", loader)
    A.objective.loss()
    with pytest.raises(NonDeterministicDataError, match="differ"):
        A @ randn(43)


def test_dropout_in_train_mode_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    A = co.GGN(model, "classification", batches(2))
    with pytest.raises(DataError, match=r"module '1' \(Dropout\) is in train mode.*model.eval\(\)"):
        A @ randn(43)

    class Functional(Counted):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x))

    B = co.GGN(Functional(), "classification", batches(2))
    with pytest.raises(NonDeterministicDataError, match=r"drew random numbers.*model.eval\(\)"):
        B @ randn(43)


def test_a_loader_that_grows_or_shrinks_is_named():
    data = batches(4)
    loader = Loader(list(data))
    A = co.GGN(Counted(), "classification", loader, cache=False)
    A @ randn(43)
    loader.data = data[:3]
    with pytest.raises(NonDeterministicDataError, match="a later pass gave 9 data in 3 batches, the first one 11"):
        A @ randn(43)
    loader.data = data + data[:1]
    with pytest.raises(NonDeterministicDataError, match="Batch 4 appeared"):
        A @ randn(43)
