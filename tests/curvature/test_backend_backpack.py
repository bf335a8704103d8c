"""BackPACK as a backend: right on every problem, or refused by name; nothing of the user's touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.curvature import BackPackEF, BackPackGGN, BackPackInterface, EFInterface, GGNInterface
from curvops.curvature.backends import backpack_adapter as adapter
from curvops.errors import DataError, StaleOperatorError, UnsupportedError, UnsupportedLayerError
from curvops.testing import problems

BY = f"by {adapter.provenance()}"

FEW = (
    "mlp", "mlp-regression", "mlp-weighted", "mlp-ignored", "cnn", "conv2d-same", "layernorm", "relu-inplace",
    "residual", "module-twice", "tied", "frozen", "last-layer", "subnetwork", "dictionary", "tokens-regression",
)  # fmt: skip
"""What the quick run looks at."""

LAYERS_REFUSED = {
    "dealt-ignored": "in order",
    "conv2d-same": "padding='same'", "conv2d-circular": "circular", "layernorm": "LayerNorm", "groupnorm": "GroupNorm",
    "instancenorm": "InstanceNorm", "rmsnorm": "RMSNorm", "embedding": "float64", "embedding-padding": "padding_idx",
    "embeddingbag-sum": "EmbeddingBag", "embeddingbag-mean": "EmbeddingBag", "embeddingbag-padding": "EmbeddingBag",
    "multihead-attention": "MultiheadAttention", "transformer-encoder": "MultiheadAttention", "rnn": "RNN",
    "lstm": "LSTM", "gru": "GRU", "rnn-cell": "RNNCell", "lstm-cell": "LSTMCell", "gru-cell": "GRUCell",
    "cross-attention": "MultiheadAttention",
    "module-twice": "runs 2 times", "linear-as-kernel": "used beside", "tied": "tied",
    "raw-parameters": "Raw", "joined": "Joined",
    "keywords": "float64", "adapter": "Adapter", "language-model": "LanguageModel",
}  # fmt: skip
"""Problems whose layers BackPACK does not know or gets wrong, and the word by which it is refused."""

PATH_REFUSED = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv2d-groups", "conv3d", "convtranspose1d", "convtranspose2d", "maxpool"), "Apply"
    ),
    "adaptive-avgpool": "Apply", "batchnorm2d": "Apply", "tokens-paired-ignored": "Apply",
    "sdpa": "loses the derivative", "gelu": "GELU",
    "silu": "SiLU", "softplus": "Softplus", "residual": r"'0.body.1' \(Tanh\)", "dictionary": "loses the derivative",
}  # fmt: skip
"""Problems where the derivative passes what is no module, or a module that it does not know."""

KRON_REFUSED = {
    "mlp-ignored": "ignored", "tokens-ignored-weighted": "ignored",
    "tokens-paired-ignored": "ignored", "dealt-ignored": "ignored", "batchnorm1d": "BatchNorm1d",
    "batchnorm2d": "BatchNorm2d", "conv1d": "groups=2", "conv2d-groups": "groups=2",
    "convtranspose1d": "ConvTranspose1d", "convtranspose2d": "ConvTranspose2d", "embedding": "Embedding",
    "embedding-padding": "Embedding",
    "keywords": "Embedding", "subnetwork": "subnetwork_indices",
}  # fmt: skip


def quick(*names: str) -> list[Any]:
    """All problems, those not named marked slow."""
    return [
        pytest.param(p, id=p.name, marks=() if p.name in names else pytest.mark.slow)
        for p in problems.problems()
        if p.name != "selected-names"
    ]


ALL = quick(*FEW)


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


def right_or_refused(model: nn.Module, refused: str | None, answer: Callable[[], Tensor], wanted: Tensor) -> None:
    with untouched(model):
        if refused is not None:
            with pytest.raises(UnsupportedError, match=refused) as caught:
                answer()
            assert "use " in str(caught.value)  # the way out is named
            return
        found = answer()
    assert found.shape == wanted.shape
    assert reference.relative_error(found, wanted) < 1e-9


# ---------------------------------------------------------------- every problem


@pytest.mark.parametrize("p", ALL)
def test_rows_against_oracles(p: problems.Problem) -> None:
    x, y = p.data()
    model, nll = p.model(), reference.problem_nll(p)
    backend = BackPackGGN(model, p.loss(), **options(p))
    refused = LAYERS_REFUSED.get(p.name)
    right_or_refused(model, refused, lambda: backend.jacobians(x)[0], reference.jacobian(p.oracle_model(), x, p.params))
    factor = backend.factor
    Gs = reference.gradients(p.oracle_model(), nll, x, y, p.params) / factor
    right_or_refused(model, refused, lambda: backend.gradients(x, y)[0], Gs)
    assert backend.functorch_jacobians(x)[0].shape[-1] == Gs.shape[1]  # native, whatever BackPACK refuses


@pytest.mark.parametrize("p", quick("mlp-ignored", "tied", "subnetwork", "tokens-regression"))
def test_products_against_oracles(p: problems.Problem) -> None:
    x, y = p.data()
    model, oracle, nll = p.model(), p.oracle_model(), reference.problem_nll(p)
    for cls, wanted in (
        (BackPackGGN, reference.ggn(oracle, nll, x, y, p.params)),
        (BackPackEF, reference.empirical_fisher(oracle, nll, x, y, p.params) * (2 if "regression" in p.name else 1)),
    ):
        with untouched(model):
            loss, H = cls(model, p.loss(), **options(p)).full(x, y)
            dense = H.to_dense()
        assert reference.relative_error(dense, wanted) < 1e-9
        assert reference.relative_error(loss, nll(reference.outputs(oracle, x), y).detach()) < 1e-12
        assert BY in repr(H)
        assert BY in H.describe()


@pytest.mark.filterwarnings("ignore:the outputs do not depend:curvops.errors.NumericalWarning")
@pytest.mark.parametrize("p", ALL)
def test_diagonals_against_oracles(p: problems.Problem) -> None:
    x, y = p.data()
    model, oracle, nll = p.model(), p.oracle_model(), reference.problem_nll(p)
    refused = LAYERS_REFUSED.get(p.name)
    right_or_refused(
        model,
        refused,
        lambda: BackPackEF(model, p.loss(), **options(p)).diag(x, y)[1].diagonal(),
        reference.empirical_fisher(oracle, nll, x, y, p.params).diagonal() * (2 if "regression" in p.name else 1),
    )
    refused = refused or PATH_REFUSED.get(p.name)
    right_or_refused(
        model,
        refused,
        lambda: BackPackGGN(model, p.loss(), **options(p)).diag(x, y)[1].diagonal(),
        reference.ggn(oracle, nll, x, y, p.params).diagonal(),
    )
    own: Any = {"stochastic": True, "num_samples": 2}
    right_or_refused(
        model,
        refused,
        lambda: BackPackGGN(model, p.loss(), **own, **options(p), generator=seeded(3)).diag(x, y)[1].diagonal(),
        GGNInterface(model, p.loss(), **own, **options(p), generator=seeded(3)).diag(x, y)[1].diagonal(),
    )


@pytest.mark.filterwarnings("ignore:the outputs do not depend:curvops.errors.NumericalWarning")
@pytest.mark.parametrize("p", quick("mlp-regression", "mlp-weighted", "cnn", "residual", "tied", "tokens-regression"))
def test_factors_are_those_of_the_native_engine(p: problems.Problem) -> None:
    x, y = p.data()
    model = p.model()
    refused = KRON_REFUSED.get(p.name) or LAYERS_REFUSED.get(p.name) or PATH_REFUSED.get(p.name)
    for approx in ("expand", "reduce"):
        for more in ({}, {"stochastic": True, "num_samples": 2}):
            everything: Any = {**more, **options(p), "generator": seeded(1)}
            again: Any = {**everything, "generator": seeded(1)}
            wanted = (
                torch.zeros(0)
                if p.name == "subnetwork"
                else GGNInterface(model, p.loss(), **everything).kron(x, y, N=9, kfac_approx=approx)[1].to_dense()
            )
            backend = BackPackGGN(model, p.loss(), **again)
            right_or_refused(
                model, refused, lambda b=backend, a=approx: b.kron(x, y, N=9, kfac_approx=a)[1].to_dense(), wanted
            )


# ---------------------------------------------------------------- every layer that it is let near


class View(nn.Module):
    """A container whose forward flattens by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).flatten(1))


class Permuted(View):
    """The same, with the axes exchanged before: no view of the same order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).transpose(1, 2).flatten(1))


class Scaled(View):
    """The same, with a function in between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mul(2.0).flatten(1))


def net(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


WITH_FACTORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (net(nn.Conv1d(2, 3, 2, dilation=2, padding=1), nn.Tanh()), (2, 5)),
    "conv2d": (net(nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), bias=False), nn.Sigmoid()), (2, 4, 4)),
    "conv3d": (net(nn.Conv3d(1, 2, 2, padding=1, stride=2), nn.ReLU()), (1, 3, 3, 2)),
    "maxpool2d": (net(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, 1), nn.ReLU(inplace=True)), (1, 4, 4)),
    "padding": (net(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3, dilation=2), nn.Identity()), (2, 3, 3)),
    "view": (View, (2, 3, 3)),
}
WITHOUT_FACTORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d-groups": (net(nn.Conv1d(4, 2, 2, groups=2, stride=2), nn.LeakyReLU(0.3)), (4, 5)),
    "conv2d-groups": (net(nn.Conv2d(4, 4, 2, groups=4, dilation=2), nn.ELU()), (4, 4, 4)),
    "transposed1d": (net(nn.ConvTranspose1d(4, 2, 2, groups=2, stride=2), nn.SELU()), (4, 3)),
    "transposed2d": (net(nn.ConvTranspose2d(2, 2, 2, stride=2, dilation=2)), (2, 2, 2)),
    "transposed3d": (net(nn.ConvTranspose3d(1, 2, 2, padding=1), nn.LogSigmoid()), (1, 3, 2, 3)),
    "batchnorm2d": (net(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout()), (1, 4, 4)),
    "batchnorm3d": (net(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.MaxPool3d(2, 1)), (1, 3, 3, 3)),
    "maxpool1d": (net(nn.Conv1d(1, 2, 2), nn.MaxPool1d(2, 1)), (1, 5)),
}
LAYERS = {**WITH_FACTORS, **WITHOUT_FACTORS}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = LAYERS[name]
    x = torch.randn(4, *shape, generator=seeded(1), dtype=torch.float64).to(dtype)
    model = build()
    model.double().to(dtype)(x)
    for i, p in enumerate(model.parameters()):
        p.data = (torch.randn(p.shape, generator=seeded(10 + i), dtype=torch.float64) / 2).to(dtype)
    for b in model.buffers():
        if b.is_floating_point():
            b.copy_(0.5 + torch.rand(b.shape, generator=seeded(3), dtype=torch.float64))
    return model.eval(), x, torch.arange(4) % 3


@pytest.mark.filterwarnings("ignore:.*Lazy.*:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_it_is_let_near(name: str) -> None:
    model, x, y = made(name)
    nll = reference.nll("classification")
    with untouched(model):
        assert (
            reference.relative_error(BackPackGGN(model, "classification").jacobians(x)[0], reference.jacobian(model, x))
            < 1e-12
        )
        D = BackPackGGN(model, "classification").diag(x, y)[1].diagonal()
        E = BackPackEF(model, "classification").diag(x, y)[1].diagonal()
    assert reference.relative_error(D, reference.ggn(model, nll, x, y).diagonal()) < 1e-12
    assert reference.relative_error(E, reference.empirical_fisher(model, nll, x, y).diagonal()) < 1e-12
    for approx in ("expand", "reduce") if name in WITH_FACTORS else ():
        K = BackPackGGN(model, "classification").kron(x, y, N=9, kfac_approx=approx)[1].to_dense()
        wanted = GGNInterface(model, "classification").kron(x, y, N=9, kfac_approx=approx)[1].to_dense()
        assert reference.relative_error(K, wanted) < 1e-12


@pytest.mark.parametrize(
    ("layers", "shape", "why"),
    [
        ((nn.Conv2d(2, 2, 2, padding_mode="reflect", padding=1),), (2, 3, 3), "padding_mode='reflect'"),
        ((nn.Conv1d(2, 2, 3, padding="valid"),), (2, 4), "padding='valid'"),
        ((nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1),), (2, 2, 2), "output_padding"),
    ],
)
def test_settings_that_it_ignores(layers: tuple[nn.Module, ...], shape: tuple[int, ...], why: str) -> None:
    model = nn.Sequential(*layers, nn.Flatten()).double()
    x = torch.randn(4, *shape, generator=seeded(1), dtype=torch.float64)
    y = torch.arange(4) % 3
    for answer in (
        lambda: BackPackGGN(model, "classification").diag(x, y),
        lambda: BackPackEF(model, "classification").jacobians(x),
    ):
        with pytest.raises(UnsupportedLayerError, match=why):
            answer()


def test_average_pooling_in_its_one_precision_without_a_draw() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(4, 1, 4, 4, generator=seeded(1))
    y = torch.arange(4) % 2
    with untouched(model):  # the global random state too
        D = BackPackGGN(model, "classification").diag(x, y)[1].diagonal()
    model.double()
    wanted = reference.ggn(model, reference.nll("classification"), x.double(), y).diagonal()
    assert reference.relative_error(D.double(), wanted) < 1e-5
    with untouched(model), pytest.raises(UnsupportedLayerError, match=r"fails .* at module '2' \(AdaptiveAvgPool2d\)"):
        BackPackGGN(model, "classification").diag(x.double(), y)[1].diagonal()


@pytest.mark.parametrize("kind", [Permuted, Scaled])
def test_functions_between_modules_are_found_out(kind: type[View]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    x = torch.randn(4, 2, 3, 3, generator=seeded(1), dtype=torch.float64)
    y = torch.arange(4) % 3
    for answer in ("diag", "kron"):
        with untouched(model), pytest.raises(UnsupportedLayerError, match=r"derivative .* module 'act' \(ReLU\)"):
            getattr(BackPackGGN(model, "classification"), answer)(x, y, N=4)[1].to_dense()
    wanted = reference.empirical_fisher(model, reference.nll("classification"), x, y).diagonal()
    assert reference.relative_error(BackPackEF(model, "classification").diag(x, y)[1].diagonal(), wanted) < 1e-12


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_are_not_taken_for_their_parents() -> None:
    x, y = problems.problem("mlp").data()
    for answer in (
        lambda: BackPackGGN(Subclass(4, 3).double(), "classification").diag(x, y),
        lambda: BackPackGGN(Subclass(4, 3).double(), "classification").jacobians(x),
        lambda: BackPackGGN(Subclass(4, 3).double(), "classification").kron(x, y, N=4),
    ):
        with pytest.raises(UnsupportedLayerError, match=r"Subclass\) is a subclass"):
            answer()


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1)


class Swapped(Flattened):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.transpose(0, 1))).mean(0)


@pytest.mark.parametrize("kind", [Flattened, Swapped])
def test_rows_that_are_not_the_data(kind: type[nn.Module]) -> None:
    x, y = torch.randn(4, 4, 4, generator=seeded(0), dtype=torch.float64), torch.arange(4) % 3
    model = kind().double()
    ggn, ef = BackPackGGN(model, "classification"), BackPackEF(model, "classification")
    for answer in (
        lambda: ggn.jacobians(x),
        lambda: ggn.gradients(x, y),
        lambda: ef.diag(x, y)[1].diagonal(),
        lambda: ggn.diag(x, y)[1].diagonal(),
    ):
        with untouched(model), pytest.raises(UnsupportedLayerError, match="rows that are not the batch's 4 data"):
            answer()


def test_embeddings_in_their_own_precision() -> None:
    p = problems.problem("embedding")
    x, y = p.data(torch.float32)
    J, _ = BackPackGGN(p.model(torch.float32), "classification").jacobians(x)
    assert reference.relative_error(J.double(), reference.jacobian(p.model(), x)) < 1e-5
    E = BackPackEF(p.model(torch.float32), "classification").diag(x, y)[1].diagonal()
    wanted = reference.empirical_fisher(p.model(), reference.problem_nll(p), x, y).diagonal()
    assert reference.relative_error(E.double(), wanted) < 1e-5


# ---------------------------------------------------------------- laziness and state


def test_nothing_is_computed_at_the_call_and_all_is_labelled() -> None:
    p = problems.problem("cnn")
    x, y = p.data()
    backend = BackPackGGN(p.model(), "classification")
    for operator in (backend.diag(x, y)[1], backend.kron(x, y, N=4)[1]):
        assert "not computed" in repr(operator)
        assert BY in repr(operator)
        operator.diagonal()
        assert "not computed" not in repr(operator)
        assert BY in operator.describe()
    assert BY in BackPackEF(p.model(), "regression").diag(x, torch.zeros(4, 3, dtype=x.dtype))[1].describe()
    assert "one product by backpack" in backend.full(x, y)[1]._explain_product()


def test_columns_in_small_chunks() -> None:
    p = problems.problem("cnn")
    x, y = p.data()
    small = BackPackGGN(p.model(), "classification")
    small.memory_budget = 80_000  # the dense matrix and its copy take 71 kB of it
    for method in ("diag", "full", "kron"):
        found = getattr(small, method)(x, y, N=4)[1].to_dense()
        wanted = getattr(BackPackGGN(p.model(), "classification"), method)(x, y, N=4)[1].to_dense()
        assert torch.allclose(found, wanted, atol=1e-12)


def test_stale_operators_and_copies() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    model: Any = p.model()
    backend = BackPackGGN(model, "classification")
    late, kept = backend.diag(x, y)[1], backend.diag(x, y)[1]
    before = kept.diagonal()
    H = backend.full(x, y)[1]
    H.to_dense()
    half = H.to(torch.float32).to_dense()
    assert torch.allclose(half.double(), H.to_dense(), atol=1e-5)
    with torch.no_grad():
        model[0].weight.mul_(2)
    for operator in (late, H):
        with pytest.raises(StaleOperatorError):
            operator.to_dense()
    assert torch.equal(kept.diagonal(), before)


def test_models_that_the_user_extended_keep_their_hooks_and_count_for_nothing() -> None:
    import backpack
    from backpack.context import CTX

    p = problems.problem("mlp")
    x, y = p.data()
    model, plain = backpack.extend(p.model()), p.model()
    handles, hooks = list(CTX.hook_handles), [len(m._backward_hooks) for m in model.modules()]
    model(x)  # leaves its inputs behind
    for method in ("diag", "full", "kron"):
        found = getattr(BackPackGGN(model, "classification"), method)(x, y, N=4)[1].to_dense()
        assert torch.equal(found, getattr(BackPackGGN(plain, "classification"), method)(x, y, N=4)[1].to_dense())
    BackPackGGN(model, "classification").jacobians(x)
    assert CTX.hook_handles == handles
    assert [len(m._backward_hooks) for m in model.modules()] == hooks
    assert CTX.get_active_exts() == ()
    backpack.context.CTX.remove_hooks()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_leave_nothing_behind(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    from backpack.context import CTX

    p = problems.problem("mlp")
    x, y = p.data()
    model = p.model()
    backend = BackPackGGN(model, "classification")
    D = backend.diag(x, y)[1]

    def interrupted(*_: Any) -> Any:
        raise error("now")

    with monkeypatch.context() as patch, untouched(model):
        patch.setattr(adapter, "_taken", interrupted)
        for answer in (lambda: D.diagonal(), lambda: backend.jacobians(x)):
            with pytest.raises(error):
                answer()
        assert CTX.get_active_exts() == ()
        assert CTX.hook_handles == []
    assert torch.equal(D.diagonal(), BackPackGGN(model, "classification").diag(x, y)[1].diagonal())


def test_inference_mode_and_no_grad() -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    wanted = BackPackGGN(p.model(), "classification")
    for mode in (torch.no_grad, torch.inference_mode):
        backend = BackPackGGN(p.model(), "classification")
        with mode():
            J, G = backend.jacobians(x)[0], backend.gradients(x, y)[0]
            D, K = backend.diag(x, y)[1].diagonal(), backend.kron(x, y, N=4)[1].to_dense()
            H = backend.full(x, y)[1].to_dense()
        assert torch.equal(J, wanted.jacobians(x)[0])
        assert torch.equal(G, wanted.gradients(x, y)[0])
        assert torch.equal(D, wanted.diag(x, y)[1].diagonal())
        assert torch.equal(K, wanted.kron(x, y, N=4)[1].to_dense())
        assert torch.allclose(H, wanted.full(x, y)[1].to_dense(), atol=1e-14)


# ---------------------------------------------------------------- arguments


def test_documented_signatures() -> None:
    model = problems.problem("mlp").model()
    backend = BackPackGGN(model, "classification", False, None, "input_ids", "labels", True)
    assert backend.stochastic
    assert BackPackEF(model, "regression", False, None, "input_ids", "labels").factor == 0.5
    base = BackPackInterface(model, "classification", generator=seeded(0))
    x, y = problems.problem("mlp").data()
    assert base.jacobians(x)[0].shape == (4, 3, 35)
    with pytest.raises(UnsupportedError, match="GGNInterface"):
        base.full(x, y)
    with pytest.raises(DataError, match="FeatureExtractor"):
        BackPackGGN(model, "classification", last_layer=True)


def test_gradients_may_flow_natively() -> None:
    p = problems.problem("mlp")
    x, _ = p.data()
    model: Any = p.model()
    J, f = BackPackGGN(model, "classification").jacobians(x, enable_backprop=True)
    (g,) = torch.autograd.grad(J.square().sum() + f.sum(), model[0].weight)
    assert g.abs().sum() > 0


def test_empirical_factors_are_native() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    theirs = BackPackEF(p.model(), "regression").kron(x, y, N=9)[1].to_dense()
    assert torch.equal(theirs, EFInterface(p.model(), "regression").kron(x, y, N=9)[1].to_dense())


@pytest.mark.parametrize("version", ["1.5.2", "2.0.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problems.problem("mlp")
    x, y = p.data()
    monkeypatch.setattr(adapter, "named_version", lambda *_: f"backpack {version}")
    backend = BackPackGGN(p.model(), "classification")
    for answer in (lambda: backend.diag(x, y), lambda: backend.kron(x, y, N=4), lambda: backend.jacobians(x)):
        with pytest.raises(UnsupportedError, match=rf"backpack {version} is installed.*>=1.7,<2"):
            answer()


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


def test_models_that_do_not_copy() -> None:
    x, y = problems.problem("mlp").data()
    with pytest.raises(UnsupportedError, match="does not copy"):
        BackPackGGN(Uncopyable(4, 3).double(), "classification").full(x, y)[1].to_dense()


def test_custom_likelihoods() -> None:
    p = problems.problem("mlp-regression")
    x, y = p.data()
    cosh = co.likelihoods.Likelihood.from_loss(lambda f, t: torch.log(torch.cosh(f - t)).sum(), is_convex=True)
    nll = lambda f, t: torch.log(torch.cosh(f - t)).sum()  # noqa: E731
    wanted = reference.ggn(p.model(), nll, x, y)
    assert reference.relative_error(BackPackGGN(p.model(), cosh).full(x, y)[1].to_dense(), wanted) < 1e-9
    D = BackPackGGN(p.model(), cosh).diag(x, y)[1].diagonal()
    assert reference.relative_error(D, wanted.diagonal()) < 1e-9
