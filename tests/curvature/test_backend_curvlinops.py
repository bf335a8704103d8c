"""curvlinops as a backend: right on every problem, or refused by name; nothing of the user's touched."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.curvature import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian, EFInterface, GGNInterface
from curvops.curvature.backends import curvlinops_adapter as adapter
from curvops.curvature.backends.sandbox import Outputs
from curvops.errors import (
    DataError,
    NumericalWarning,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.nets.parameters import ParameterSelection
from curvops.testing import problems

ALL = [p for p in problems.problems() if p.name != "selected-names"]
BY = f"by {adapter.provenance()}"

OURS = {
    "layernorm": {CurvlinopsHessian},
    "instancenorm": {CurvlinopsHessian},
    "transformer-encoder": {CurvlinopsHessian},
    "language-model": {CurvlinopsHessian},
    "groupnorm": {CurvlinopsHessian},
    "silu": {CurvlinopsHessian},
    "embedding-padding": {CurvlinopsGGN, CurvlinopsEF, CurvlinopsHessian},
}
"""Where curvlinops is known to err or to fail, and curvops' own products answer."""

REFUSED = {
    "conv1d": "Conv1d", "conv3d": "Conv3d", "convtranspose2d": "ConvTranspose2d", "conv2d-groups": "groups=2",
    "conv2d-circular": "circular", "batchnorm1d": "BatchNorm1d", "layernorm": "LayerNorm", "embedding": "Embedding",
    "multihead-attention": "MultiheadAttention", "lstm": "LSTM", "raw-parameters": "Raw", "tied": "tied",
    "module-twice": "runs 2 times", "mlp-ignored": "ignored", "tokens-ignored-weighted": "ignored",
    "tokens-paired-ignored": "ignored", "dealt-ignored": "ignored",
}  # fmt: skip

FACTORISED = [
    "mlp", "mlp-regression", "mlp-binary", "mlp-binary-one", "mlp-weighted", "linear", "conv2d", "conv2d-same",
    "maxpool", "relu-inplace", "residual", "sdpa", "frozen", "last-layer", "dictionary", "tokens", "tokens-regression",
    "tokens-binary",
]  # fmt: skip


def options(p: problems.Problem) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if p.name == "dictionary":
        more["dict_key_x"] = "a"
    if p.name == "last-layer":
        more["last_layer"] = True
    if p.name == "subnetwork":
        more["subnetwork_indices"] = p.params
    return more


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("p", ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("cls", [CurvlinopsGGN, CurvlinopsEF, CurvlinopsHessian])
def test_products_against_oracles(cls: type, p: problems.Problem) -> None:
    x, y = p.data()
    model, oracle, nll = p.model(), p.oracle_model(), reference.problem_nll(p)
    if cls is CurvlinopsGGN:
        wanted = reference.ggn(oracle, nll, x, y, p.params)
    elif cls is CurvlinopsEF:
        wanted = reference.empirical_fisher(oracle, nll, x, y, p.params) * (2 if p.likelihood == "regression" else 1)
    else:
        wanted = reference.hessian(oracle, nll, x, y, p.params)
    with untouched(model):
        loss, H = cls(model, p.loss(), **options(p)).full(x, y)
        dense = H.to_dense()
    assert dense.shape == wanted.shape
    assert reference.relative_error(dense, wanted) < 1e-9
    assert reference.relative_error(loss, nll(reference.outputs(oracle, x), y).detach()) < 1e-12
    ours = cls in OURS.get(p.name, ())
    assert (BY in repr(H)) is not ours
    assert ("by curvops: curvlinops" in repr(H)) is ours
    assert ("by curvops: curvlinops" in H.describe()) is ours


class Functional(nn.Module):
    """Layer normalisation that no module's type gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(F.layer_norm(self.first(x), (4,), self.gain)))


def test_an_unforeseen_error_is_met_with_own_products_and_a_warning() -> None:
    torch.manual_seed(0)
    model = Functional().double()
    x, y = problems.problem("mlp").data()
    _, H = CurvlinopsHessian(model, "classification").full(x, y)
    with pytest.warns(NumericalWarning, match="departs from double backward"):
        dense = H.to_dense()
    assert reference.relative_error(dense, reference.hessian(model, reference.nll("classification"), x, y)) < 1e-9
    assert "by curvops: curvlinops" in repr(H)
    again = H.to_dense()
    assert torch.allclose(dense, again, atol=1e-12)


def test_one_draw_is_that_of_the_native_fisher() -> None:
    for name in ("mlp", "mlp-weighted", "mlp-ignored", "tokens"):
        p = problems.problem(name)
        x, y = p.data()
        theirs = CurvlinopsGGN(p.model(), p.loss(), stochastic=True, generator=seeded(5)).full(x, y)[1]
        ours = GGNInterface(p.model(), p.loss(), stochastic=True, generator=seeded(5)).full(x, y)[1]
        assert torch.allclose(theirs.to_dense(), ours.to_dense(), atol=1e-11)
        assert BY in repr(theirs)


def test_operators_behave_as_all_others() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    _, H = CurvlinopsGGN(p.model(), "classification").full(x, y)
    wanted = reference.ggn(p.model(), reference.problem_nll(p), x, y)
    shifted = wanted + torch.eye(len(wanted), dtype=wanted.dtype)
    v = torch.randn(len(wanted), generator=seeded(0), dtype=wanted.dtype)
    A = H.add_diagonal(1.0)
    assert torch.allclose(A.solve(v, co.CG(rtol=1e-12)), torch.linalg.solve(shifted, v), atol=1e-9)
    assert torch.allclose(A.solve(v, co.FunctionSpace()), torch.linalg.solve(shifted, v), atol=1e-9)
    assert abs(float(A.logdet()) - float(torch.linalg.slogdet(shifted)[1])) < 1e-9
    assert H.to_scipy().dtype == "float64"
    assert H.is_psd
    assert H.lower_bound == 0
    assert H.to(torch.float32).to_dense().dtype == torch.float32
    assert torch.allclose(H.to(torch.float32).to_dense().double(), wanted, atol=1e-5)
    gradient = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(H @ gradient, gradient, v)
    assert torch.allclose(g, wanted @ v, atol=1e-10)
    before = H.matvec_count
    assert (H @ torch.stack([v, v], 1)).shape == (len(v), 2)
    assert H.matvec_count == before + 2
    assert H.layout is not None
    assert list(H.layout) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    H.release()
    assert torch.allclose(H @ v, wanted @ v, atol=1e-10)


def test_columns_in_small_chunks() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    backend = CurvlinopsGGN(p.model(), "classification")
    backend.memory_budget = 60_000
    dense = backend.full(x, y)[1].to_dense()
    assert reference.relative_error(dense, reference.ggn(p.model(), reference.problem_nll(p), x, y)) < 1e-9


def test_custom_likelihood() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    huber = co.likelihoods.Likelihood.from_loss(lambda f, t: torch.log(torch.cosh(f - t)).sum())
    _, H = CurvlinopsHessian(p.model(), huber).full(x, y)
    wanted = reference.hessian(p.model(), lambda f, t: torch.log(torch.cosh(f - t)).sum(), x, y)
    assert reference.relative_error(H.to_dense(), wanted) < 1e-9
    with pytest.raises(UnsupportedError, match="is_convex"):
        CurvlinopsGGN(p.model(), huber).diag(x, y)
    with pytest.raises(UnsupportedError, match="is_convex"):
        CurvlinopsGGN(p.model(), huber).kron(x, y, N=4)


def test_stale_operators() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model: Any = p.model()
    backend = CurvlinopsGGN(model, "classification")
    _, H = backend.full(x, y)
    _, K = backend.kron(x, y, N=4)
    _, kept = backend.kron(x, y, N=4)
    before = kept.to_dense()
    H.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    for operator in (H, K):
        with pytest.raises(StaleOperatorError):
            operator.to_dense()
    assert torch.equal(kept.to_dense(), before)  # factors that were computed are true of what they were computed on


# ---------------------------------------------------------------- Kronecker factors


def factors(model: Any, x: Tensor, S: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A (mean over data) and B (sum) of each linear layer of a plain two-layer network, by their definition."""
    inputs = [x, torch.tanh(model[0](x)).detach()]
    result = []
    for layer, a in zip((model[0], model[2]), inputs, strict=True):
        out = layer(a).detach().requires_grad_()
        f = model[2](torch.tanh(out)) if layer is model[0] else out
        B = torch.zeros(out.shape[1], out.shape[1], dtype=x.dtype)
        for r in range(S.shape[-1]):
            (g,) = torch.autograd.grad(f, out, S[..., r], retain_graph=True)
            for n in range(len(x)):
                B += torch.outer(g[n], g[n])
        A = sum(torch.outer(a[n], a[n]) for n in range(len(x))) / len(x)
        result.append((torch.as_tensor(A), B))
    return result


@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "mlp-binary", "mlp-weighted"])
@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_factors_by_their_definition(name: str, kind: str) -> None:
    p = problems.problem(name)
    x, y = p.data()
    model = p.model()
    likelihood = co.GGN(model, p.loss(), (x, y)).objective.likelihood
    assert likelihood is not None
    f = model(x).detach()
    factor = likelihood.factor
    if kind == "exact":
        backend: Any = CurvlinopsGGN(model, p.loss())
        S = likelihood.output_hessian_sqrt(f, y)
    elif kind == "empirical":
        backend = CurvlinopsEF(model, p.loss())
        S = likelihood.gradient(f, y).unsqueeze(-1) / math.sqrt(factor)
    else:
        backend = CurvlinopsGGN(model, p.loss(), stochastic=True, generator=seeded(2))
        seed = int(torch.randint(0, 2**62, (), generator=seeded(2)))
        S = torch.stack([likelihood.pseudo_gradients_at(f, y, seed=seed, position=0, sample=s) for s in range(3)], -1)
        S = S / math.sqrt(3)
    more = {"mc_samples": 3} if kind == "mc" else {}
    loss, K = backend.kron(x, y, N=10, **more)
    assert loss.shape == ()
    assert "not computed" in repr(K)
    blocks = []
    for A, B in factors(model, x, S):
        blocks += [torch.kron(B, A * 4 / 10), B]
    assert reference.relative_error(K.to_dense(), torch.block_diag(*blocks)) < 1e-10
    assert BY in repr(K)
    damped = K.to_dense() + 0.1 * torch.eye(K.shape[0], dtype=K.dtype)
    assert abs(float(K.add_diagonal(0.1).logdet()) - float(torch.linalg.slogdet(damped)[1])) < 1e-9
    per_layer = K.add_diagonal({n: 0.1 for n, _ in model.named_parameters()})
    assert torch.allclose(per_layer.to_dense(), damped, atol=1e-12)


@pytest.mark.parametrize("name", FACTORISED)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_those_of_the_native_engine(name: str, approx: str) -> None:
    p = problems.problem(name)
    x, y = p.data()
    model = p.model()
    for theirs, ours, stochastic in (
        (CurvlinopsGGN, GGNInterface, False),
        (CurvlinopsGGN, GGNInterface, True),
        (CurvlinopsEF, EFInterface, False),
    ):
        more: Any = {"stochastic": True, "num_samples": 2} if stochastic else {}
        with untouched(model):
            backend = theirs(model, p.loss(), **options(p), **more, generator=seeded(1))
            _, A = backend.kron(x, y, N=9, kfac_approx=approx)
            dense = A.to_dense()
        _, B = ours(model, p.loss(), **options(p), **more, generator=seeded(1)).kron(x, y, N=9, kfac_approx=approx)
        assert A.shape == B.shape
        assert reference.relative_error(dense, B.to_dense()) < 1e-10


def test_factors_of_plain_likelihoods_are_those_of_curvlinops_itself() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    model = p.model()
    raw = adapter.library().KFACLinearOperator(
        model, nn.MSELoss(reduction="sum"), list(model.parameters()), [(x, y)], fisher_type="type-2"
    )
    theirs = 0.5 * raw @ torch.eye(raw.shape[0], dtype=torch.float64)
    assert torch.allclose(CurvlinopsGGN(model, "regression").kron(x, y, N=4)[1].to_dense(), theirs.detach(), atol=1e-10)


def test_factors_of_batches_add_up() -> None:
    p = problems.problem("conv2d")
    (x1, y1), (x2, y2) = p.data(batch=0), p.data(batch=1)
    backend = CurvlinopsGGN(p.model(), "classification")
    whole: Any = backend.kron(torch.cat([x1, x2]), torch.cat([y1, y2]), N=8)[1]
    parts: list[Any] = [backend.kron(x, y, N=8)[1] for x, y in ((x1, y1), (x2, y2))]
    for block, one, two in zip(whole.content().blocks, *(part.content().blocks for part in parts), strict=True):
        if isinstance(block, co.Kronecker):
            for i in range(2):
                total = one.factors[i].to_dense() + two.factors[i].to_dense()
                assert torch.allclose(block.factors[i].to_dense(), total, atol=1e-11)
        else:
            assert torch.allclose(block.to_dense(), one.to_dense() + two.to_dense(), atol=1e-11)


@pytest.mark.parametrize("name", REFUSED)
def test_layers_refused_by_name(name: str) -> None:
    p = problems.problem(name)
    x, y = p.data()
    model = p.model()
    with untouched(model), pytest.raises(UnsupportedError, match=REFUSED[name]):
        CurvlinopsGGN(model, p.loss()).kron(x, y, N=4)[1].to_dense()


class Autoencoder(nn.Module):
    """Uses a layer's weight beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.code(x)) @ self.code.weight


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_uses_beside_the_module_are_refused_and_unused_layers_have_no_curvature() -> None:
    x, y = problems.problem("mlp").data()
    with pytest.raises(UnsupportedLayerError, match="beside the calls"):
        CurvlinopsGGN(Autoencoder().double(), "regression").kron(x, x, N=4)[1].to_dense()
    _, K = CurvlinopsGGN(WithUnused().double(), "classification").kron(x, y, N=4)
    assert K.shape == (25, 25)
    assert torch.equal(K.diagonal()[15:], torch.zeros(10, dtype=torch.float64))
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    for q in attention.parameters():
        q.requires_grad_(False)
    attention.out_proj.weight.requires_grad_()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    sequences = torch.randn(4, 3, 4, generator=seeded(0), dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match=r"out_proj"):
        CurvlinopsGGN(Mixed().double(), "classification").kron(sequences, y, N=4)[1].to_dense()


class Flattened(nn.Module):
    """Makes rows of all positions of all data, and data of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1)


class Swapped(nn.Module):
    """Puts the positions first, of which there are as many as data."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.transpose(0, 1))).mean(0)


@pytest.mark.parametrize("kind", [Flattened, Swapped])
def test_layers_whose_rows_are_not_the_data_are_refused(kind: type[nn.Module]) -> None:
    x = torch.randn(4, 4, 4, generator=seeded(0), dtype=torch.float64)
    y = torch.arange(4) % 3
    with pytest.raises(UnsupportedLayerError, match=r"'mix' \(Linear\) sees \d+ rows"):
        CurvlinopsGGN(kind().double(), "classification").kron(x, y, N=4)[1].to_dense()


def test_arguments_of_kron() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    backend = CurvlinopsGGN(p.model(), "classification")
    with pytest.raises(DataError, match="N is 0"):
        backend.kron(x, y, N=0)
    with pytest.raises(DataError, match="stochastic=True"):
        backend.kron(x, y, N=4, mc_samples=2)
    with pytest.raises(DataError, match="expand"):
        backend.kron(x, y, N=4, kfac_approx="shrink")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="subnetwork_indices"):
        CurvlinopsGGN(p.model(), "classification", subnetwork_indices=torch.tensor([1])).kron(x, y, N=4)
    with pytest.raises(UnsupportedError, match="GGNInterface"):
        CurvlinopsHessian(p.model(), "classification").kron(x, y, N=4)
    with pytest.raises(ShapeError):
        backend.kron(x, y[:, None], N=4)


# ---------------------------------------------------------------- the copy


def test_the_sandbox_shares_numbers_and_nothing_else() -> None:
    p = problems.problem("batchnorm1d")
    model: Any = p.model()
    model[0].register_full_backward_hook(lambda *_: pytest.fail("the user's hook ran"))
    selection = ParameterSelection(model, ["3"])
    outputs = Outputs(model, selection)
    assert [q.data_ptr() for q in outputs.selected] == [q.data_ptr() for q in selection.tensors]
    assert all(a is not b for a, b in zip(outputs.selected, selection.tensors, strict=True))
    assert [n for n, q in outputs.module.named_parameters() if q.requires_grad] == list(selection.names)
    assert outputs.module[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()  # type: ignore[index]
    x, _ = p.data()
    outputs(x).sum().backward()
    assert all(q.grad is None for q in model.parameters())


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


def test_models_that_do_not_copy_are_answered_natively_or_refused() -> None:
    x, y = problems.problem("mlp").data()
    model = Uncopyable(4, 3).double()
    with pytest.raises(UnsupportedError, match="does not copy"):
        CurvlinopsGGN(model, "classification").full(x, y)[1].to_dense()
    with pytest.raises(UnsupportedError, match="does not copy"):
        CurvlinopsGGN(model, "classification").kron(x, y, N=4)[1].to_dense()
    assert GGNInterface(model, "classification").full(x, y)[1].to_dense().shape == (15, 15)


# ---------------------------------------------------------------- other versions


def test_the_next_releases_dict_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.library()
    taken: list[dict[str, Tensor]] = []

    class Later(real.GGNLinearOperator):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any, loss: Any, params: dict[str, Tensor], data: Any, **more: Any) -> None:
            taken.append(params)
            super().__init__(model, loss, list(params.values()), data, **more)

    monkeypatch.setattr(adapter, "library", lambda: SimpleNamespace(GGNLinearOperator=Later))
    p = problems.problem("mlp")
    x, y = p.data()
    _, H = CurvlinopsGGN(p.model(), "classification").full(x, y)
    assert reference.relative_error(H.to_dense(), reference.ggn(p.model(), reference.problem_nll(p), x, y)) < 1e-9
    assert list(taken[0]) == ["module.0.weight", "module.0.bias", "module.2.weight", "module.2.bias"]


def test_moved_factors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "library", lambda: SimpleNamespace(KFACLinearOperator=object))
    p = problems.problem("mlp")
    with pytest.raises(UnsupportedError, match=r"curvlinops-for-pytorch==3\.0\.1"):
        CurvlinopsGGN(p.model(), "classification").kron(*p.data(), N=4)


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_curvlinops(dtype: torch.dtype) -> None:
    library = adapter.library()
    p = problems.problem("mlp-regression")
    x, y = p.data(dtype)
    model = p.model(dtype)
    loss, params = nn.MSELoss(reduction="sum"), list(model.parameters())
    raw = library.HessianLinearOperator(model, loss, params, [(x, y)], check_deterministic=False)
    H = co.from_curvlinops(raw)
    assert H.dtype == dtype
    assert H.is_symmetric
    assert not H.is_psd
    assert H.to_scipy().dtype == ("float64" if dtype == torch.float64 else "float32")
    assert BY in repr(H)
    wanted = 2 * reference.hessian(p.model(), reference.problem_nll(p), *p.data())
    assert reference.relative_error(H.to_dense().double(), wanted) < (1e-9 if dtype == torch.float64 else 1e-5)
    J = co.from_curvlinops(library.JacobianLinearOperator(model, params, [(x, y)], check_deterministic=False))
    assert J.shape == (8, H.shape[0])
    assert not J.is_symmetric
    assert torch.allclose(J.T.to_dense(), J.to_dense().T, atol=1e-5)
    assert co.from_curvlinops(library.KFACLinearOperator(model, loss, params, [(x, y)])).is_psd
    assert co.from_curvlinops(raw + raw).shape == H.shape


def test_from_curvlinops_refuses() -> None:
    library = adapter.library()
    p = problems.problem("mlp-regression")
    x, y = p.data()
    model = p.model()
    stream = iter([(x, y), (x, y)])
    raw = library.GGNLinearOperator(
        model, nn.MSELoss(reduction="sum"), list(model.parameters()), stream, num_data=4, check_deterministic=False
    )
    for operator in (raw, 2.0 * raw):
        with pytest.raises(DataError, match="iterator"):
            co.from_curvlinops(operator)
    with pytest.raises(UnsupportedError, match="from_scipy"):
        co.from_curvlinops(torch.eye(3))
