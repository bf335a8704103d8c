"""Hugging Face models from configs, in float64, against loops and double backward; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import reference
import torch
from curvature_subjects import randn
from reference import relative_error
from torch import Tensor, nn
from untouched import untouched

import curvops as co
from curvops.errors import DataError, NumericalWarning, ShapeError
from curvops.interop.huggingface import next_token_labels
from curvops.nets.likelihoods import resolve

pytestmark = pytest.mark.peers

VOCABULARY, LENGTH, CLASSES = 5, 3, 3
IDS = torch.tensor([[1, 2, 3], [4, 0, 0], [2, 2, 1]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])


@contextmanager
def _seeded() -> Iterator[None]:
    """Constructors draw from the global generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _jittered(model: nn.Module) -> nn.Module:
    """Parameters of size one, so that nothing of the architecture is near linear; eval mode, float64."""
    g = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def gpt2(attention: str = "sdpa") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=4, n_layer=1, n_head=2, n_inner=4, bos_token_id=0,
        eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    with _seeded():
        return _jittered(GPT2LMHeadModel(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=LENGTH, num_labels=CLASSES,
    )  # fmt: skip
    with _seeded():
        return _jittered(BertForSequenceClassification(config))


def encoding(**values: Tensor) -> Mapping[str, Tensor]:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": IDS, "attention_mask": MASK, **values})


class Lora(nn.Module):
    """A frozen layer plus a low-rank correction, as the adapters of LoRA are."""

    def __init__(self, layer: nn.Module, width: int, outputs: int, rank: int = 1) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_A = nn.Parameter(randn(width, rank))
        self.lora_B = nn.Parameter(randn(rank, outputs, seed=8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.lora_A @ self.lora_B


def adapted() -> nn.Module:
    model: Any = gpt2()
    attention = model.transformer.h[0].attn
    attention.c_attn = Lora(attention.c_attn, 4, 12)
    return model


ADAPTER = ["transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"]

SUBJECTS = {
    "GPT-2, tokens, padding ignored": (gpt2, None),
    "GPT-2, its tied embedding": (gpt2, ["transformer.wte"]),
    "GPT-2, eager attention": (lambda: gpt2("eager"), ["transformer.h.0.attn"]),
    "GPT-2 with LoRA, the adapter by name": (adapted, ADAPTER),
    "GPT-2 with LoRA, what is not frozen of a block": (adapted, ["transformer.h.0"]),
    "BERT, sequences, one ignored": (bert, None),
    "BERT, the classifier by name": (bert, ["classifier"]),
}

SUBJECT = pytest.mark.parametrize("name", SUBJECTS)


@cache
def subject(name: str) -> tuple[nn.Module, Mapping[str, Tensor], Any]:
    """Model, batch with labels, and the parameters selected."""
    build, params = SUBJECTS[name]
    batch = next_token_labels(encoding()) if "GPT" in name else encoding(labels=torch.tensor([2, -100, 0]))
    return build(), batch, params


def parts(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]


@cache
def exact(kind: str, name: str) -> Tensor:
    """The dense matrix by loops and double backward."""
    model, batch, params = subject(name)
    x, y = parts(batch)
    loss = reference.nll("classification")
    if kind == "GGN":
        return reference.ggn(model, loss, x, y, params)
    if kind == "EF":
        return reference.empirical_fisher(model, loss, x, y, params)
    if kind == "Hessian":
        return reference.hessian(model, loss, x, y, params)
    f = reference.outputs(model, x).detach()
    seed = co.MCFisher(model, "classification", batch, params=params).seed
    draws = [resolve("classification").pseudo_gradients_at(f, y, seed=seed, position=0, sample=s) for s in range(2)]
    return reference.mc_fisher(model, x, draws, params)


@SUBJECT
def test_matrix_free_curvatures(name: str) -> None:
    model, batch, params = subject(name)
    operators = {
        "GGN": co.GGN(model, "classification", batch, params=params),
        "EF": co.EmpiricalFisher(model, "classification", [batch], params=params),
        "Hessian": co.Hessian(model, "classification", batch, params=params),
        "MC": co.MCFisher(model, "classification", batch, params=params, num_samples=2),
    }
    with untouched(model):
        for kind, A in operators.items():
            assert relative_error(A.to_dense(), exact(kind, name)) <= 1e-10, kind
            v = randn(A.shape[0])
            assert relative_error(A @ v, exact(kind, name) @ v) <= 1e-10, kind


@SUBJECT
def test_diagonals_and_per_example_gradients(name: str) -> None:
    model, batch, params = subject(name)
    x, y = parts(batch)
    with untouched(model):
        for build, kind in ((co.DiagonalGGN, "GGN"), (co.DiagonalEF, "EF")):
            D = build(model, "classification", batch, params=params)
            assert relative_error(D.diagonal(), exact(kind, name).diagonal()) <= 1e-10
        if params is None:
            Gs, _ = co.GGNInterface(model, "classification").gradients(x, y)
            assert relative_error(Gs, reference.gradients(model, reference.nll("classification"), x, y)) <= 1e-10
            Js, _ = co.GGNInterface(model, "classification").jacobians(x)
            assert relative_error(Js, reference.jacobian(model, x)) <= 1e-10


@pytest.mark.parametrize("name", ["GPT-2, tokens, padding ignored", "BERT, sequences, one ignored"])
def test_solves_logdets_and_spectra(name: str) -> None:
    model, batch, _ = subject(name)
    G, M = co.GGN(model, "classification", batch), exact("GGN", name)
    damped = M + torch.eye(len(M), dtype=torch.float64)
    with untouched(model):
        A = G.add_diagonal(1.0)
        b = randn(len(M))
        x = A.solve(b, co.CG(rtol=1e-10))
        assert relative_error(damped @ x, b) <= 1e-9
        assert float(A.logdet()) == pytest.approx(float(torch.logdet(damped)), rel=1e-10)
        report = G.spectrum(probes=10, steps=60).logdet(1.0)
        assert abs(report.value - float(torch.logdet(damped))) <= 2 * report.half_width
        H = co.Hessian(model, "classification", batch).eigsh(3, which="BE")
        values = torch.linalg.eigvalsh(exact("Hessian", name))
        assert torch.allclose(H.values, values[[0, -2, -1]], rtol=1e-8)


@pytest.mark.parametrize("name", ["GPT-2, tokens, padding ignored", "BERT, sequences, one ignored"])
def test_kfac_blocks_are_exact_where_theory_says_so(name: str) -> None:
    """With one datum of one position, B ⊗ A is the GGN's block; LayerNorms, by fallback, are its diagonal always."""
    model, _, _ = subject(name)
    short = {"input_ids": IDS[:1, :1], "attention_mask": MASK[:1, :1]}
    y = torch.tensor([[2]]) if "GPT" in name else torch.tensor([2])
    M = reference.ggn(model, reference.nll("classification"), short, y)
    with untouched(model):
        K = co.KFAC(model, "classification", (short, y))
        dense = K.to_dense()
    seen = set()
    for parameter, where in K.layout.items():
        block, ours = M[where, where], dense[where, where]
        if "wte" in parameter:
            continue  # tied: its two uses count as positions, which KFAC takes to be independent
        is_norm = "ln_" in parameter or "LayerNorm" in parameter
        expected = torch.diag(block.diagonal()) if is_norm else block
        assert relative_error(ours, expected) <= 1e-10, parameter
        seen.add(is_norm)
    assert seen == {True, False}


def test_kfac_of_a_batch_and_its_fallbacks() -> None:
    name = "GPT-2, tokens, padding ignored"
    model, batch, _ = subject(name)
    M = exact("GGN", name)
    K = co.KFAC(model, "classification", batch)
    assert "Kronecker(4×12)" in repr(K)  # a Conv1D of Transformers: its weight is (in, out)
    assert K.is_psd
    assert float(K.add_diagonal(1.0).logdet()) > 0
    full = co.KFAC(model, "classification", batch, fallback="full").to_dense()
    for parameter, where in K.layout.items():
        if "ln_" in parameter:
            assert relative_error(full[where, where], M[where, where]) <= 1e-10


def test_the_last_layer_behind_an_extractor() -> None:
    name = "BERT, the classifier by name"
    model, batch, _ = subject(name)
    x, y = parts(batch)
    extractor = co.FeatureExtractor(model)
    loss, H = co.GGNInterface(extractor, "classification", last_layer=True).full(x, y)
    assert relative_error(H.to_dense(), exact("GGN", name)) <= 1e-10
    f = reference.outputs(model, x).detach()
    assert float(loss) == pytest.approx(float(reference.nll("classification")(f, y)), rel=1e-12)
    assert extractor.forward_with_features(encoding())[1].shape == (3, 4)


def test_a_loader_of_encodings_and_regression_heads() -> None:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    with _seeded():
        model = _jittered(BertForTokenClassification(config))
    y = torch.tensor([[0, 1, 1], [1, 0, -100], [0, 0, 1]])
    rows = [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(IDS, MASK, y, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    G = co.GGN(model, "classification", loader, params=["classifier"])
    x = {"input_ids": IDS, "attention_mask": MASK}
    expected = reference.ggn(model, reference.nll("classification"), x, y, ["classifier"])
    assert relative_error(G.to_dense(), expected) <= 1e-10
    targets = randn(3, LENGTH, 2)
    R = co.GGN(model, "regression", (x, targets), params=["classifier"])
    expected = reference.ggn(model, reference.nll("regression"), x, targets, ["classifier"])
    assert relative_error(R.to_dense(), expected) <= 1e-10


def test_labels_agree_with_the_loss_of_transformers() -> None:
    model = gpt2()
    ids = IDS.masked_fill(MASK == 0, -100)
    theirs = model(input_ids=IDS, attention_mask=MASK, labels=ids).loss
    batch = next_token_labels(encoding())
    x, y = parts(batch)
    loss, _ = co.GGNInterface(model, "classification").full(x, y)
    assert float(loss) / int((y != -100).sum()) == pytest.approx(float(theirs.detach()), rel=1e-6)  # theirs in float32
    assert type(batch) is type(encoding())
    with pytest.warns(NumericalWarning, match=r"labels equal the tokens.*next_token_labels"):
        co.GGNInterface(model, "classification").full(x, IDS)


def test_what_transformers_can_hand_over_and_is_refused() -> None:
    model, x = bert(), encoding()
    y = torch.tensor([0, 1, 2])
    with pytest.raises(DataError, match=r"no targets at the key 'labels'.*\['attention_mask', 'input_ids'\]"):
        co.GGN(model, "classification", x)
    with pytest.raises(DataError, match=r"\['text'\] is text.*Tokenise it"):
        co.GGN(model, "classification", ({"input_ids": IDS, "text": ["a", "b", "c"]}, y))
    with pytest.raises(DataError, match=r"train mode and drops at random; call model.eval\(\)"):
        co.GGN(bert().train(), "classification", (x, y)) @ randn(parameters(model))
    with pytest.raises(ShapeError, match=r"returned BaseModelOutputWithPooling.*with .logits"):
        co.GGN(model.bert, "classification", (x, y)) @ randn(parameters(model.bert))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
