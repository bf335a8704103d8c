"""ASDL as a backend: right on every problem, or refused by name; nothing of the user's touched.

What ASDL is known to get wrong is shown here beside what happens instead.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.curvature import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    AsdlInterface,
    EFInterface,
    FeatureExtractor,
    GGNInterface,
    HessianInterface,
)
from curvops.errors import (
    DataError,
    MemoryBudgetError,
    MissingExtraError,
    NumericalWarning,
    StaleOperatorError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.testing import problems

peers = pytest.mark.peers

ALL = [p for p in problems.problems() if p.name != "selected-names"]

LAYERS = {
    "conv1d": "Conv1d", "conv2d-same": 'padding="same"', "conv2d-circular": "circular", "conv2d-groups": "groups=2",
    "conv3d": "Conv3d", "convtranspose2d": "ConvTranspose2d", "groupnorm": "GroupNorm",
    "instancenorm": "InstanceNorm2d", "rmsnorm": "RMSNorm", "embedding": "row per token",
    "embedding-padding": "row per token", "embeddingbag-sum": "EmbeddingBag", "embeddingbag-mean": "EmbeddingBag",
    "embeddingbag-padding": "EmbeddingBag", "multihead-attention": "MultiheadAttention",
    "transformer-encoder": "MultiheadAttention", "rnn": "RNN", "lstm": "LSTM", "gru": "GRU",
    "rnn-cell": "RNNCell", "lstm-cell": "LSTMCell", "gru-cell": "GRUCell", "convtranspose1d": "ConvTranspose1d",
    "cross-attention": "MultiheadAttention",
    "module-twice": "runs 2 times", "linear-as-kernel": "used beside", "tied": "row per token",
    "raw-parameters": "Raw", "joined": "Joined", "keywords": "row per token",
    "adapter": "Adapter", "language-model": "row per token",
}  # fmt: skip
"""What is refused, and the word that says why; `full` is then by curvops."""

FACTORS = {
    **LAYERS, "batchnorm1d": "BatchNorm1d", "batchnorm2d": "BatchNorm2d", "layernorm": "LayerNorm",
    "mlp-ignored": "ignored", "tokens-ignored-weighted": "ignored",
    "tokens-paired-ignored": "ignored", "dealt-ignored": "ignored",
}  # fmt: skip
"""The same of `kron`."""

ORDER = {"dealt-ignored": "another order"}
"""What is refused when rows are compared: `full`, `jacobians`, `gradients`."""

NO_DIAGONAL = {
    "multihead-attention", "cross-attention", "transformer-encoder", "rnn", "lstm", "gru", "rnn-cell", "lstm-cell",
    "gru-cell", "raw-parameters", "joined", "adapter",
}  # fmt: skip
"""Where the Hessian's diagonal is refused: parameters that are no `weight` or `bias` of a module."""


@pytest.fixture
def asdl() -> Iterator[Any]:
    """The library itself, its deprecation warnings ignored; fails where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield importlib.import_module("asdl")


def made(cls: type, p: problems.Problem, model: nn.Module, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """The backend of that class on a problem."""
    if p.name == "dictionary":
        more["dict_key_x"] = "a"
    if p.name == "last-layer":
        more["last_layer"] = True
    backend = cls(model, p.loss(dtype), **more)
    if p.name == "subnetwork":
        backend.subnetwork_indices = p.params
    return backend


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(cls: type, p: problems.Problem) -> Tensor:
    """The curvature of that class, in the interface's scale, by its definition."""
    x, y = p.data()
    model, nll = p.oracle_model(), reference.problem_nll(p)
    if issubclass(cls, AsdlHessian):
        return reference.hessian(model, nll, x, y, p.params)
    if issubclass(cls, AsdlEF):
        return reference.empirical_fisher(model, nll, x, y, p.params) * (2 if p.likelihood == "regression" else 1)
    return reference.ggn(model, nll, x, y, p.params)


# ---------------------------------------------------------------- every network


@peers
@pytest.mark.parametrize("p", ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("cls", [AsdlGGN, AsdlEF, AsdlHessian])
@pytest.mark.filterwarnings("ignore:asdl 0.1a4 .*products of this operator are curvops' own")
def test_full_and_diag_against_oracles(cls: type, p: problems.Problem) -> None:
    x, y = p.data()
    model = p.model()
    wanted = matrix(cls, p)
    with untouched(model):
        backend = made(cls, p, model)
        loss, H = backend.full(x, y)
        _, D = backend.diag(x, y)
        assert "not computed" in repr(D)
        if p.name in ORDER and cls is not AsdlHessian:
            with pytest.raises(UnsupportedError, match=ORDER[p.name]) as refusal:
                H.to_dense()
            assert "GGNInterface" in str(refusal.value)
        else:
            assert reference.relative_error(H.to_dense(), wanted) < 1e-9
    nll = reference.problem_nll(p)(reference.outputs(p.oracle_model(), x), y).detach()
    assert reference.relative_error(loss, nll) < 1e-12
    native = p.name in LAYERS if cls is not AsdlHessian else p.name == "raw-parameters"
    assert ("by curvops: " in repr(H)) is native
    assert ("by asdl 0.1a4" in repr(H)) is not native
    refused = p.name in (NO_DIAGONAL if cls is AsdlHessian else LAYERS)
    with untouched(model):
        if refused:
            why = "no layer's weight or bias" if cls is AsdlHessian else LAYERS[p.name]
            with pytest.raises(UnsupportedError, match=why) as refusal:
                D.diagonal()
            assert "Interface" in str(refusal.value)
        else:
            assert reference.relative_error(D.diagonal(), wanted.diagonal()) < 1e-9
            assert "by asdl 0.1a4" in D.describe()


@peers
@pytest.mark.parametrize("p", ALL, ids=lambda p: p.name)
def test_jacobians_and_gradients_against_oracles(p: problems.Problem) -> None:
    x, y = p.data()
    model = p.model()
    backend = made(AsdlEF, p, model)
    with untouched(model):
        if (refused := {**LAYERS, **ORDER}.get(p.name)) is not None:
            for call in (lambda: backend.jacobians(x), lambda: backend.gradients(x, y)):
                with pytest.raises(UnsupportedError, match=refused) as refusal:
                    call()
                assert "GGNInterface" in str(refusal.value)
            return
        Js, f = backend.jacobians(x)
        Gs, loss = backend.gradients(x, y)
    assert torch.equal(f, reference.outputs(model, x).detach())
    assert reference.relative_error(Js, reference.jacobian(model, x, p.params)) < 1e-9
    nll = reference.problem_nll(p)
    assert reference.relative_error(Gs * backend.factor, reference.gradients(model, nll, x, y, p.params)) < 1e-9
    assert reference.relative_error(loss * backend.factor, nll(f, y)) < 1e-12


class Turned(nn.Module):
    """Has positions first where there are more than three data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1))).transpose(0, 1) if len(x) > 3 else torch.tanh(self.a(x))
        return self.b(h.sum(1))


@peers
@pytest.mark.parametrize("cls", [AsdlGGN, AsdlEF])
def test_as_many_positions_as_data_are_compared_on_all(cls: type) -> None:
    model = Turned().double()
    x, y = torch.randn(4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    backend = cls(model, "classification")
    calls = [lambda: backend.jacobians(x), lambda: backend.gradients(x, y), lambda: backend.diag(x, y)[1].diagonal()]
    for call in calls:
        with pytest.raises(UnsupportedError, match="another order"):
            call()


@peers
@pytest.mark.parametrize("p", [p for p in ALL if p.name != "subnetwork"], ids=lambda p: p.name)
def test_factors_are_those_of_the_native_engine(p: problems.Problem) -> None:
    x, y = p.data()
    model = p.model()
    for theirs, ours, stochastic in (
        (AsdlGGN, GGNInterface, False),
        (AsdlGGN, GGNInterface, True),
        (AsdlEF, EFInterface, False),
    ):
        more: Any = {"stochastic": True, "num_samples": 2} if stochastic else {}
        with untouched(model):
            backend = made(theirs, p, model, **more, generator=seeded(1))
            if p.name in FACTORS:
                with pytest.raises(UnsupportedError, match=FACTORS[p.name]):
                    backend.kron(x, y, N=9)[1].to_dense()
                continue
            loss, K = backend.kron(x, y, N=9)
            assert "not computed; by asdl 0.1a4" in repr(K)
            dense = K.to_dense()
        native_loss, native = made(ours, p, model, **more, generator=seeded(1)).kron(x, y, N=9)
        assert torch.equal(loss, native_loss)
        assert reference.relative_error(dense, native.to_dense()) < 1e-10


# ---------------------------------------------------------------- the interface


@peers
def test_arguments_are_those_of_the_documentation() -> None:
    p = problems.problem("dictionary")
    x, y = p.data()
    model = p.model()
    nll = reference.problem_nll(p)
    for cls in (AsdlEF, AsdlHessian):
        backend = cls(model, p.loss(), False, "a", "labels")
        assert backend.subnetwork_indices is None
        chosen = torch.tensor([5, 0, 12])
        part = cls(model, p.loss(), dict_key_x="a", subnetwork_indices=chosen).full(x, y)[1].to_dense()
        assert reference.relative_error(part, matrix(cls, p)[chosen][:, chosen]) < 1e-9
        assert backend._get_batch_size(x) == 4
        assert reference.relative_error(backend.full(x, y)[1].to_dense(), matrix(cls, p)) < 1e-9
    J = reference.jacobian(model, x)
    for indices in (None, torch.tensor([5, 0, 12])):
        Js, _ = AsdlInterface(model, p.loss(), False, indices, "a", "labels").jacobians(x)
        assert reference.relative_error(Js, J if indices is None else J[..., indices]) < 1e-9
        rows, _ = AsdlGGN(model, p.loss(), False, indices, "a").selected_output_jacobians(x, torch.tensor([2, 0, 1, 1]))
        wanted = J[torch.arange(4), torch.tensor([2, 0, 1, 1])].unsqueeze(1)
        assert reference.relative_error(rows, wanted if indices is None else wanted[..., indices]) < 1e-9
    with pytest.raises(UnsupportedError, match="GGNInterface, EFInterface or HessianInterface"):
        AsdlInterface(model, p.loss(), dict_key_x="a").full(x, y)
    Gs, _ = AsdlInterface(model, p.loss(), dict_key_x="a").gradients({**x, "labels": y}, y)
    assert reference.relative_error(Gs, reference.gradients(model, nll, x, y)) < 1e-9
    assert AsdlGGN(model, "classification")._get_batch_size(torch.zeros(7, 2)) == 7
    assert repr(AsdlGGN(model, "classification")) == "AsdlGGN(Dictionary, classification) [by asdl 0.1a4]"


@peers
def test_last_layer_of_any_network() -> None:
    """Whatever lies in front of the last layer: only its own parameters are ASDL's concern."""
    p = problems.problem("keywords")
    x, y = p.data()
    model = FeatureExtractor(p.model(), last_layer_name="classifier")
    J = reference.jacobian(p.model(), x)[..., 18:]
    backend = AsdlGGN(model, p.loss())
    with untouched(model):
        Js, f = backend.last_layer_jacobians(x)
    assert Js.shape == (4, 3, 12)
    assert f.shape == (4, 3)
    assert reference.relative_error(Js, J) < 1e-9
    last = AsdlGGN(model, p.loss(), last_layer=True)
    G = reference.ggn(p.model(), reference.problem_nll(p), x, y)[18:, 18:]
    assert reference.relative_error(last.full(x, y)[1].to_dense(), G) < 1e-9
    assert reference.relative_error(last.diag(x, y)[1].diagonal(), G.diagonal()) < 1e-9
    native = GGNInterface(model, p.loss(), last_layer=True)
    assert reference.relative_error(last.kron(x, y, N=4)[1].to_dense(), native.kron(x, y, N=4)[1].to_dense()) < 1e-10
    part = AsdlGGN(model, p.loss(), True, torch.tensor([3, 11, 0]))
    assert reference.relative_error(part.jacobians(x)[0], J[..., [3, 11, 0]]) < 1e-9
    assert reference.relative_error(part.diag(x, y)[1].diagonal(), G.diagonal()[[3, 11, 0]]) < 1e-9
    with pytest.raises(UnsupportedLayerError, match="row per token"):
        backend.jacobians(x)


@peers
@pytest.mark.parametrize("name", ["mlp", "mlp-weighted", "mlp-ignored", "tokens", "conv2d"])
def test_draws_are_those_of_the_native_fisher(name: str) -> None:
    p = problems.problem(name)
    x, y = p.data()
    for method in ("full", "diag"):
        theirs, ours = (
            getattr(cls(p.model(), p.loss(), stochastic=True, num_samples=3, generator=seeded(5)), method)(x, y)[1]
            for cls in (AsdlGGN, GGNInterface)
        )
        assert "by asdl" in repr(theirs)
        assert reference.relative_error(theirs.to_dense(), ours.to_dense()) < 1e-10


@peers
def test_likelihoods_that_asdl_does_not_know() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")
    for theirs, ours in ((AsdlGGN, GGNInterface), (AsdlEF, EFInterface), (AsdlHessian, HessianInterface)):
        for method in ("full", "diag"):
            one, two = (getattr(cls(p.model(), smooth), method)(x, y)[1] for cls in (theirs, ours))
            assert reference.relative_error(one.to_dense(), two.to_dense()) < 1e-10
    p = problems.problem("mlp-regression")
    x, y = p.data()
    wavy = co.likelihoods.Likelihood.from_loss(lambda f, t: torch.cos(f - t).sum())
    _, G = AsdlGGN(p.model(), wavy).full(x, y)
    assert "by curvops: asdl 0.1a4 is given the columns of a root" in repr(G)
    assert reference.relative_error(G.to_dense(), GGNInterface(p.model(), wavy).full(x, y)[1].to_dense()) < 1e-10
    with pytest.raises(UnsupportedError, match="is_convex"):
        AsdlGGN(p.model(), wavy).diag(x, y)


@peers
def test_small_budgets_change_nothing() -> None:
    p = problems.problem("conv2d")
    x, y = p.data()
    x, y = torch.cat([x, p.data(batch=1)[0]]), torch.cat([y, p.data(batch=1)[1]])
    model, nll = p.model(), reference.problem_nll(p)
    P = sum(q.numel() for q in model.parameters())
    backend = AsdlGGN(model, "classification")
    G = reference.ggn(model, nll, x, y)
    backend.memory_budget = 8 * 8 * 3 * P + 1000  # the Jacobians themselves, and examples one by one
    assert reference.relative_error(backend.jacobians(x)[0], reference.jacobian(model, x)) < 1e-9
    backend.memory_budget = 12_000
    assert reference.relative_error(backend.diag(x, y)[1].diagonal(), G.diagonal()) < 1e-9
    _, H = backend.full(x, y)
    v = torch.randn(P, 2, generator=seeded(0), dtype=torch.float64)
    assert reference.relative_error(H @ v, G @ v) < 1e-9
    assert reference.relative_error(H @ v, G @ v) < 1e-9
    backend.memory_budget = 1000
    with pytest.raises(MemoryBudgetError, match="matrix-free"):
        backend.jacobians(x)
    hessian = AsdlHessian(model, "classification")
    hessian.memory_budget = 3000
    with pytest.raises(MemoryBudgetError, match=r"'0', 27 x 27.*Use diag\(\) of HessianInterface"):
        hessian.diag(x, y)[1].diagonal()


@peers
def test_operators_behave_as_all_others() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model: Any = p.model()
    backend = AsdlGGN(model, "classification")
    _, H = backend.full(x, y)
    _, K = backend.kron(x, y, N=4)
    wanted = matrix(AsdlGGN, p)
    shifted = wanted + torch.eye(len(wanted), dtype=wanted.dtype)
    v = torch.randn(len(wanted), generator=seeded(0), dtype=wanted.dtype)
    A = H.add_diagonal(1.0)
    assert torch.allclose(A.solve(v, co.CG(rtol=1e-12)), torch.linalg.solve(shifted, v), atol=1e-9)
    assert abs(float(A.logdet()) - float(torch.linalg.slogdet(shifted)[1])) < 1e-9
    assert H.to(torch.float32).to_dense().dtype == torch.float32
    assert list(H.layout or {}) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    H.release()
    assert torch.allclose(H @ v, wanted @ v, atol=1e-10)
    assert "asdl" in H.explain("matvec") or "asdl" in H.describe()
    J = reference.jacobian(p.model(), x)
    with torch.inference_mode():
        assert reference.relative_error(backend.jacobians(x)[0], J) < 1e-9
        assert torch.allclose(backend.full(x, y)[1] @ v, wanted @ v, atol=1e-10)
    differentiable, _ = backend.jacobians(x, enable_backprop=True)
    assert differentiable.requires_grad  # curvops' own: those of ASDL have no graph
    assert torch.allclose(backend.functorch_jacobians(x)[0], differentiable.detach(), atol=1e-12)
    with torch.no_grad():
        model[0].weight.mul_(2)
    for operator in (H, K):
        with pytest.raises(StaleOperatorError):
            operator.to_dense()


@peers
@pytest.mark.parametrize("name", ["mlp", "conv2d", "batchnorm2d", "layernorm", "tokens"])
def test_single_precision(name: str) -> None:
    p = problems.problem(name)
    x, y = p.data(torch.float32)
    for cls in (AsdlGGN, AsdlEF, AsdlHessian):
        backend = made(cls, p, p.model(torch.float32), torch.float32)
        wanted = matrix(cls, p)
        assert reference.relative_error(backend.full(x, y)[1].to_dense().double(), wanted) < 2e-5
        assert reference.relative_error(backend.diag(x, y)[1].diagonal().double(), wanted.diagonal()) < 2e-5


@peers
def test_factors_of_batches_add_up_and_reduce_is_for_single_positions() -> None:
    p = problems.problem("conv2d")
    (x1, y1), (x2, y2) = p.data(batch=0), p.data(batch=1)
    backend = AsdlEF(p.model(), "classification")
    whole: Any = backend.kron(torch.cat([x1, x2]), torch.cat([y1, y2]), N=8)[1]
    parts: list[Any] = [backend.kron(x, y, N=8)[1] for x, y in ((x1, y1), (x2, y2))]
    for block, one, two in zip(whole.content().blocks, *(part.content().blocks for part in parts), strict=True):
        sides = [b.factors if isinstance(b, co.Kronecker) else (b,) for b in (block, one, two)]
        for total, first, second in zip(*sides, strict=True):
            assert torch.allclose(total.to_dense(), first.to_dense() + second.to_dense(), atol=1e-11)
    with pytest.raises(UnsupportedLayerError, match="several positions"):
        backend.kron(x1, y1, N=4, kfac_approx="reduce")
    p = problems.problem("tokens")
    x, y = p.data()
    with pytest.raises(UnsupportedLayerError, match=r"several positions.*co\.KFAC"):
        AsdlGGN(p.model(), "classification").kron(x, y, N=4, kfac_approx="reduce")[1].to_dense()
    p = problems.problem("mlp")
    x, y = p.data()
    one, two = (cls(p.model(), p.loss()).kron(x, y, N=5, kfac_approx="reduce")[1] for cls in (AsdlGGN, GGNInterface))
    assert reference.relative_error(one.to_dense(), two.to_dense()) < 1e-10
    with pytest.raises(DataError, match="stochastic=True"):
        AsdlGGN(p.model(), p.loss()).kron(x, y, N=5, mc_samples=2)
    with pytest.raises(UnsupportedError, match="GGNInterface"):
        AsdlHessian(p.model(), p.loss()).kron(x, y, N=5)


# ---------------------------------------------------------------- the library itself


@peers
@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "conv2d", "maxpool"])
def test_the_numbers_are_those_of_asdl_itself(asdl: Any, name: str) -> None:
    """On a network and a likelihood that it knows, through the door that laplace-torch takes."""
    p = problems.problem(name)
    x, y = p.data()
    model: Any = p.model()
    regression = p.likelihood == "regression"
    lossfunc = nn.MSELoss() if regression else nn.CrossEntropyLoss()
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    for cls, kind in ((AsdlGGN, "fisher_exact"), (AsdlEF, "fisher_emp")):
        kinds = {"fisher_type": kind, "loss_type": "mse" if regression else "cross_entropy", "data_size": 1}
        maker = asdl.fisher.get_fisher_maker(model, asdl.FisherConfig(fisher_shapes=["diag", "kron"], **kinds))
        maker.setup_loss_call(lossfunc, maker.setup_model_call(model, x), y)
        maker.forward_and_backward()
        scale = 0.5 if regression and cls is AsdlEF else 1.0
        diagonal = torch.cat([t.reshape(-1) for m in layers for t in (m.fisher.diag.weight, m.fisher.diag.bias)])
        backend = cls(p.model(), p.loss())
        assert reference.relative_error(backend.diag(x, y)[1].diagonal(), scale * diagonal) < 1e-10
        pairs = [(m.fisher.kron.B * scale, m.fisher.kron.A / 7) for m in layers]
        blocks = [block for B, A in pairs for block in (torch.kron(B, A), B)]
        assert reference.relative_error(backend.kron(x, y, N=7)[1].to_dense(), torch.block_diag(*blocks)) < 1e-10
    maker = asdl.HessianMaker(model, asdl.HessianConfig(hessian_shapes=["full"]))
    maker.setup_loss_call(
        nn.MSELoss(reduction="sum") if regression else nn.CrossEntropyLoss(reduction="sum"),
        maker.setup_model_call(model, x),
        y,
    )
    maker.forward_and_backward()
    H = AsdlHessian(p.model(), p.loss()).full(x, y)[1]
    assert reference.relative_error(H.to_dense(), model.hessian.data.detach() * (0.5 if regression else 1.0)) < 1e-10


def their_rows(asdl: Any, model: nn.Module, x: Tensor, output: int = 0) -> Tensor:
    """ASDL's Jacobian of one output."""

    def closure() -> Tensor:
        f = model(x)
        f.reshape(len(f), -1)[:, output].sum().backward()
        return f

    return asdl.gradient.batch_gradient(model, closure)


def their_diagonal(asdl: Any, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """ASDL's diagonal of the GGN for classification: a tensor per parameter that it has found."""
    config = asdl.FisherConfig(
        fisher_type="fisher_exact", loss_type="cross_entropy", fisher_shapes=["diag"], data_size=1
    )
    maker = asdl.fisher.get_fisher_maker(model, config)
    maker.setup_model_call(model, x)
    maker.forward_and_backward()
    found = [m.fisher.diag for m in model.modules() if getattr(m, "fisher", None) is not None]
    return [t.detach() for d in found for t in (d.weight, d.bias) if t is not None]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@peers
def test_a_module_that_runs_twice_is_wrong_in_asdl_and_refused_here(asdl: Any) -> None:
    p = problems.problem("module-twice")
    x, _ = p.data()
    right = reference.jacobian(p.model(), x)[:, 0]
    theirs = their_rows(asdl, p.model(), x)
    assert theirs.shape == right.shape
    assert reference.relative_error(theirs, right) > 0.1
    with pytest.raises(UnsupportedLayerError, match=r"'shared' \(Linear\) runs 2 times"):
        AsdlGGN(p.model(), p.loss()).jacobians(x)


@peers
def test_positions_are_data_in_asdl_and_summed_here(asdl: Any) -> None:
    """A linear layer on every position, then their mean: ASDL's gradients have a row per position, its diagonal drops
    the products of different ones."""
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)).mean(1))

    model = Pooled().double()
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    G = reference.ggn(model, reference.nll("classification"), x, y)
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        their_rows(asdl, model, x)
    assert reference.relative_error(flat(their_diagonal(asdl, model, x, y)), G.diagonal()) > 0.1
    backend = AsdlGGN(model.requires_grad_(), "classification")
    assert reference.relative_error(backend.jacobians(x)[0], reference.jacobian(model, x)) < 1e-9
    assert reference.relative_error(backend.diag(x, y)[1].diagonal(), G.diagonal()) < 1e-9
    native = GGNInterface(model, "classification").kron(x, y, N=4)[1]
    assert reference.relative_error(backend.kron(x, y, N=4)[1].to_dense(), native.to_dense()) < 1e-10


@peers
def test_large_kernels_are_wrong_in_asdl_and_right_here(asdl: Any) -> None:
    """With many channels and few positions its diagonal takes the squares before the positions are summed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)).double()
    x, y = torch.randn(3, 6, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    wanted = reference.jacobian(model, x)
    p = torch.softmax(model(x).detach(), 1)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    diagonal = torch.einsum("ncp,ncd,ndp->p", wanted, Lambda, wanted)
    assert reference.relative_error(flat(their_diagonal(asdl, model, x, y)), diagonal) > 0.1
    ours = AsdlGGN(model.requires_grad_(), "classification").diag(x, y)[1].diagonal()
    assert reference.relative_error(ours, diagonal) < 1e-9


@peers
def test_groups_are_wrong_in_asdl_and_refused_here(asdl: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 2, groups=2, bias=False), nn.Flatten()).double()
    x, y = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1])
    assert len(their_rows(asdl, model, x)) == 6  # rows for 3 data
    with pytest.raises(UnsupportedLayerError, match=r"'0' \(Conv2d\), which has groups=2"):
        AsdlGGN(model, "classification").diag(x, y)[1].diagonal()


@peers
def test_embeddings_are_wrong_in_asdl_and_refused_here(asdl: Any) -> None:
    p = problems.problem("embedding")
    x, y = p.data()
    right = matrix(AsdlGGN, p).diagonal()
    theirs = flat(their_diagonal(asdl, p.model(), x, y))
    assert theirs.shape == right.shape
    assert reference.relative_error(theirs, right) > 0.1
    with pytest.raises(UnsupportedLayerError, match=r"embedding '0' \(Embedding\) a row per token"):
        AsdlGGN(p.model(), p.loss()).diag(x, y)[1].diagonal()


@peers
def test_raw_and_tied_parameters_are_lost_in_asdl_and_refused_here(asdl: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.PReLU(), nn.Linear(3, 3, bias=False)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64, generator=seeded(0)), torch.tensor([0, 1, 2, 0])
    assert their_rows(asdl, model, x).shape == (4, 18)  # of 19
    with pytest.raises(UnsupportedLayerError, match=r"'1.weight' belongs to '1' \(PReLU\).*use GGNInterface"):
        AsdlGGN(model, "classification").jacobians(x)
    model[2].weight = model[0].weight
    with pytest.raises(UnsupportedLayerError, match="tied"):
        AsdlGGN(model, "classification").gradients(x, y)
    _, H = AsdlGGN(model, "classification").full(x, y)
    assert "by curvops: parameter '0.weight' is tied" in repr(H)


class Normed(nn.Module):
    """Batch normalisation behind which something works in place."""

    def __init__(self, inplace: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 3)
        self.act = nn.Sigmoid() if not inplace else nn.LeakyReLU(0.1, inplace=True)
        nn.init.constant_(self.norm.weight, scale)
        nn.init.constant_(self.norm.bias, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


@peers
def test_normalisations_read_backwards_are_wrong_in_asdl_and_refused_here(asdl: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    for model in (Normed(True).double().eval(), Normed(False, 0.0).double().eval()):
        right = reference.jacobian(model, x)[:, 0]
        assert not torch.allclose(their_rows(asdl, model, x), right, rtol=0.01)
        with pytest.raises(UnsupportedLayerError, match=r"'norm.weight' of 'norm' \(BatchNorm2d\)"):
            AsdlGGN(model, "classification").jacobians(x)
    model = Normed(False).double().eval()
    right = reference.jacobian(model, x)
    assert reference.relative_error(AsdlGGN(model, "classification").jacobians(x)[0], right) < 1e-9
    no_bias = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 2)).double()
    with pytest.raises(UnsupportedLayerError, match="lacks a weight or a bias"):
        AsdlGGN(no_bias, "classification").jacobians(x.flatten(1)[:, :3])


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight**2, self.bias)


class Beside(nn.Module):
    """A weight used beside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.code(x)) @ self.code.weight


class Centred(nn.Module):
    """One example's outputs depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        f = self.first(x)
        return f - f.mean(0)


class Routed(nn.Module):
    """Sends positive data through one layer, the others through another; each sees a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.plus, self.minus = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        positive = x[:, 0] > 0
        f = x.new_zeros(len(x), 3)
        f[positive] = self.plus(x[positive])
        if not bool(positive.all()):
            f[~positive] = self.minus(x[~positive])
        return f


@peers
def test_layers_that_run_otherwise_on_later_data() -> None:
    """The first three data take one way together: what comes later is looked at all the same."""
    x = torch.randn(4, 4, dtype=torch.float64, generator=seeded(0))
    x[:, 0] = torch.tensor([1.0, 2.0, 1.0, -1.0])
    backend = AsdlGGN(Routed().double(), "classification")
    y = torch.tensor([0, 1, 2, 0])
    for call in (
        lambda: backend.jacobians(x),
        lambda: backend.diag(x, y)[1].diagonal(),
        lambda: backend.kron(x, y, N=4)[1].to_dense(),
    ):
        with pytest.raises(UnsupportedLayerError, match=r"'plus' \(Linear\) ran on 3 rows for 4 data"):
            call()


@peers
def test_functional_use_subclasses_and_mixed_batches() -> None:
    x, y = problems.problem("mlp").data()
    with pytest.raises(UnsupportedLayerError, match="beside the calls of its module 'code'"):
        AsdlGGN(Beside().double(), "regression").jacobians(x)
    with pytest.raises(UnsupportedLayerError, match="forward of its own"):
        AsdlGGN(Squared(4, 3).double(), "classification").gradients(x, y)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    with pytest.raises(UnsupportedLayerError, match="ParametrizationList"):
        AsdlGGN(normed, "classification").gradients(x, y)
    for q in normed.parametrizations.parameters():  # type: ignore[union-attr]
        q.requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match="computes its weight"):
        AsdlGGN(normed, "classification").gradients(x, y)
    with pytest.raises(UnsupportedError, match="other examples"):
        AsdlGGN(Centred().double(), "classification").gradients(x, y)
    dilated = nn.Sequential(nn.Conv2d(1, 2, 2, dilation=2), nn.Flatten()).double()
    with pytest.raises(UnsupportedLayerError, match=r"dilation=\(2, 2\)"):
        AsdlGGN(dilated, "classification").jacobians(torch.randn(2, 1, 3, 3, dtype=torch.float64))
    # A bias whose gradient vanishes but for rounding is no error.
    cancelled = nn.Sequential(nn.Conv2d(1, 2, 2), nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    images = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=seeded(0))
    Js, _ = AsdlGGN(cancelled, "classification").jacobians(images)
    assert reference.relative_error(Js, reference.jacobian(cancelled, images)) < 1e-9


@peers
def test_an_exception_in_asdl_touches_nothing(asdl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ASDL's own door leaves every parameter without `requires_grad`; here nothing is changed, whatever fails."""
    p = problems.problem("mlp")
    x, y = p.data()
    model: Any = p.model()
    model[0].register_full_backward_hook(lambda *_: pytest.fail("the user's hook ran"))
    backends = [cls(model, p.loss()) for cls in (AsdlGGN, AsdlEF)]
    wanted = backends[0].diag(x, y)[1].diagonal()

    def fails(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("cov_diag_weight", "batch_grads_weight", "cov_kron_B"):
            patch.setattr(asdl.operations.linear.Linear, name, staticmethod(fails))
        victim = p.model()
        with pytest.raises(KeyboardInterrupt):
            their_diagonal(asdl, victim, x, y)
        assert not any(q.requires_grad for q in victim.parameters())
        for backend in backends:
            for call in (
                lambda b: b.jacobians(x),
                lambda b: b.gradients(x, y),
                lambda b: b.full(x, y)[1].to_dense(),
                lambda b: b.diag(x, y)[1].diagonal(),
                lambda b: b.kron(x, y, N=4)[1].to_dense(),
            ):
                with untouched(model), pytest.raises(KeyboardInterrupt):
                    call(backend)
    assert torch.equal(backends[0].diag(x, y)[1].diagonal(), wanted)


@peers
@pytest.mark.filterwarnings("always")
def test_troubles_that_only_a_forward_shows_are_met_with_own_products_and_a_warning() -> None:
    p = problems.problem("module-twice")
    x, y = p.data()
    _, H = AsdlGGN(p.model(), p.loss()).full(x, y)
    assert "by asdl 0.1a4" in repr(H)
    with pytest.warns(NumericalWarning, match="runs 2 times"):
        dense = H.to_dense()
    assert reference.relative_error(dense, matrix(AsdlGGN, p)) < 1e-9
    assert "by curvops: asdl 0.1a4" in repr(H)


# ---------------------------------------------------------------- versions and extras


@peers
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1a5")
    with pytest.raises(UnsupportedError, match=r"asdfghjkl 0\.1a5 is installed, and 0\.1a4 is wanted.*pip install"):
        AsdlGGN(nn.Linear(2, 2), "classification")


@peers
def test_importing_curvops_imports_no_asdl() -> None:
    code = "import sys, curvops; sys.exit(any(name.split('.')[0] == 'asdl' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("cls", [AsdlInterface, AsdlGGN, AsdlEF, AsdlHessian])
def test_without_the_extra(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asdl", None)
    with pytest.raises(MissingExtraError, match=r"asdl is not installed.*pip install 'curvops\[asdl\]'"):
        cls(nn.Linear(2, 2), "classification")
