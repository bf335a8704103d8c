"""The networks and data of the benchmarks: small enough for a laptop, each with another bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network with one batch of classification data.

    Attributes:
        name: Short name, a column of the table.
        title: What it is.
        build: Makes `(model in eval mode, x, y)`, always the same ones.
        positions: Whether outputs are `(B, T, C)`.
    """

    name: str
    title: str
    build: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    positions: bool = False

    def on(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        """What `build` makes, on a device."""
        model, x, y = self.build()
        return model.to(device), x.to(device), y.to(device)


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only language model with learned positions."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(at))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def mlp(widths: tuple[int, ...], size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """ReLU network on Gaussian inputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return model.eval(), torch.randn(size, widths[0]), torch.randint(widths[-1], (size,))


def cnn(channels: tuple[int, int, int], hidden: int, size: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    """Three 3x3 convolutions with pooling, and a small head, on 3x32x32 images."""
    torch.manual_seed(0)
    a, b, c = channels
    model = nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * c, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip
    return model.eval(), torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


def gpt(depth: int, width: int = 128, vocabulary: int = 128) -> tuple[nn.Module, Tensor, Tensor]:
    """8 sequences of 64 tokens."""
    torch.manual_seed(0)
    model = GPT(vocabulary, 64, width, 4, depth)
    return model.eval(), torch.randint(vocabulary, (8, 64)), torch.randint(vocabulary, (8, 64))


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """MLP 64-16-10 on 1,257 of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    x = torch.from_numpy(data.data[:1257]).float() / 16
    return model.eval(), x, torch.from_numpy(data.target[:1257]).long()


def resnet(size: int = 32) -> tuple[nn.Module, Tensor, Tensor]:
    """Three residual stages with BatchNorm in eval mode, whose statistics are not the trivial ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    x, y = torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, y


CASES = {
    case.name: case
    for case in (
        Case("mlp", "MLP 784-256-128-10, batch 512", lambda: mlp((784, 256, 128, 10), 512)),
        Case("cnn70k", "CNN, about 70k parameters, batch 64", lambda: cnn((16, 32, 64), 44)),
        Case("cnn190k", "CNN, about 190k parameters, batch 64", lambda: cnn((32, 64, 96), 72)),
        Case("gpt", "GPT, about 0.85M parameters, 8 x 64 tokens", lambda: gpt(4), positions=True),
        Case("digits", "MLP 64-16-10, 1,257 digits", digits),
        Case("resnet", "ResNet with BatchNorm in eval mode, batch 32", resnet),
    )
}
