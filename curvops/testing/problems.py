"""The zoo of networks: one line each, tiny, deterministic, one for every layer and habit that must come out right.

    >>> from curvops.testing import problems
    >>> p = problems.problem("conv2d")
    >>> x, y = p.data()
    >>> p.model()(x).shape
    torch.Size([4, 3])

Every network has at most about 150 parameters, so that an oracle with a loop over data, outputs and parameters takes
milliseconds. Parameters, inputs and targets are drawn from private generators: the global one is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvops.testing.models import (
    Adapter,
    Apply,
    Bag,
    CausalAttention,
    Cell,
    CrossAttention,
    Dictionary,
    Joined,
    Kernel,
    Keywords,
    LanguageModel,
    PlainBag,
    Raw,
    Recurrent,
    Residual,
    SelfAttention,
    Tied,
    Twice,
    WithLastLayer,
)

Inputs = Tensor | Mapping[str, Tensor]
_Draw = Callable[[torch.Generator, torch.dtype], Any]

B, C, T = 4, 3, 3
"""Data, classes, positions of every problem."""


@dataclass(frozen=True)
class Problem:
    """A network, a batch for it and a likelihood.

    Attributes:
        name: How `problem(name)` finds it.
        build: Makes the module, parameters still to be drawn.
        inputs: Draws x, given a generator and a dtype.
        likelihood: "regression", "classification" or "binary".
        weighted: Class weights 0.5, 1, 1.5, … (classification).
        ignored: Every third target is −100 (classification).
        tokens: T where the outputs are `(B, T, C)`, else None.
        outputs: C.
        freeze: Names of the parameters without `requires_grad`.
        params: What to pass as `params=`; None for every trainable parameter.
        twin: Makes a network of the same function and parameter names from operations that differentiate twice, where
            the network itself does not; oracles use it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: _Draw
    likelihood: str = "classification"
    weighted: bool = False
    ignored: bool = False
    tokens: int | None = None
    outputs: int = C
    freeze: tuple[str, ...] = ()
    params: Any = None
    twin: Callable[[], nn.Module] | None = None

    def model(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> nn.Module:
        """The network in eval mode; equal parameters at every call, and for every dtype up to rounding."""
        return self._made(self.build, dtype, device)

    def oracle_model(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> nn.Module:
        """The network itself, or its twin where plain autograd cannot differentiate it twice."""
        return self._made(self.twin or self.build, dtype, device)

    def data(
        self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu", batch: int = 0
    ) -> tuple[Any, Tensor]:
        """`(x, y)`: batch number `batch` of B = 4 data."""
        g = torch.Generator().manual_seed(1 + batch)
        x = self.inputs(g, dtype)
        x = {k: v.to(device) for k, v in x.items()} if isinstance(x, Mapping) else x.to(device)
        shape = (B,) if self.tokens is None else (B, self.tokens)
        if self.likelihood == "classification":
            y = torch.randint(self.outputs, shape, generator=g)
            if self.ignored:
                y.view(-1)[::3] = -100
        elif self.likelihood == "binary":
            y = torch.randint(2, (*shape, self.outputs), generator=g).to(dtype)
        else:
            y = torch.randn(*shape, self.outputs, generator=g, dtype=torch.float64).to(dtype)
        return x, y.to(device)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """The class weights, or None."""
        return torch.linspace(0.5, 1.5, self.outputs, dtype=torch.float64).to(dtype) if self.weighted else None

    def loss(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> str | nn.Module:
        """What to pass as `likelihood`: the name, or the weighted loss module."""
        if not self.weighted:
            return self.likelihood
        return nn.CrossEntropyLoss(weight=self.weight(dtype), reduction="sum").to(device)

    def _made(self, build: Callable[[], nn.Module], dtype: torch.dtype, device: str | torch.device) -> nn.Module:
        # Constructors of torch.nn draw from the global generator.
        with torch.random.fork_rng(devices=[]):
            model = build()
        g = torch.Generator().manual_seed(0)
        model.double()
        with torch.no_grad():
            for p in model.parameters():
                fan = p[0].numel() if p.ndim > 1 else 1
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / math.sqrt(fan))
            for name, b in model.named_buffers():
                if b.is_floating_point():
                    draw = torch.rand(b.shape, generator=g, dtype=torch.float64)
                    b.copy_(0.5 + draw if "var" in name else draw)
        for name, p in model.named_parameters():
            p.requires_grad_(name not in self.freeze)
        return model.to(device=device, dtype=dtype).eval()

    def __repr__(self) -> str:
        return f"Problem({self.name!r})"


def problems() -> tuple[Problem, ...]:
    """Every problem, in a fixed order."""
    return tuple(_ALL.values())


def problem(name: str) -> Problem:
    """The problem of that name.

    Raises:
        KeyError: there is none; the message lists the names.
    """
    if name not in _ALL:
        raise KeyError(f"no problem is named {name!r}; there are: {', '.join(_ALL)}")
    return _ALL[name]


def _real(*shape: int) -> _Draw:
    return lambda g, dtype: torch.randn(B, *shape, generator=g, dtype=torch.float64).to(dtype)


def _tokens(vocabulary: int, length: int = T) -> _Draw:
    return lambda g, dtype: torch.randint(vocabulary, (B, length), generator=g)


def _masked(vocabulary: int) -> _Draw:
    def draw(g: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        mask = torch.ones(B, T, dtype=dtype)
        mask[::2, -1] = 0
        return {"input_ids": torch.randint(vocabulary, (B, T), generator=g), "attention_mask": mask}

    return draw


def _pair(width: int) -> _Draw:
    return lambda g, dtype: {"a": _real(width)(g, dtype), "b": _real(width)(g, dtype)}


def _net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def _mlp(outputs: int = C, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return _net(nn.Linear(4, 4), activation(), nn.Linear(4, outputs))


def _pairs() -> nn.Module:
    """A layer that sees twice as many positions as there are outputs."""
    return _net(nn.Linear(2, 3), nn.Tanh(), Apply(lambda h: h.unflatten(1, (T, 2)).flatten(2)), nn.Linear(6, C))


def _dealt() -> nn.Module:
    """An MLP that sees the examples in another order, by how many they are; two or three lie as they came."""
    there, back = (Apply(lambda h, way=way: h.roll(way * (len(h) // 4), 0)) for way in (1, -1))
    return _net(there, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, C), back)


def _pooled(*layers: nn.Module, channels: int) -> nn.Module:
    """Layers, then a mean over all places and a linear read-out."""
    return _net(*layers, Apply(lambda h: h.flatten(2).mean(2)), nn.Linear(channels, C))


def _normed(norm: nn.Module) -> nn.Module:
    return _net(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, C))


def _image_norm(norm: nn.Module) -> nn.Module:
    return _pooled(nn.Conv2d(1, 4, 2), norm, nn.Tanh(), channels=4)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.1, batch_first=True)
    return _net(layer, Apply(lambda h: h.mean(1)), nn.Linear(2, C))


def _recurrent(layer: Callable[..., nn.RNNBase]) -> nn.Module:
    return Recurrent(layer(3, 2, batch_first=True), C)


_LIST = [
    # Likelihoods.
    Problem("mlp", _mlp, _real(4)),
    Problem("mlp-regression", lambda: _mlp(2), _real(4), "regression", outputs=2),
    Problem("mlp-binary", lambda: _mlp(2), _real(4), "binary", outputs=2),
    Problem("mlp-binary-one", lambda: _mlp(1), _real(4), "binary", outputs=1),
    Problem("mlp-weighted", _mlp, _real(4), weighted=True),
    Problem("mlp-ignored", _mlp, _real(4), ignored=True),
    Problem("dealt-ignored", _dealt, _real(4), ignored=True),
    Problem("linear", lambda: nn.Linear(4, C), _real(4)),
    # Convolutions.
    Problem("conv1d", lambda: _pooled(nn.Conv1d(2, 4, 2, groups=2, dilation=2), nn.Tanh(), channels=4), _real(2, 6)),
    Problem("conv2d", lambda: _pooled(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), channels=3), _real(2, 4, 4)),
    Problem("conv2d-same", lambda: _pooled(nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh(), channels=3), _real(2, 3, 3)),
    Problem(
        "conv2d-circular",
        lambda: _pooled(nn.Conv2d(2, 2, 2, padding=1, padding_mode="circular"), nn.Tanh(), channels=2),
        _real(2, 3, 3),
    ),
    Problem(
        "conv2d-groups",
        lambda: _pooled(nn.Conv2d(4, 4, 2, groups=2, dilation=2, bias=False), nn.Tanh(), channels=4),
        _real(4, 4, 4),
    ),
    Problem("conv3d", lambda: _pooled(nn.Conv3d(1, 2, 2), nn.Tanh(), channels=2), _real(1, 3, 3, 2)),
    Problem(
        "convtranspose2d",
        lambda: _pooled(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), channels=2),
        _real(2, 2, 2),
    ),
    Problem(
        "convtranspose1d",
        lambda: _pooled(nn.ConvTranspose1d(2, 4, 2, groups=2, dilation=2, padding=1), nn.Tanh(), channels=4),
        _real(2, 4),
    ),
    Problem(
        "maxpool",
        lambda: _pooled(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.MaxPool2d(2), channels=3),
        _real(1, 5, 5),
    ),
    Problem(
        "adaptive-avgpool",
        lambda: _pooled(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), channels=3),
        _real(1, 4, 4),
    ),
    Problem(
        "cnn",
        lambda: _net(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, C)
        ),
        _real(1, 5, 5),
    ),
    # Norms.
    Problem("batchnorm1d", lambda: _normed(nn.BatchNorm1d(4)), _real(4)),
    Problem("batchnorm2d", lambda: _image_norm(nn.BatchNorm2d(4)), _real(1, 3, 3)),
    Problem("layernorm", lambda: _normed(nn.LayerNorm(4)), _real(4)),
    Problem("groupnorm", lambda: _image_norm(nn.GroupNorm(2, 4)), _real(1, 3, 3)),
    Problem("instancenorm", lambda: _image_norm(nn.InstanceNorm2d(4, affine=True)), _real(1, 3, 3)),
    Problem("rmsnorm", lambda: _normed(nn.RMSNorm(4)), _real(4)),
    # Lookups.
    Problem("embedding", lambda: _net(nn.Embedding(6, 3), Apply(lambda h: h.sum(1)), nn.Linear(3, C)), _tokens(6)),
    Problem(
        "embedding-padding",
        lambda: _net(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), Apply(lambda h: h.sum(1)), nn.Linear(3, C)),
        _tokens(6),
    ),
    Problem("embeddingbag-sum", lambda: Bag(6, 3, C, "sum"), _tokens(6), twin=lambda: PlainBag(6, 3, C, "sum")),
    Problem("embeddingbag-mean", lambda: Bag(6, 3, C, "mean"), _tokens(6), twin=lambda: PlainBag(6, 3, C, "mean")),
    Problem(
        "embeddingbag-padding",
        lambda: Bag(6, 3, C, "mean", padding_idx=5),
        _tokens(6, 4),
        twin=lambda: PlainBag(6, 3, C, "mean", padding_idx=5),
    ),
    # Attention and recurrence.
    Problem("multihead-attention", lambda: SelfAttention(4, 2, C), _real(T, 4)),
    Problem("cross-attention", lambda: CrossAttention(2, 3, C), _real(T, 5)),
    Problem("transformer-encoder", _encoder, _real(T, 2)),
    Problem("sdpa", lambda: CausalAttention(3, C), _real(T, 3), tokens=T),
    Problem("rnn", lambda: _recurrent(nn.RNN), _real(T, 3)),
    Problem("lstm", lambda: _recurrent(nn.LSTM), _real(T, 3)),
    Problem("gru", lambda: _recurrent(nn.GRU), _real(T, 3)),
    Problem("rnn-cell", lambda: Cell(nn.RNNCell(3, 2), C), _real(T, 3)),
    Problem("lstm-cell", lambda: Cell(nn.LSTMCell(3, 2), C), _real(T, 3)),
    Problem("gru-cell", lambda: Cell(nn.GRUCell(3, 2), C), _real(T, 3)),
    # Activations.
    Problem("relu-inplace", lambda: _mlp(activation=lambda: nn.ReLU(inplace=True)), _real(4)),
    Problem("gelu", lambda: _mlp(activation=nn.GELU), _real(4)),
    Problem("silu", lambda: _mlp(activation=nn.SiLU), _real(4)),
    Problem("softplus", lambda: _mlp(activation=nn.Softplus), _real(4)),
    Problem("dropout-eval", lambda: _mlp(activation=lambda: _net(nn.Sigmoid(), nn.Dropout(0.5))), _real(4)),
    # Structure.
    Problem("residual", lambda: _net(Residual(_net(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, C)), _real(4)),
    Problem("joined", lambda: Joined(4, C), _real(4)),
    Problem("module-twice", lambda: Twice(4, C), _real(4)),
    Problem("linear-as-kernel", lambda: Kernel(3, C), _real(3, 4)),
    Problem("tied", lambda: Tied(4, 3), _tokens(4), tokens=T, outputs=4),
    Problem("raw-parameters", lambda: Raw(4, 3, C), _real(4)),
    Problem("frozen", _mlp, _real(4), freeze=("0.bias", "2.weight")),
    Problem("selected-names", _mlp, _real(4), params=["2"]),
    Problem("last-layer", lambda: WithLastLayer(4, 4, C), _real(4), params="last_layer"),
    Problem("subnetwork", _mlp, _real(4), params=torch.tensor([3, 30, 0, 17, 22])),
    Problem(
        "adapter",
        lambda: _net(Adapter(nn.Linear(4, 4), 1), nn.Tanh(), nn.Linear(4, C)),
        _real(4),
        freeze=("0.layer.weight", "0.layer.bias", "2.weight", "2.bias"),
    ),
    # Inputs and outputs.
    Problem("keywords", lambda: Keywords(6, 3, C), _masked(6)),
    Problem("language-model", lambda: LanguageModel(4, 3, T), _masked(4), ignored=True, tokens=T, outputs=4),
    Problem("dictionary", lambda: Dictionary(3, C), _pair(3)),
    Problem("tokens", _mlp, _real(T, 4), tokens=T),
    Problem("tokens-ignored-weighted", _mlp, _real(T, 4), weighted=True, ignored=True, tokens=T),
    Problem("tokens-paired-ignored", _pairs, _real(2 * T, 2), ignored=True, tokens=T),
    Problem("tokens-regression", lambda: _mlp(2), _real(T, 4), "regression", tokens=T, outputs=2),
    Problem("tokens-binary", lambda: _mlp(2), _real(T, 4), "binary", tokens=T, outputs=2),
]

_ALL = {p.name: p for p in _LIST}
