from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

from curvops.errors import ShapeError, UnsupportedError
from curvops.nets import jacobians as J
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.testing.problems import Problem, problem, problems

EVERY = pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
RECURRENT = ("rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pieces(p: Problem, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Network, ParameterSelection]:
    model = p.model(dtype)
    return model, Network(model), ParameterSelection(model, p.params)


class Residual:
    """The likelihood protocol over a reference loss."""

    def __init__(self, p: Problem) -> None:
        self.loss = reference.problem_nll(p)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            return torch.autograd.grad(self.loss(f, y), f)[0]


@EVERY
@pytest.mark.parametrize("road", ["vmap", "example", "batch", None])
def test_jacobians(p, road):
    model, network, selection = pieces(p)
    x = p.data()[0]
    if road == "vmap" and p.name in RECURRENT:
        with untouched(model), pytest.raises(UnsupportedError, match="does not vectorise over examples"):
            J.jacobians(network, selection, x, road=road)
        return
    with untouched(model):
        rows, f = J.jacobians(network, selection, x, road=road)
    expected = reference.jacobian(p.model(), x, p.params)
    assert rows.shape == expected.shape
    assert reference.relative_error(rows, expected) < 1e-13
    assert reference.relative_error(f, reference.outputs(model, x).detach()) < 1e-14
    assert not rows.requires_grad
    assert not f.requires_grad


@EVERY
def test_float32(p):
    _, network, selection = pieces(p, torch.float32)
    rows, f = J.jacobians(network, selection, p.data(torch.float32)[0])
    assert rows.dtype == f.dtype == torch.float32
    assert reference.relative_error(rows.double(), reference.jacobian(p.model(), p.data()[0], p.params)) < 5e-6


@EVERY
def test_gradients(p):
    model, network, selection = pieces(p)
    x, y = p.data()
    with untouched(model):
        rows, _ = J.gradients(network, selection, Residual(p), x, y)
    expected = reference.gradients(p.model(), reference.problem_nll(p), x, y, p.params)
    assert reference.relative_error(rows, expected) < 1e-13


@pytest.mark.parametrize("name", ["mlp", "lstm", "keywords", "tokens", "subnetwork"])
@pytest.mark.parametrize("examples", [1, 3])
def test_chunks_are_the_whole(name, examples):
    p = problem(name)
    _, network, selection = pieces(p)
    x = p.data()[0]
    rows, f = J.jacobians(network, selection, x)
    budget = examples * 4 * f[0].numel() * selection.full_size * 8
    chunks = list(J.example_rows(network, selection, x, byte_budget=budget))
    assert [start for start, _, _ in chunks] == list(range(0, 4, examples))
    assert reference.relative_error(torch.cat([r for _, r, _ in chunks]).reshape(rows.shape), rows) < 1e-14


def test_cotangents():
    p = problem("tokens")
    _, network, selection = pieces(p)
    x = p.data()[0]
    u = randn(4, 2, 3, 3)
    rows = torch.cat([r for _, r, _ in J.example_rows(network, selection, x, u)])
    expected = torch.einsum("brtc,btcp->brp", u, reference.jacobian(p.model(), x))
    assert reference.relative_error(rows, expected) < 1e-13
    with pytest.raises(ShapeError, match=r"expected \(4, 'R', 3, 3\), got \(4, 3, 3\)"):
        next(J.example_rows(network, selection, x, u[:, 0]))


class Mixing(nn.Module):
    """Outputs relative to the batch's mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return h - h.mean(0)


def test_examples_that_mix_follow_the_definition():
    model, x = Mixing(), randn(4, 3)
    network, selection = Network(model), ParameterSelection(model)
    expected = torch.stack([reference.gradient(entry, list(model.parameters())) for entry in model(x).reshape(-1)])
    for enable_backprop in (False, True):
        rows, f = J.jacobians(network, selection, x, enable_backprop=enable_backprop)
        assert reference.relative_error(rows.detach().reshape(8, -1), expected) < 1e-13
        assert torch.equal(f.detach(), model(x).detach())
    with pytest.raises(UnsupportedError, match="depend on the other examples"):
        J.jacobians(network, selection, x, road="example")


def test_a_parameter_reached_beside_its_registration_is_not_lost():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.held = [self.layer.weight]

        def forward(self, x):
            return torch.tanh(self.layer(x)) @ self.held[0]

    model, x = Beside(), randn(4, 3)
    rows, _ = J.jacobians(Network(model), ParameterSelection(model), x)
    assert reference.relative_error(rows, reference.jacobian(model, x)) < 1e-13


@pytest.mark.parametrize("seen", [1, 3])
def test_an_operation_whose_batching_rule_errs(seen):
    """PReLU: column r of example n is taken at the inputs of example r, which shows in no column but one of `seen`."""
    model = nn.Sequential(nn.Linear(2, 1), nn.PReLU(), nn.Linear(1, 3)).double()
    x, u = randn(4, 4, 2), torch.zeros(4, 4, 4, 3, dtype=torch.float64)
    for n in range(4):
        columns = range(4) if n < seen - 1 else [n]
        for r in columns:
            u[n, r, r] = randn(3) * (n + 1)  # a position of its own; the last example has the largest
    ((_, rows, _),) = J.example_rows(Network(model), selection := ParameterSelection(model), x, u)
    f = model(x)
    for n in range(4):
        for r in range(4):
            grads = torch.autograd.grad(f[n], selection.tensors, u[n, r], retain_graph=True)
            expected = torch.cat([g.flatten() for g in grads])
            assert float((rows[n, r] - expected).abs().max()) <= 1e-13 * max(1.0, float(expected.abs().max()))


def test_code_that_branches_on_values():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x):
            return torch.cat([self.layer(r) * (2 if r[0, 0].item() > 0 else 1) for r in x.split(1)])

    model, x = Branching(), randn(4, 3)
    rows, _ = J.jacobians(Network(model), ParameterSelection(model), x)
    assert reference.relative_error(rows, reference.jacobian(model, x)) < 1e-13


class TestBackprop:
    @pytest.mark.parametrize("name", ["mlp", "layernorm", "gru", "sdpa", "frozen", "subnetwork", "tied"])
    def test_values(self, name):
        p = problem(name)
        model, network, selection = pieces(p)
        x = p.data()[0]
        with untouched(model):
            rows, f = J.jacobians(network, selection, x, enable_backprop=True)
        assert rows.requires_grad
        assert f.requires_grad
        assert reference.relative_error(rows.detach(), reference.jacobian(p.model(), x, p.params)) < 1e-13

    @pytest.mark.parametrize("name", ["mlp", "layernorm", "lstm"])
    def test_derivative_in_x_and_parameters(self, name):
        p = problem(name)
        model, network, selection = pieces(p)
        x = p.data()[0][:2].requires_grad_()
        weights = randn(2, 3, selection.size)
        rows, _ = J.jacobians(network, selection, x, enable_backprop=True)
        value = (rows * weights).sum()
        parameter = next(model.parameters())
        gx, gp = torch.autograd.grad(value, [x, parameter])
        step = 1e-6
        direction = randn(*x.shape)

        def at(h):
            return (reference.jacobian(model, x.detach() + h * direction) * weights).sum()

        assert float((gx * direction).sum()) == pytest.approx(float((at(step) - at(-step)) / (2 * step)), rel=1e-6)
        shift = randn(*parameter.shape)

        def moved(h):
            other = p.model()
            with torch.no_grad():
                next(other.parameters()).add_(h * shift)
            return (reference.jacobian(other, x.detach()) * weights).sum()

        assert float((gp * shift).sum()) == pytest.approx(float((moved(step) - moved(-step)) / (2 * step)), rel=1e-6)

    def test_under_no_grad(self):
        p = problem("mlp")
        _, network, selection = pieces(p)
        with torch.no_grad():
            rows, _ = J.jacobians(network, selection, p.data()[0], enable_backprop=True)
        assert rows.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp", "lstm", "embeddingbag-sum", "keywords"])
def test_under_no_grad_and_inference_mode(mode, name):
    p = problem(name)
    expected = reference.jacobian(p.model(), p.data()[0])
    _, network, selection = pieces(p)
    with mode():
        rows, _ = J.jacobians(network, selection, p.data()[0])
    assert reference.relative_error(rows.clone(), expected) < 1e-13


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_everything_as_it_was(error):
    p = problem("mlp")
    model, network, selection = pieces(p)
    calls = []

    def second_call_fails(*_):
        calls.append(1)
        if len(calls) >= 2:
            raise error("planted")

    model[2].register_forward_hook(second_call_fails)
    with untouched(model), pytest.raises(error):
        J.jacobians(network, selection, p.data()[0])
    assert len(calls) >= 2
