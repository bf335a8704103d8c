"""The small modules of which the networks of `problems` are built; nothing here is clever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """One module used at two places."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Joined(nn.Module):
    """Two linear layers side by side under one shift."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 2, bias=False), nn.Linear(width, 3, bias=False)
        self.shift = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.left(x), self.right(x)], -1) + self.shift))


class Tied(nn.Module):
    """A language model whose decoder shares the embedding's weight; outputs `(B, T, vocabulary)`."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.mix(self.embedding(x))))


class Raw(nn.Module):
    """Parameters without layers: a product of matrices, a scale, and one that the output does not use."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(inputs, hidden))
        self.scale = nn.Parameter(torch.zeros(()))
        self.second = nn.Parameter(torch.zeros(hidden, outputs))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.first) @ self.second * torch.exp(self.scale)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence on itself, averaged over positions."""

    def __init__(self, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class CausalAttention(nn.Module):
    """`scaled_dot_product_attention` with a causal mask; outputs `(B, T, C)`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Kernel(nn.Module):
    """A linear layer whose weight is the kernel of a convolution, too; inputs `(B, C, T)`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x, self.shared.weight.unsqueeze(-1), self.shared.bias)
        return self.head(torch.tanh(self.shared(torch.tanh(h.sum(-1)))))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, read out linearly."""

    def __init__(self, layer: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Cell(nn.Module):
    """A recurrent cell stepped by hand over `(B, T, C)`; the last state, read out linearly."""

    def __init__(self, cell: nn.RNNCellBase, outputs: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` from one half of the inputs to the other, of another width."""

    def __init__(self, width: int, other: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.attention = nn.MultiheadAttention(width, 1, kdim=other, vdim=other, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k = x[..., : self.width], x[..., self.width :]
        return self.head(self.attention(q, k, k, need_weights=False)[0].mean(1))


class Bag(nn.Module):
    """EmbeddingBag and a read-out."""

    def __init__(self, vocabulary: int, width: int, outputs: int, mode: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocabulary, width, mode=mode, padding_idx=padding_idx)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


class PlainBag(nn.Module):
    """The same network as `Bag`, from a lookup and a mean or sum: its derivatives of every order exist."""

    def __init__(self, vocabulary: int, width: int, outputs: int, mode: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.bag = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, outputs)
        self.mode, self.padding_idx = mode, padding_idx

    def forward(self, x: Tensor) -> Tensor:
        counted = torch.ones_like(x) if self.padding_idx is None else (x != self.padding_idx).long()
        rows = (self.bag(x) * counted.unsqueeze(-1)).sum(1)
        if self.mode == "mean":
            rows = rows / counted.sum(1, keepdim=True)
        return self.head(torch.tanh(rows))


class Keywords(nn.Module):
    """A forward in the manner of Hugging Face: keywords in, an object with `.logits` out."""

    def __init__(self, vocabulary: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.classifier = nn.Linear(width, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(-1)
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.classifier(torch.tanh(pooled)))


class LanguageModel(nn.Module):
    """A causal language model in the manner of GPT-2: padding, tied decoder, a layer whose weight is `(in, out)`."""

    def __init__(self, vocabulary: int, width: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.zeros(width, 3 * width))
        self.bias = nn.Parameter(torch.zeros(3 * width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        length = input_ids.shape[1]
        h = self.tokens(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        mixed = torch.addmm(self.bias, self.norm(h).flatten(0, 1), self.weight)
        q, k, v = mixed.reshape(-1, length, mixed.shape[-1]).chunk(3, -1)
        allowed = torch.ones(length, length, dtype=torch.bool, device=h.device).tril() & (attention_mask[:, None] > 0)
        return SimpleNamespace(logits=self.head(h + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)))


class Adapter(nn.Module):
    """A layer with a low-rank correction, as in LoRA."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.zeros(layer.in_features, rank))
        self.B = nn.Parameter(torch.zeros(rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.A @ self.B


class Dictionary(nn.Module):
    """A forward that takes the whole mapping."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Linear(inputs, outputs)
        self.right = nn.Linear(inputs, outputs, bias=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(self.left(batch["a"])) * self.right(batch["b"])


class WithLastLayer(nn.Module):
    """A body and a `last_layer`."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(inputs, hidden)
        self.last_layer = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(torch.tanh(self.body(x)))
