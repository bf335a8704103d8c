"""Weight and bias as one matrix [W b]: KFAC and EKFAC with `weight_and_bias="joint"`."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvops.curvature.structured import EKFAC, KFAC
from curvops.errors import NumericalWarning, ShapeError
from curvops.operators import BlockDiagonal, Eigen, Kronecker, Permuted
from curvops.posterior import Gaussian
from curvops.testing.problems import Problem, problem, problems

WHOLE = [p for p in problems() if not isinstance(p.params, Tensor)]


@pytest.fixture(autouse=True)
def _unused_parameters_are_reported():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the outputs do not depend on unused", NumericalWarning)
        yield


def made(kind: type, p: Problem, **options: Any) -> Any:
    options = {"params": p.params, **({"dict_key_x": "a"} if p.name == "dictionary" else {}), **options}
    return kind(p.model(), p.loss(), p.data(), weight_and_bias="joint", **options)


def check(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert reference.relative_error(got, expected) < tolerance


# ---- the definition, one datum, one column, one position at a time --------------------------------------------------


def inputs_by_position(layer: nn.Module, x: Tensor) -> Tensor:
    """`(T, groups, I)`: what each output position of a layer is a linear function of; one datum."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    groups, spread = layer.groups, isinstance(layer, nn.Conv1d)
    x = x.unsqueeze(2) if spread else x
    sizes = [((1,) if spread else ()) + tuple(v) for v in (layer.kernel_size, layer.dilation, layer.stride)]
    patches = F.unfold(x, sizes[0], dilation=sizes[1], stride=sizes[2])[0]  # (channels · kernel, T)
    return patches.reshape(groups, -1, patches.shape[-1]).permute(2, 0, 1)


def outputs_by_position(layer: nn.Module, g: Tensor) -> Tensor:
    """`(T, groups, O)` of the derivative of a layer's output; one datum."""
    if isinstance(layer, nn.Linear):
        return g.reshape(-1, 1, g.shape[-1])
    return g.flatten(2)[0].T.unflatten(1, (layer.groups, -1))


def columns_of(loss: Any, f: Tensor, y: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(reference.output_hessian(loss, f, y))
    return (vectors * values.clamp(min=0).sqrt()).T.reshape(-1, *f.shape)


def joint_blocks(p: Problem, approx: str) -> list[Tensor]:
    """The block of [W b] of each layer with a bias, entries in the order of the parameters: W row by row, then b."""
    model, (x, y) = p.model(), p.data()
    loss = reference.problem_nll(p)
    blocks = []
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)):
        assert layer.bias is not None
        A, B, terms = [], [], 0
        for i in range(len(x)):
            seen: list[tuple[Tensor, Tensor]] = []
            handle = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
            f = reference.outputs(model, reference.one(x, i))
            handle.remove()
            ((given, out),) = seen
            a = inputs_by_position(layer, given.detach())
            a = torch.cat([a, torch.ones(*a.shape[:2], 1, dtype=a.dtype)], 2)
            a = a.mean(0, keepdim=True) if approx == "reduce" else a
            terms += len(a)
            A += [torch.stack([torch.outer(v, v) for v in group]) for group in a]
            for column in columns_of(loss, f, y[i : i + 1]):
                (g,) = torch.autograd.grad(f, out, column, retain_graph=True)
                g = outputs_by_position(layer, g)
                g = g.sum(0, keepdim=True) if approx == "reduce" else g
                B += [torch.stack([torch.outer(v, v) for v in group]) for group in g]
        A, B = sum(A) / terms, sum(B)
        natural = torch.block_diag(*(torch.kron(b, a) for b, a in zip(B, A, strict=True)))
        O, I = layer.weight.shape[0], layer.weight[0].numel()
        order = [o * (I + 1) + i for o in range(O) for i in range(I)] + [o * (I + 1) + I for o in range(O)]
        blocks.append(natural[order][:, order])
    return blocks


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "mlp-weighted", "mlp-binary", "mlp-regression", "conv1d", "conv2d", "maxpool"])
def test_by_its_definition(name, approx):
    K = made(KFAC, problem(name), approx=approx)
    check(K.to_dense(), torch.block_diag(*joint_blocks(problem(name), approx)))


@pytest.mark.parametrize("name", ["mlp", "mlp-weighted", "residual", "gelu", "last-layer"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_exact_for_one_datum_without_weight_sharing(name, kind):
    p = problem(name)
    model, (x, y) = p.model(), p.data()
    one = (x[1:2], y[1:2])
    K = kind(model, p.loss(), one, params=p.params, weight_and_bias="joint")
    exact = reference.ggn(model, reference.problem_nll(p), *one, p.params)
    pieces = [exact[a : a + n, a : a + n] for a, n in zip(torch.tensor([0, *K.sizes]).cumsum(0), K.sizes, strict=False)]
    check(K.to_dense(), torch.block_diag(*pieces))


@pytest.mark.parametrize("p", WHOLE, ids=lambda p: p.name)
def test_ekfac_is_nearer_and_nothing_is_dropped(p):
    K, E = made(KFAC, p, tokens="separate"), made(EKFAC, p, tokens="separate")
    exact = reference.ggn(p.model(), reference.problem_nll(p), *p.data(), p.params)
    assert K.shape == E.shape == tuple(exact.shape)
    assert list(K.layout.values())[-1].stop == len(exact)
    ends = torch.tensor([0, *K.sizes]).cumsum(0).tolist()
    target = torch.block_diag(*(exact[a:b, a:b] for a, b in zip(ends, ends[1:], strict=False)))
    distance = float((E.to_dense() - target).norm())
    assert distance <= float((K.to_dense() - target).norm()) * (1 + 1e-9) + 1e-12
    check(E.trace(), target.trace(), 1e-10)
    separate = KFAC(p.model(), p.loss(), p.data(), params=p.params, tokens="separate",
                    **({"dict_key_x": "a"} if p.name == "dictionary" else {}))  # fmt: skip
    # What weight and bias have of their own is the same either way (a bias of groups has a part in each group's block).
    for name, where in K.layout.items():
        if not (p.name == "conv1d" and name == "0.bias"):
            check(K.to_dense()[where, where], separate.to_dense()[where, where])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlp", [20, 15]),
        ("conv2d-groups", [32, 15]),
        ("convtranspose2d", [16, 2, 9]),
        ("layernorm", [20, 4, 4, 15]),
        ("multihead-attention", [60, 20, 15]),
        ("lstm", [24, 16, 8, 8, 9]),
        ("tied", [12, 12, 4]),
        ("frozen", [16, 3]),
        ("embedding", [18, 12]),
        ("module-twice", [20, 15]),
    ],
)
def test_which_belong_together(name, sizes):
    K = made(KFAC, problem(name))
    assert K.sizes == sizes
    K.to_dense()
    assert "apart" not in repr(K)
    assert "per-example" not in repr(K)


def test_repr_and_description():
    p = problem("mlp")
    K, E = made(KFAC, p), made(EKFAC, p)
    line = "BlockDiagonal(2: Permuted(Kronecker(4×5)), Permuted(Kronecker(3×5)))"
    assert repr(K) == f"{line} [not computed]"
    K.to_dense()
    assert repr(K) == line
    assert K.describe().splitlines()[1:] == [
        "BlockDiagonal of 2",
        "  Permuted",
        "    Kronecker(4×5)",
        "  Permuted",
        "    Kronecker(3×5)",
    ]
    line = "BlockDiagonal(2: Permuted(Eigen(20)), Permuted(Eigen(15)))"
    assert repr(E) == f"{line} [not computed]"
    E.to_dense()
    assert repr(E) == line
    assert isinstance(E.blocks[0].content().operator, Eigen)


class Transposed(nn.Module):
    """x W + b with W `(inputs, outputs)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.linspace(-1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Beside(nn.Module):
    """A bias that is added elsewhere than the weight's product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) + self.bias


def _data(inputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(5, inputs, generator=g, dtype=torch.float64), torch.randint(3, (5,), generator=g)


def test_a_weight_of_inputs_by_outputs():
    model, data = Transposed(2, 3).double(), _data(2)
    K = KFAC(model, "classification", data, weight_and_bias="joint")
    twin = nn.Linear(2, 3).double()
    twin.load_state_dict({"weight": model.weight.T, "bias": model.bias})
    other = KFAC(twin, "classification", data, weight_and_bias="joint").to_dense()
    order = [o * 2 + i for i in range(2) for o in range(3)] + [6, 7, 8]
    check(K.to_dense(), other[order][:, order])
    assert repr(K) == "BlockDiagonal(1: Kronecker(3×3))"


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_bias_used_elsewhere_stays_apart(kind):
    model, data = Beside().double(), _data(2)
    joint = kind(model, "classification", data, weight_and_bias="joint")
    check(joint.to_dense(), kind(model, "classification", data).to_dense())
    assert joint.sizes == [9]
    assert "weight and bias apart" in repr(joint)


def test_merge_refuses_a_bias_of_another_use():
    models = Beside().double(), nn.Linear(2, 3).double()
    one, two = (KFAC(model, "classification", _data(2), weight_and_bias="joint") for model in models)
    with pytest.raises(ShapeError, match="apart in the other"):
        one.merge(two).to_dense()


def test_merged_factors_are_those_of_the_whole_set():
    for name in ("mlp", "conv2d", "multihead-attention", "module-twice"):
        p = problem(name)
        (x, y) = p.data()
        for approx in ("expand", "reduce"):
            parts = [
                KFAC(p.model(), p.loss(), (x[cut], y[cut]), approx=approx, weight_and_bias="joint")
                for cut in (slice(0, 1), slice(1, None))
            ]
            whole = made(KFAC, p, approx=approx).to_dense()
            check(parts[0].merge(parts[1]).to_dense(), whole)
            check(parts[0].fraction(4, 1).merge(parts[1].fraction(4, 3)).to_dense(), whole)
    with pytest.raises(ShapeError, match="same blocks"):
        made(KFAC, p).merge(KFAC(p.model(), p.loss(), p.data()))


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
class TestClosedForms:
    def test_solve_logdet_powers_and_damping(self, kind):
        K = made(kind, problem("conv1d"))
        v = torch.randn(K.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        one_for_each_module = {name: 0.5 + float(name[0]) for name in K.layout}
        one_for_each_parameter = {name: 0.5 + i for i, name in enumerate(K.layout)}
        for delta in (0.3, one_for_each_module, one_for_each_parameter):
            A = K.add_diagonal(delta)
            M = A.to_dense()
            check(A.solve(v), torch.linalg.solve(M, v), 1e-10)
            check(A.logdet(), torch.logdet(M), 1e-10)
            check(A.inverse().to_dense(), torch.linalg.inv(M), 1e-10)
            check(A.diagonal(), M.diagonal())
            check(A.sqrt_matvec(A.sqrt_matvec(v)), M @ v, 1e-10)
            check(A.inv_sqrt_matvec(A.inv_sqrt_matvec(v)), torch.linalg.solve(M, v), 1e-10)
            for verb in ("solve", "logdet", "sample"):
                assert "block by block" in A.explain(verb)
        for delta in (0.3, one_for_each_module):
            assert "dense" not in K.add_diagonal(delta).explain("solve").lower()

    def test_scalars_of_every_sign(self, kind):
        K = made(kind, problem("mlp"))
        M = K.to_dense()
        v = torch.ones(len(M), dtype=torch.float64)
        eye = torch.eye(len(M), dtype=torch.float64)
        for c in (-0.5, 2.0, torch.tensor(-0.5, dtype=torch.float64)):
            check((c * K).to_dense(), float(c) * M)
            check((c * K).add_diagonal(100.0).solve(v), torch.linalg.solve(float(c) * M + 100 * eye, v), 1e-10)
            assert (c * K).is_psd == (float(c) > 0)
        assert not (0.0 * K).to_dense().any()
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for c in (zero, torch.tensor(-0.25, dtype=torch.float64, requires_grad=True)):
            (c * K).add_diagonal(100.0).logdet().backward()
            check(c.grad, torch.linalg.solve(c.detach() * M + 100 * eye, M).trace(), 1e-9)

    def test_samples(self, kind):
        A = made(kind, problem("mlp")).add_diagonal(1.0)
        mean = torch.linspace(-1, 1, A.shape[0], dtype=torch.float64)
        draws, report = Gaussian(mean, A, torch.Generator().manual_seed(0)).sample(20_000, return_report=True)
        assert report.matvecs == 0 or "closed form" in report.reason
        X = draws - mean
        check(X.T @ X / len(X), torch.linalg.inv(A.to_dense()), 0.05)

    def test_pickled(self, kind):
        K = made(kind, problem("mlp"))
        back = pickle.loads(pickle.dumps(K))
        assert type(back) is BlockDiagonal
        assert torch.equal(back.to_dense(), K.to_dense())
        check(back.add_diagonal(dict.fromkeys(K.layout, 2.0)).to_dense(), K.add_diagonal(2.0).to_dense())


def test_neighbours_of_one_damping_keep_the_kronecker_form():
    block = Permuted(Kronecker(torch.eye(2).double(), torch.eye(3).double()), torch.tensor([0, 1, 3, 4, 2, 5]))
    K = BlockDiagonal(block, layout={"w": slice(0, 4), "b": slice(4, 6)})
    assert repr(K.add_diagonal({"w": 2.0, "b": 2.0})) == ("BlockDiagonal(1: Permuted(Kronecker(2×3) + 2.0·I))")
    delta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert "Kronecker(2×3) + 2.0·I" in repr(K.add_diagonal({"w": delta, "b": delta}))
    apart = K.add_diagonal({"w": delta, "b": delta.clone()})
    apart.logdet().backward()
    check(delta.grad, torch.tensor(6 / 3.0).double())
