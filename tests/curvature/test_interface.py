"""The interface: scales, shapes, passes, choices of parameters, randomness and refusals."""

from __future__ import annotations

from collections import UserDict
from enum import Enum
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.curvature import CurvatureInterface, EFInterface, GGNInterface, HessianInterface
from curvops.errors import (
    DataError,
    MemoryBudgetError,
    NonDeterministicDataError,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
)
from curvops.testing import problems

NATIVE = [GGNInterface, EFInterface, HessianInterface]
NAMES = [
    "mlp", "mlp-regression", "mlp-binary", "mlp-weighted", "conv2d", "tied", "frozen", "raw-parameters", "keywords",
    "dictionary", "tokens-ignored-weighted", "tokens-regression", "last-layer", "subnetwork",
]  # fmt: skip
unused = pytest.mark.filterwarnings("ignore:the outputs do not depend on")


def made(cls: type[CurvatureInterface], name: str, **more: Any) -> tuple[Any, Any, Tensor, nn.Module, Any, Any]:
    """Interface, x, y, oracle model, oracle loss and oracle params of a problem."""
    p = problems.problem(name)
    x, y = p.data()
    if name == "dictionary":
        more["dict_key_x"] = "a"
    if name == "last-layer":
        more["last_layer"] = True
    if name == "subnetwork":
        more["subnetwork_indices"] = p.params
    return cls(p.model(), p.loss(), **more), x, y, p.oracle_model(), reference.problem_nll(p), p.params


def dense(cls: type, model: nn.Module, loss: Any, x: Any, y: Tensor, params: Any, factor: float) -> Tensor:
    if issubclass(cls, GGNInterface):
        return reference.ggn(model, loss, x, y, params)
    if issubclass(cls, EFInterface):
        return reference.empirical_fisher(model, loss, x, y, params) / factor
    return reference.hessian(model, loss, x, y, params)


class Counted(nn.Module):
    """Counts forwards, and backwards through its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.forwards, self.backwards, self.graphs = 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        f = self.layer(x)
        self.graphs += f.requires_grad
        if f.requires_grad:
            f.register_hook(self._count)
        return f

    def _count(self, g: Tensor) -> None:
        self.backwards += 1


# ---------------------------------------------------------------- values


@unused
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", NATIVE)
def test_full_and_diag_against_oracles(cls: type, name: str) -> None:
    backend, x, y, model, nll, params = made(cls, name)
    wanted = dense(cls, model, nll, x, y, params, backend.factor)
    loss, H = backend.full(x, y)
    assert reference.relative_error(H.to_dense(), wanted) < 1e-9
    assert loss.shape == ()
    assert not loss.requires_grad
    assert reference.relative_error(loss, nll(reference.outputs(model, x), y).detach()) < 1e-12
    loss, D = backend.diag(x, y)
    assert D.shape == H.shape
    assert reference.relative_error(D.diagonal(), wanted.diagonal()) < 1e-9
    assert reference.relative_error(loss, nll(reference.outputs(model, x), y).detach()) < 1e-12


@unused
@pytest.mark.parametrize("name", NAMES)
def test_jacobians_and_gradients_against_oracles(name: str) -> None:
    backend, x, y, model, nll, params = made(GGNInterface, name)
    f_wanted = reference.outputs(model, x).detach()
    J_wanted = reference.jacobian(model, x, params)
    for method in (backend.jacobians, backend.functorch_jacobians):
        J, f = method(x)
        assert J.shape == (*f.shape, J_wanted.shape[-1])
        assert reference.relative_error(J, J_wanted) < 1e-10
        assert reference.relative_error(f, f_wanted) < 1e-12
        assert not J.requires_grad
    G, loss = backend.gradients(x, y)
    assert reference.relative_error(G, reference.gradients(model, nll, x, y, params) / backend.factor) < 1e-10
    assert reference.relative_error(loss, nll(f_wanted, y) / backend.factor) < 1e-12
    assert loss.shape == ()
    assert not loss.requires_grad
    assert not G.requires_grad


def test_empirical_fisher_of_a_regression_is_twice_that_of_the_likelihood() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    model = p.model()
    mine = EFInterface(model, "regression").full(x, y)[1].to_dense()
    theirs = co.EmpiricalFisher(model, "regression", (x, y)).to_dense()
    assert torch.allclose(mine, 2 * theirs, atol=1e-12)
    G, _ = EFInterface(model, "regression").gradients(x, y)
    assert torch.allclose(mine, 0.5 * G.T @ G, atol=1e-10)


def test_enable_backprop_reaches_inputs() -> None:
    p = problems.problem("mlp-regression")
    x, _ = p.data()
    x = x.requires_grad_()
    backend = GGNInterface(p.model(), "regression")
    J, f = backend.jacobians(x, enable_backprop=True)
    assert torch.allclose(J, backend.jacobians(x)[0], atol=1e-12)
    direction = torch.ones_like(J)
    (g,) = torch.autograd.grad((J * direction).sum() + f.sum(), x)
    eps = 1e-6
    moved = x.detach().clone()
    moved[0, 0] += eps
    J2, f2 = backend.jacobians(moved)
    slope = ((J2 - J.detach()).sum() + (f2 - f.detach()).sum()) / eps
    assert abs(float(slope - g[0, 0])) < 1e-4 * (1 + abs(float(slope)))


def test_selected_output_jacobians() -> None:
    p = problems.problem("mlp")
    x, _ = p.data()
    backend = GGNInterface(p.model(), "classification")
    J, f = backend.jacobians(x)
    which = torch.tensor([2, 0, 1, 1])
    rows, f2 = backend.selected_output_jacobians(x, which)
    assert rows.shape == (4, 1, J.shape[-1])
    assert torch.allclose(rows[:, 0], J[torch.arange(4), which], atol=1e-12)
    assert torch.equal(f, f2)
    two = torch.stack([which, which.flip(0)], 1)
    for backprop in (False, True):
        rows, _ = backend.selected_output_jacobians(x, two, enable_backprop=backprop)
        assert torch.allclose(rows, J.gather(1, two[..., None].expand(4, 2, J.shape[-1])), atol=1e-12)
    with pytest.raises(DataError, match="reach from"):
        backend.selected_output_jacobians(x, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ShapeError, match=r"\(B,\)"):
        backend.selected_output_jacobians(x, torch.tensor([0]))


def test_float32() -> None:
    p = problems.problem("mlp")
    x, y = p.data(torch.float32)
    backend = GGNInterface(p.model(torch.float32), "classification")
    loss, H = backend.full(x, y)
    assert loss.dtype == H.dtype == torch.float32
    wanted = reference.ggn(p.model(), reference.problem_nll(p), *p.data())
    assert reference.relative_error(H.to_dense().double(), wanted) < 5e-6


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("cls", [*NATIVE, co.CurvlinopsGGN, co.CurvlinopsEF, co.CurvlinopsHessian])
@pytest.mark.parametrize("method", ["full", "diag", "kron"])
def test_one_forward_without_graph_at_the_call(cls: type, method: str) -> None:
    if method == "kron" and issubclass(cls, HessianInterface):
        pytest.skip("a Hessian has no Kronecker factors")
    model = Counted()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    for stochastic in {False, issubclass(cls, GGNInterface)}:
        backend = cls(model, "classification", **({"stochastic": True} if stochastic else {}))
        model.forwards = model.graphs = model.backwards = 0
        _, operator = getattr(backend, method)(x, y, N=5)
        repr(operator), operator.describe(), operator.explain("logdet")
        assert operator.shape == (8, 8)
        assert (model.forwards, model.graphs, model.backwards) == (1, 0, 0)


def test_diagonal_is_computed_once() -> None:
    model = Counted()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    _, D = GGNInterface(model, "classification").diag(x, y)
    D.diagonal()
    seen = model.forwards
    D.add_diagonal(1.0).logdet()
    D @ torch.ones(8, dtype=torch.float64)
    assert model.forwards == seen


def test_nothing_of_the_users_is_touched() -> None:
    p = problems.problem("batchnorm1d")
    x, y = p.data()
    model = p.model()
    with untouched(model):
        for cls in NATIVE:
            backend = cls(model, "classification")
            backend.full(x, y)[1].to_dense()
            backend.diag(x, y)[1].diagonal()
            backend.jacobians(x)
            backend.gradients(x, y)
            with pytest.raises(ShapeError):
                backend.full(x, y[:, None])


def test_a_later_change_is_caught() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model = p.model()
    backend = GGNInterface(model, "classification")
    _, H = backend.full(x, y)
    _, D = backend.diag(x, y)
    x.add_(1.0)
    with pytest.raises(StaleOperatorError, match="data tensor x"):
        H.to_dense()
    x, y = p.data()
    _, D = backend.diag(x, y)
    with torch.no_grad():
        model[0].weight.mul_(2.0)  # type: ignore[operator]
    with pytest.raises(StaleOperatorError, match=r"0\.weight"):
        D.diagonal()


class Switched(nn.Module):
    """Depends on an attribute that nothing watches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 3).double(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.layer(x)


@pytest.mark.parametrize("cls", [GGNInterface, HessianInterface, co.CurvlinopsGGN])
@pytest.mark.parametrize("method", ["full", "diag"])
def test_outputs_that_differ_from_those_of_the_loss_are_caught(cls: type, method: str) -> None:
    x, y = problems.problem("mlp").data()
    model = Switched()
    _, operator = getattr(cls(model, "classification"), method)(x, y)
    model.gain = 2.0
    with pytest.raises(NonDeterministicDataError, match="batch 0 differ"):
        operator.to_dense()


# ---------------------------------------------------------------- which parameters


@pytest.mark.parametrize("cls", NATIVE)
def test_subnetwork_may_be_set_later(cls: type) -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    backend = cls(p.model(), "classification")
    whole = backend.full(x, y)[1].to_dense()
    d, J, G = backend.diag(x, y)[1].diagonal(), backend.jacobians(x)[0], backend.gradients(x, y)[0]
    indices = torch.tensor([7, 3, 30])
    backend.subnetwork_indices = indices
    assert torch.allclose(backend.full(x, y)[1].to_dense(), whole[indices][:, indices], atol=1e-12)
    assert torch.allclose(backend.diag(x, y)[1].diagonal(), d[indices], atol=1e-12)
    assert torch.allclose(backend.jacobians(x)[0], J[..., indices], atol=1e-12)
    assert torch.allclose(backend.gradients(x, y)[0], G[:, indices], atol=1e-12)
    with pytest.raises(UnsupportedError):
        backend.kron(x, y, N=4)
    for wrong in (torch.tensor([3, 3]), torch.tensor([99]), torch.tensor([0.5]), [1, 2]):
        with pytest.raises((DataError, ShapeError)):
            backend.subnetwork_indices = wrong
        assert backend.subnetwork_indices is indices
    backend.subnetwork_indices = None
    assert torch.equal(backend.full(x, y)[1].to_dense(), whole)


def test_last_layer_restricts_every_method() -> None:
    p = problems.problem("last-layer")
    x, y = p.data()
    model = p.model()
    whole = GGNInterface(model, "classification")
    last = GGNInterface(model, "classification", last_layer=True)
    size = sum(q.numel() for q in model.last_layer.parameters())  # type: ignore[union-attr]
    H = whole.full(x, y)[1].to_dense()
    assert torch.allclose(last.full(x, y)[1].to_dense(), H[-size:, -size:], atol=1e-12)
    assert last.diag(x, y)[1].shape == (size, size)
    assert torch.allclose(last.jacobians(x)[0], whole.jacobians(x)[0][..., -size:], atol=1e-12)
    assert torch.allclose(whole.last_layer_jacobians(x)[0], last.jacobians(x)[0], atol=1e-12)
    assert torch.allclose(last.last_layer_jacobians(x)[0], last.jacobians(x)[0], atol=1e-12)
    assert torch.allclose(last.gradients(x, y)[0], whole.gradients(x, y)[0][:, -size:], atol=1e-12)
    assert list(last.params_dict) == ["last_layer.weight", "last_layer.bias"]
    assert [id(q) for q in last.params] == [id(q) for q in model.last_layer.parameters()]  # type: ignore[union-attr]
    last.subnetwork_indices = torch.tensor([2, 0])
    assert torch.allclose(last.diag(x, y)[1].diagonal(), H.diagonal()[-size:][[2, 0]], atol=1e-12)
    with pytest.raises(DataError, match="last layer"):
        last.subnetwork_indices = torch.tensor([size])


def test_last_layer_needs_one() -> None:
    with pytest.raises(DataError, match="FeatureExtractor"):
        GGNInterface(nn.Linear(2, 2), "classification", last_layer=True)


def test_attributes_of_old() -> None:
    p = problems.problem("batchnorm1d")
    model = p.model()
    backend = GGNInterface(model, "regression", False, None, "x", "y", True, 3)
    assert isinstance(backend.lossfunc, nn.MSELoss)
    assert backend.lossfunc.reduction == "sum"
    assert (backend.factor, backend.likelihood, backend.last_layer) == (0.5, "regression", False)
    assert (backend.dict_key_x, backend.dict_key_y, backend.stochastic, backend.num_samples) == ("x", "y", True, 3)
    assert [id(q) for q in backend.params] == [id(q) for q in model.parameters()]
    assert list(backend.params_dict) == [n for n, _ in model.named_parameters()]
    assert set(backend.buffers_dict) == {n for n, _ in model.named_buffers()}
    assert GGNInterface(model, "classification").factor == 1.0


# ---------------------------------------------------------------- inputs


def test_mappings_as_inputs() -> None:
    p = problems.problem("keywords")
    x, y = p.data()
    backend = GGNInterface(p.model(), "classification")
    plain = backend.full(x, y)[1].to_dense()
    with_targets = backend.full(UserDict({**x, "labels": y}), y)[1].to_dense()
    assert torch.equal(plain, with_targets)
    assert torch.equal(backend.jacobians({**x, "labels": y})[0], backend.jacobians(x)[0])
    with pytest.raises(DataError, match="dict_key_x"):
        backend.full({"ids": x["input_ids"]}, y)


class Names(str, Enum):
    CLASSIFICATION = "classification"
    REWARD = "reward_modeling"


def test_likelihoods_and_refusals() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model = p.model()
    by_name = GGNInterface(model, "classification").full(x, y)[1].to_dense()
    assert torch.equal(GGNInterface(model, Names.CLASSIFICATION).full(x, y)[1].to_dense(), by_name)
    for wrong in ("reward_modeling", Names.REWARD):
        with pytest.raises(UnsupportedError, match="regression"):
            GGNInterface(model, wrong)
    with pytest.raises(DataError, match="likelihood"):
        GGNInterface(model, "poisson")
    backend = GGNInterface(model, "classification")
    with pytest.raises(TypeError, match="mc_samples"):
        backend.full(x, y, mc_samples=3)
    with pytest.raises(TypeError, match="unknown"):
        backend.diag(x, y, damping=1.0)
    with pytest.raises(TypeError, match="damping"):
        backend.kron(x, y, N=4, damping=1.0)
    assert backend.full(x, y, N=1000)[1].shape == (35, 35)
    one = GGNInterface(problems.problem("mlp-binary-one").model(), "regression")
    with pytest.raises(ShapeError, match="unsqueeze"):
        one.full(x, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(DataError):
        backend.full(x, y + 100)
    with pytest.raises(DataError):
        backend.full(x[:0], y[:0])
    with pytest.raises(DataError, match="NaN"):
        backend.full(x * float("nan"), y)
    with pytest.raises(DataError, match="NaN"):
        backend.jacobians(x * float("nan"))
    with pytest.raises(DataError, match="targets"):
        backend.full(x, [0, 1, 2, 0])
    with pytest.raises(UnsupportedError, match="which curvature"):
        CurvatureInterface(model, "classification").full(x, y)
    with pytest.raises(UnsupportedError, match="GGNInterface"):
        HessianInterface(model, "classification").kron(x, y, N=4)
    with pytest.raises(ValueError, match="num_samples"):
        GGNInterface(model, "classification", num_samples=0)
    with pytest.raises(ValueError, match="num_samples=0: expected a whole number"):
        GGNInterface(model, "classification").num_samples = 0


def test_memory_budget() -> None:
    p = problems.problem("mlp")
    x, _ = p.data()
    backend = GGNInterface(p.model(), "classification")
    wanted, _ = backend.jacobians(x)
    backend.memory_budget = 2 * wanted.numel() * 8
    assert torch.allclose(backend.jacobians(x)[0], wanted, atol=1e-12)
    backend.memory_budget = 100
    with pytest.raises(MemoryBudgetError, match=r"co\.Jacobian"):
        backend.jacobians(x)


# ---------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "mlp-binary", "tokens"])
def test_functional_fisher_averages_to_the_output_hessian(name: str) -> None:
    p = problems.problem(name)
    x, _ = p.data()
    backend = GGNInterface(p.model(), p.likelihood, stochastic=True, num_samples=2_000, generator=seeded(0))
    f = backend.jacobians(x)[1]
    F = backend._get_mc_functional_fisher(f)
    wanted = backend._get_functional_hessian(f)
    if wanted is None:
        wanted = torch.eye(f.shape[-1], dtype=f.dtype).expand(*f.shape, f.shape[-1])
    assert F.shape == (*f.shape, f.shape[-1])
    # Entries of g gᵀ have a standard deviation of at most about √2 (regression's diagonal): five standard errors.
    assert float((F - wanted).abs().max()) < 5 * 1.5 / 2_000**0.5


def test_functional_fisher_refuses_what_f_does_not_tell() -> None:
    p = problems.problem("mlp-weighted")
    f = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="MCFisher"):
        GGNInterface(p.model(), p.loss())._get_mc_functional_fisher(f)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cls", [GGNInterface, co.CurvlinopsGGN])
@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "mlp-weighted"])
def test_stochastic_curvatures_average_to_the_ggn(cls: type, name: str) -> None:
    p = problems.problem(name)
    x, y = p.data()
    backend = cls(p.model(), p.loss(), stochastic=True, num_samples=50, generator=seeded(1))
    wanted = reference.ggn(p.model(), reference.problem_nll(p), x, y)
    draws = torch.stack([backend.full(x, y)[1].to_dense() for _ in range(8)])
    error = (draws.mean(0) - wanted).norm()
    stderr = draws.std(0).norm() / 8**0.5
    assert float(error) < 3 * float(stderr)
    assert float(stderr) > 0
    diagonals = torch.stack([backend.diag(x, y)[1].diagonal() for _ in range(8)])
    assert float((diagonals.mean(0) - wanted.diagonal()).norm()) < 3 * float(diagonals.std(0).norm()) / 8**0.5


def test_calls_draw_anew_and_operators_stay() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    before = torch.get_rng_state()
    # Few data and few classes: draws from the system's seed would coincide once in some hundred runs.
    backend = GGNInterface(p.model(), "classification", stochastic=True, generator=seeded(1))
    _, one = backend.full(x, y)
    _, two = backend.full(x, y)
    assert not torch.equal(one.to_dense(), two.to_dense())
    assert torch.equal(one.to_dense(), one.to_dense())
    again = [
        GGNInterface(p.model(), "classification", stochastic=True, generator=seeded(3)).full(x, y)[1].to_dense()
        for _ in range(2)
    ]
    assert torch.equal(again[0], again[1])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- Kronecker factors, native


@pytest.mark.parametrize("cls", [GGNInterface, EFInterface])
def test_native_factors_of_batches_add_up(cls: type) -> None:
    p = problems.problem("mlp-regression")
    (x1, y1), (x2, y2) = p.data(batch=0), p.data(batch=1)
    backend = cls(p.model(), "regression")
    whole = backend.kron(torch.cat([x1, x2]), torch.cat([y1, y2]), N=8)[1]
    parts = [backend.kron(x, y, N=8)[1] for x, y in ((x1, y1), (x2, y2))]
    A = layer_inputs(p.model(), torch.cat([x1, x2]))
    # The block of the last weight is B ⊗ A, with A the mean of the layer's inputs and B the block of the last bias.
    size = p.model()[2].weight.numel()  # type: ignore[union-attr]
    dense_parts = [part.to_dense() for part in parts]
    B = sum(d[-2:, -2:] for d in dense_parts)
    block = whole.to_dense()[-2 - size : -2, -2 - size : -2]
    assert torch.allclose(block, torch.kron(B, A.T @ A / 8), atol=1e-10)
    assert reference.relative_error(parts[0].merge(parts[1]).to_dense(), whole.to_dense()) < 1e-12


def layer_inputs(model: Any, x: Tensor) -> Tensor:
    """What goes into the last layer of the two-layer network."""
    return torch.tanh(model[0](x)).detach()


def test_native_kron_is_exact_for_one_datum_and_every_scale() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    x, y = x[:1], y[:1]
    model = p.model()
    ggn = GGNInterface(model, "regression").kron(x, y, N=1)[1].to_dense()
    ef = EFInterface(model, "regression").kron(x, y, N=1)[1].to_dense()
    J = reference.jacobian(model, x)[0]
    r = (reference.outputs(model, x) - y).detach()[0]
    sizes = [q.numel() for q in model.parameters()]
    for wanted, got in ((J.T @ J, ggn), (2 * torch.outer(J.T @ r, J.T @ r), ef)):
        start = 0
        for size in sizes:
            here = slice(start, start + size)
            assert torch.allclose(got[here, here], wanted[here, here], atol=1e-10)
            start += size
