"""The network of the digits figures: 64-16-10 tanh, P = 1,210, N = 1,257, trained with δ = 1; made once per run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

import curvops as co
from curvops.report import digits as subject


class Digits(NamedTuple):
    """A trained network, its training and test data, and the parameters as a vector."""

    model: nn.Module
    data: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: Tensor

    def ggn(self) -> co.GGN:
        """A new operator, nothing kept."""
        return co.GGN(self.model, "classification", self.data)

    def loss(self) -> Tensor:
        """Σ −log p(y | f)."""
        x, y = self.data
        with torch.no_grad():
            return nn.functional.cross_entropy(self.model(x), y, reduction="sum")


@functools.cache
def digits(seed: int = 0) -> Digits:
    """The network of that seed (split and initial weights)."""
    training, test = subject.digits(seed)
    model = subject.network(seed)
    subject.train(model, "classification", training, delta=1.0)
    return Digits(model, training, test, co.flatten({n: p.detach() for n, p in model.named_parameters()}))


@functools.cache
def dense_ggn(seed: int = 0) -> Tensor:
    """The GGN as a matrix, from the Jacobian's rows by autograd and Λ written out."""
    model, (x, _), _, _ = digits(seed)
    parameters = list(model.parameters())
    f = model(x)
    G = torch.zeros(1210, 1210, dtype=torch.float64)
    p = f.detach().softmax(1)
    J = torch.stack(
        [torch.cat([g.reshape(len(x), -1) for g in _rows(model, x, parameters, c)], 1) for c in range(f.shape[1])], 1
    )
    for Jn, pn in zip(J.split(100), p.split(100), strict=True):
        L = torch.diag_embed(pn) - pn[:, :, None] * pn[:, None, :]
        G += torch.einsum("bcp,bcd,bdq->pq", Jn, L, Jn)
    return (G + G.T) / 2


def _rows(model: nn.Module, x: Tensor, parameters: list[nn.Parameter], c: int) -> list[Tensor]:
    """Gradients of output c of every datum, by the network written out: two layers and a tanh."""
    W1, b1, W2, _ = (p.detach() for p in parameters)
    h = torch.tanh(x @ W1.T + b1)
    back = W2[c] * (1 - h**2)
    unit = torch.zeros(len(x), W2.shape[0], dtype=torch.float64)
    unit[:, c] = 1
    return [back[:, :, None] * x[:, None, :], back, unit[:, :, None] * h[:, None, :], unit]
