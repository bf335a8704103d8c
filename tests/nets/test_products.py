from __future__ import annotations

import gc
import weakref

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from untouched import untouched

from curvops.errors import (
    CurvopsError,
    NumericalWarning,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.nets.products import HessianProduct, Linearisation
from curvops.testing.problems import Problem, problem, problems

EVERY = pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


class Loss:
    """The likelihood protocol over a reference loss."""

    def __init__(self, p: Problem, dtype: torch.dtype = torch.float64) -> None:
        self.loss = reference.problem_nll(p, dtype)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)


def linearised(p: Problem, dtype: torch.dtype = torch.float64, **options) -> Linearisation:
    model = p.model(dtype)
    return Linearisation(Network(model), ParameterSelection(model, p.params), p.data(dtype)[0], **options)


def hessian_product(p: Problem, dtype: torch.dtype = torch.float64) -> HessianProduct:
    model = p.model(dtype)
    return HessianProduct(Network(model), ParameterSelection(model, p.params), Loss(p, dtype), *p.data(dtype))


@EVERY
def test_products_with_the_jacobian(p, dtype):
    model, (x, _) = p.model(), p.data()
    J = reference.jacobian(model, x, p.params)
    lin = linearised(p, dtype)
    assert lin.outputs.dtype == dtype
    assert not lin.outputs.requires_grad
    for columns in (1, 3):
        V = randn(J.shape[-1], columns)
        U = randn(*J.shape[:-1], columns)
        forward = lin.jvp(V.to(dtype))
        backward = lin.vjp(U.to(dtype))
        assert forward.dtype == backward.dtype == dtype
        assert reference.relative_error(forward.double(), J @ V) < TOLERANCE[dtype]
        expected = torch.einsum("...p,...k->pk", J.flatten(0, -2), U.flatten(0, -2))
        assert reference.relative_error(backward.double(), expected) < TOLERANCE[dtype]


@EVERY
def test_hessian(p, dtype):
    x, y = p.data()
    H = reference.hessian(p.oracle_model(), reference.problem_nll(p), x, y, p.params)
    product = hessian_product(p, dtype)
    for columns in (1, 3):
        V = randn(len(H), columns)
        assert reference.relative_error(product.matmat(V.to(dtype)).double(), H @ V) < TOLERANCE[dtype]
    g = reference.gradients(p.model(), reference.problem_nll(p), x, y, p.params).sum(0)
    assert reference.relative_error(product.gradient.double(), g) < TOLERANCE[dtype]
    assert product.loss.ndim == 0
    f = reference.outputs(p.model(), x)
    assert float(product.loss) == pytest.approx(float(reference.problem_nll(p)(f, y).detach()), rel=TOLERANCE[dtype])


@EVERY
def test_the_users_things_stay(p):
    model, (x, y) = p.model(), p.data()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    selection = ParameterSelection(model, p.params)
    with untouched(model):
        lin = Linearisation(Network(model), selection, x)
        lin.jvp(randn(selection.size, 2))
        lin.vjp(randn(*lin.outputs.shape, 2))
        HessianProduct(Network(model), selection, Loss(p), x, y).matmat(randn(selection.size, 2))
    assert all(b is None or not b.requires_grad for b in model.buffers())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp", "layernorm", "lstm", "sdpa", "embeddingbag-mean", "keywords"])
def test_under_no_grad_and_inference_mode(mode, name):
    p = problem(name)
    model = p.model()
    J = reference.jacobian(model, p.data()[0])
    with mode():
        x, y = p.data()  # tensors made in this mode
        selection = ParameterSelection(model)
        lin = Linearisation(Network(model), selection, x)
        V, U = randn(selection.size, 2), randn(*lin.outputs.shape, 2)
        forward, backward = lin.jvp(V), lin.vjp(U)
        H = HessianProduct(Network(model), selection, Loss(p), x, y).matmat(V)
    assert reference.relative_error(forward.clone(), J @ V) < 1e-13
    assert reference.relative_error(backward.clone(), torch.einsum("...p,...k->pk", J, U)) < 1e-13
    expected = reference.hessian(p.oracle_model(), reference.problem_nll(p), *p.data())
    assert reference.relative_error(H.clone(), expected @ V) < 1e-13


class TestColumns:
    def test_vectorised_and_looped_agree(self):
        for name in ("mlp", "transformer-encoder", "gru", "tied"):
            vectorised, looped = linearised(problem(name)), linearised(problem(name))
            looped.batched = False
            V = randn(vectorised.selection.size, 4)
            assert reference.relative_error(vectorised.jvp(V), looped.jvp(V)) < 1e-14
            assert vectorised.batched is True
            U = randn(*vectorised.outputs.shape, 4)
            assert reference.relative_error(vectorised.vjp(U), looped.vjp(U)) < 1e-14

    @pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "language-model", "transformer-encoder"])
    def test_in_turn_each_is_what_it_is_alone(self, name):
        lin, p = linearised(problem(name)), problem(name)
        H = hessian_product(p)
        lin.batched = H.batched = False
        rows = randn(4, lin.selection.size)
        V, before = rows.T, rows.clone()
        for product in (lambda V: lin.sandwich(V, torch.tanh), H.matmat):
            together = product(V)
            alone = torch.cat([product(V[:, k : k + 1]) for k in range(4)], 1)
            assert reference.relative_error(together, alone) < 1e-14
            assert torch.equal(together, product(V))  # to the bit
            assert torch.equal(rows, before)

    @pytest.mark.parametrize("batched", [True, False])
    def test_sandwich(self, batched):
        for name in ("mlp", "tied", "sdpa"):
            p = problem(name)
            lin = linearised(p)
            lin.batched = batched
            J = reference.jacobian(p.model(), p.data()[0])
            V = randn(J.shape[-1], 3)
            expected = torch.einsum("...p,...k->pk", J, 2 * (J @ V))
            assert reference.relative_error(lin.sandwich(V, lambda U: 2 * U), expected) < 1e-13

    def test_columns_with_much_arithmetic_take_turns(self):
        model = nn.Sequential(nn.Linear(8, 1100, bias=False), nn.Linear(1100, 2, bias=False))
        for rows, batched in ((64, True), (1024, False)):
            lin = Linearisation(Network(model), ParameterSelection(model, ["1"]), torch.zeros(rows, 8))
            lin.vjp(torch.zeros(rows, 2, 3))
            assert lin.batched is batched

    def test_an_operation_without_batching_rule_loops_and_is_right(self):
        model = nn.Sequential(nn.Linear(3, 2), Cubed(), nn.Linear(2, 2)).double()
        x = randn(4, 3)
        lin = Linearisation(Network(model), ParameterSelection(model), x)
        J = reference.jacobian(model, x)
        V = randn(J.shape[-1], 3)
        assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13
        assert lin.batched is False
        U = randn(4, 2, 3)
        assert reference.relative_error(lin.vjp(U), torch.einsum("bcp,bck->pk", J, U)) < 1e-13

    def test_no_columns(self):
        lin = linearised(problem("mlp"))
        assert lin.jvp(randn(35, 0)).shape == (4, 3, 0)
        assert lin.vjp(randn(4, 3, 0)).shape == (35, 0)

    @pytest.mark.parametrize("wrong", [(34, 1), (35,), (35, 1, 1)])
    def test_wrong_length(self, wrong):
        with pytest.raises(ShapeError, match=r"jvp: expected \(35, 'K'\)"):
            linearised(problem("mlp")).jvp(randn(*wrong))

    def test_wrong_outputs(self):
        with pytest.raises(ShapeError, match=r"vjp: expected \(4, 3, 'K'\), got \(4, 3\)"):
            linearised(problem("mlp")).vjp(randn(4, 3))

    def test_wrong_dtype(self):
        with pytest.raises(ShapeError, match=r"expected torch\.float64 on cpu, got torch\.float32"):
            linearised(problem("mlp")).jvp(randn(35, 1, dtype=torch.float32))


class _Cube(torch.autograd.Function):
    """x³ through NumPy, which knows no vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return _CubeBackward.apply(x, g)


class _CubeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return torch.from_numpy(3 * x.numpy() ** 2 * g.numpy())

    @staticmethod
    def backward(ctx, h):
        x, g = ctx.saved_tensors
        return 6 * x * g * h, torch.from_numpy(3 * x.detach().numpy() ** 2 * h.numpy())


class Cubed(nn.Module):
    def forward(self, x):
        return _Cube.apply(x)


class TestIndependence:
    def test_output_that_depends_on_nothing_selected(self):
        model = nn.Sequential(nn.Linear(3, 2)).double()
        model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        with pytest.warns(NumericalWarning, match="none of the selected parameters"):
            lin = Linearisation(Network(model), ParameterSelection(model, ["extra"]), randn(4, 3))
        assert torch.equal(lin.jvp(randn(2, 3)), torch.zeros(4, 2, 3, dtype=torch.float64))
        assert torch.equal(lin.vjp(randn(4, 2, 3)), torch.zeros(2, 3, dtype=torch.float64))

    def test_hessian_of_a_linear_loss_is_zero(self):
        class Linear:
            def loss(self, f, y):
                return f.sum()

        model = nn.Linear(3, 2).double()
        product = HessianProduct(Network(model), ParameterSelection(model), Linear(), randn(4, 3), randn(4, 2))
        assert torch.equal(product.matmat(randn(8, 2)), torch.zeros(8, 2, dtype=torch.float64))
        assert product.gradient[6:].tolist() == [4.0, 4.0]


class TestHooks:
    def test_parameter_hooks_neither_run_nor_rewrite(self):
        p = problem("mlp")
        model, (x, y) = p.model(), p.data()
        J, H = reference.jacobian(model, x), reference.hessian(model, reference.problem_nll(p), x, y)
        seen = []
        handle = model[0].weight.register_hook(lambda g: seen.append(1) or g * 100)
        selection = ParameterSelection(model)
        with untouched(model):
            lin = Linearisation(Network(model), selection, x)
            I = torch.eye(35, dtype=torch.float64)
            assert reference.relative_error(lin.jvp(I), J) < 1e-13
            assert (
                reference.relative_error(lin.vjp(randn(4, 3, 2)), torch.einsum("bcp,bck->pk", J, randn(4, 3, 2)))
                < 1e-13
            )
            product = HessianProduct(Network(model), selection, Loss(p), x, y)
            assert reference.relative_error(product.matmat(I), H) < 1e-13
        assert not seen
        model(x).sum().backward()
        assert seen == [1]
        handle.remove()
        model(x).sum().backward()
        assert seen == [1]

    def test_module_backward_hooks_neither_run_nor_rewrite(self):
        p = problem("mlp")
        model, (x, _) = p.model(), p.data()
        J = reference.jacobian(model, x)
        seen = []
        model[0].register_full_backward_hook(
            lambda m, gi, go: seen.append("after") or tuple(g * 9 if g is not None else g for g in gi)
        )
        model[2].register_full_backward_pre_hook(lambda m, go: seen.append("before") or tuple(g * 9 for g in go))
        with untouched(model):
            lin = Linearisation(Network(model), ParameterSelection(model), x)
            assert reference.relative_error(lin.jvp(torch.eye(35, dtype=torch.float64)), J) < 1e-13
        assert not seen

    def test_forward_hooks_are_part_of_the_function(self):
        model = problem("mlp").model()
        model[1].register_forward_hook(lambda m, i, o: 2 * o)
        x = problem("mlp").data()[0]
        with untouched(model):
            lin = Linearisation(Network(model), ParameterSelection(model), x)
            V = randn(35, 2)
            assert reference.relative_error(lin.jvp(V), reference.jacobian(model, x) @ V) < 1e-13

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("name", ["mlp", "lstm", "embeddingbag-mean", "frozen", "last-layer"])
    def test_an_exception_in_the_forward_leaves_everything_as_it_was(self, error, name):
        p = problem(name)
        model, (x, _) = p.model(), p.data()
        calls = []

        def second_call_fails(*_):
            calls.append(1)
            if len(calls) == 2:
                raise error("planted")

        list(model.modules())[-1].register_forward_hook(second_call_fails)
        selection = ParameterSelection(model, p.params)
        with untouched(model):
            Linearisation(Network(model), selection, x)
            with pytest.raises(error, match="planted"):
                Linearisation(Network(model), selection, x)
        assert len(calls) == 2

    def test_an_exception_in_the_backward_leaves_everything_as_it_was(self):
        p = problem("mlp")
        model, (x, _) = p.model(), p.data()
        fail = []

        class Explosive(torch.autograd.Function):
            @staticmethod
            def forward(ctx, f):
                return f.clone()

            @staticmethod
            def backward(ctx, g):
                if fail:
                    raise KeyboardInterrupt
                return g

        model[1].register_forward_hook(lambda m, i, o: Explosive.apply(o))
        model[0].weight.register_hook(lambda g: g)
        selection = ParameterSelection(model)
        with untouched(model):
            lin = Linearisation(Network(model), selection, x)
            fail.append(1)
            with pytest.raises(KeyboardInterrupt):
                lin.vjp(randn(4, 3, 1))


class TestGraph:
    def test_bytes_count_what_is_saved_once(self):
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).double()
        x = randn(16, 64)
        lin = Linearisation(Network(model), ParameterSelection(model), x)
        # The input of each linear layer; tanh saves its output, which is the second one.
        assert lin.graph_bytes == 8 * 16 * (64 + 32)
        before = lin.graph_bytes
        lin.jvp(randn(lin.selection.size, 1))
        assert lin.graph_bytes > before
        lin.release()
        assert lin.graph_bytes == 0

    def test_released(self):
        lin, product = linearised(problem("mlp")), hessian_product(problem("mlp"))
        assert product.graph_bytes > 0
        graph = weakref.ref(lin._f)
        lin.release()
        product.release()
        gc.collect()
        assert graph() is None
        assert lin.outputs.shape == (4, 3)
        assert product.gradient.shape == (35,)
        with pytest.raises(CurvopsError, match="released"):
            lin.jvp(randn(35, 1))
        with pytest.raises(CurvopsError, match="released"):
            product.matmat(randn(35, 1))

    def test_unselected_parameters_leave_nothing_in_the_graph(self):
        model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 2))
        x = randn(50, 100, dtype=torch.float32)
        whole = Linearisation(Network(model), ParameterSelection(model), x)
        last = Linearisation(Network(model), ParameterSelection(model, ["2"]), x)
        assert last.graph_bytes == 4 * 50 * 100
        assert whole.graph_bytes == 2 * last.graph_bytes

    def test_parameters_changed_in_place(self):
        p = problem("mlp")
        model = p.model()
        lin = Linearisation(Network(model), ParameterSelection(model), p.data()[0])
        with torch.no_grad():
            model[2].weight.mul_(2.0)
        with pytest.raises(StaleOperatorError, match="snapshot=True"):
            lin.jvp(randn(35, 1))

    def test_unknown_engine(self):
        with pytest.raises(UnsupportedError, match="double_backward"):
            linearised(problem("mlp"), engine="magic")


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.body = body
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


class TestDifficultModels:
    def test_checkpointing_without_reentry(self):
        body = problem("sdpa").model()
        model = Checkpointed(body, reentrant=False).double()
        x = problem("sdpa").data()[0]
        model.reentrant = False
        J = reference.jacobian(nn.Sequential(model.first, body), x)
        for params, columns in ((None, slice(None)), (["first"], slice(0, 12))):
            selection = ParameterSelection(model, params)
            with untouched(model):
                lin = Linearisation(Network(model), selection, x)
                for k in (1, 3):
                    V, U = randn(selection.size, k), randn(*lin.outputs.shape, k)
                    assert reference.relative_error(lin.jvp(V), J[..., columns] @ V) < 1e-13
                    expected = torch.einsum("btcp,btck->pk", J[..., columns], U)
                    assert reference.relative_error(lin.vjp(U), expected) < 1e-13

    def test_reentrant_checkpointing_is_refused_by_name(self):
        model = Checkpointed(nn.Linear(3, 2), reentrant=True).double()
        selection = ParameterSelection(model)
        with untouched(model), pytest.raises(UnsupportedError, match="use_reentrant=False"):
            Linearisation(Network(model), selection, randn(4, 3))

    def test_an_operation_without_second_derivative_is_named(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(randn(5, 2))

            def forward(self, x):
                return F.embedding_bag(x, self.table, mode="sum")

        model = Functional()
        lin = Linearisation(Network(model), ParameterSelection(model), torch.randint(5, (4, 3)))
        assert lin.vjp(randn(4, 2, 1)).shape == (10, 1)
        with pytest.raises(UnsupportedLayerError, match="_embedding_bag_backward"):
            lin.jvp(randn(10, 1))

    def test_compiled(self):
        p = problem("mlp")
        model = p.model()
        compiled = torch.compile(model, backend="aot_eager")
        x = p.data()[0]
        lin = Linearisation(Network(compiled), ParameterSelection(compiled), x)
        V = randn(35, 2)
        assert reference.relative_error(lin.jvp(V), reference.jacobian(model, x) @ V) < 1e-13

    def test_compiled_in_part(self):
        p = problem("mlp")
        model, x = p.model(), p.data()[0]
        J = reference.jacobian(model, x)
        partly = nn.Sequential(model[0], model[1], torch.compile(model[2], backend="aot_eager"))
        lin = Linearisation(Network(partly), ParameterSelection(partly), x)
        V = randn(35, 2)
        assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13

    def test_module_registered_under_two_names(self):
        class TwoNames(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
                self.last_layer = self.net[2]

            def forward(self, x):
                return self.net(x)

        model, x = TwoNames().double(), randn(4, 3)
        for params in (None, "last_layer"):
            J = reference.jacobian(model, x, params)
            lin = Linearisation(Network(model), ParameterSelection(model, params), x)
            V = randn(J.shape[-1], 2)
            assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13

    def test_embedding_with_sparse_and_scaled_gradients(self):
        x = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(0))
        plain = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 2)).double()
        odd = nn.Sequential(nn.Embedding(4, 2, sparse=True, scale_grad_by_freq=True), nn.Flatten(), plain[2]).double()
        odd[0].weight = plain[0].weight
        J = reference.jacobian(plain, x)
        lin = Linearisation(Network(odd), ParameterSelection(odd), x)
        V, U = randn(J.shape[-1], 2), randn(5, 2, 2)
        assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13
        assert reference.relative_error(lin.vjp(U), torch.einsum("bcp,bck->pk", J, U)) < 1e-13

    def test_parametrised_weight(self):
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
        ).double()
        x = randn(4, 3)
        J = reference.jacobian(model, x)
        lin = Linearisation(Network(model), ParameterSelection(model), x)
        V = randn(J.shape[-1], 2)
        assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13

    def test_inputs_on_a_graph_of_their_own_are_cut_off(self):
        p = problem("mlp")
        model = p.model()
        x = p.data()[0].requires_grad_()
        Linearisation(Network(model), ParameterSelection(model), x * 1.0).vjp(randn(4, 3, 1))
        assert x.grad is None

    def test_under_autocast(self):
        p = problem("mlp")
        model, x = p.model(torch.float32), p.data(torch.float32)[0]
        J = reference.jacobian(model, x)
        V = randn(35, 2, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16), untouched(model):
            lin = Linearisation(Network(model), ParameterSelection(model), x)
            result = lin.jvp(V)
        assert lin.outputs.dtype == torch.float32
        assert reference.relative_error(result, J @ V) < 5e-6
