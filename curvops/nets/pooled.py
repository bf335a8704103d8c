"""Convolutions whose outputs go through max pooling alone: of each window one output alone has a gradient.

Which one depends on the input, and not on the cotangent. So there are fewer gradients to hold by far, the passes over
the whole outputs are saved where nothing else wants them, and products with the inputs need those of some positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.factors import Made, Outer, slices
from curvops.nets.layers import Node, Users, shape_at

GATHERED = 2**19
"""Entries of inputs that are gathered at once, and of their products."""

_GATHER, _PRODUCT = 12.0, 1.7
"""What gathering an input takes, and a multiplication with one, in multiplications of a product with all inputs: 9 to
13 and 1.3 to 1.9 from 144 inputs up. With windows of 4, six columns pay."""


@dataclass(frozen=True)
class Pool:
    """Where the outputs of a convolution go, and nowhere else.

    Attributes:
        edge: Where the pooled outputs have their gradient.
        index: `(N, O, S)`: which output was the largest of its window.
        rectified: What a ReLU made of it; None without one.
    """

    edge: GradientEdge
    index: Int64[Tensor, "N O S"]
    rectified: Float[Tensor, "N O S"] | None

    def gradients(self, g: Tensor) -> Float[Tensor, "K N O S"]:
        """What arrives at the convolution, given what does at the edge, `(K, N, O, *pooled)`."""
        g = g.flatten(3)
        return g if self.rectified is None else torch.ops.aten.threshold_backward(g, self.rectified.expand_as(g), 0)


def find_pool(users: Users, convolution: Node) -> Pool | None:
    """The pooling with windows apart that alone uses a convolution, or its ReLU; None where there is none."""
    if convolution.name() != "ConvolutionBackward0" or convolution._saved_transposed:
        return None
    node, relu = _only_user(users, convolution), None
    if node is not None and node.name() == "ReluBackward0":
        node, relu = _only_user(users, node), node
    if node is None or node.name() not in ("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"):
        return None
    window = node._saved_kernel_size
    apart = all(step >= n for step, n in zip(node._saved_stride or window, window, strict=True))
    if not apart or set(node._saved_dilation) != {1}:
        return None
    index = node._saved_result1.flatten(2)
    if index.shape[2] >= shape_at(GradientEdge(convolution, 0))[2:].numel():
        return None
    rectified = None if relu is None else relu._saved_result.detach().flatten(2).gather(2, index)
    return Pool(GradientEdge(node, 0), index, rectified)


def _only_user(users: Users, node: Node) -> Node | None:
    found = users.get(node, [])
    return found[0][0] if len(found) == 1 else None


@dataclass(frozen=True)
class Pooled:
    """An `Outer` of which `g` (K, B, G, O, S) is all that is not zero, at the positions `index` (B, G, O, S).

    Attributes:
        inputs: a (B, T, G, I), made at need.
        rows: The same as (B, T, G, kernel, I / kernel), in memory in that order.
    """

    inputs: Made
    rows: Made
    g: Float[Tensor, "K B G O S"]
    index: Int64[Tensor, "B G O S"]

    @property
    def positions(self) -> int:
        return self.inputs.shape[1]

    @property
    def share(self) -> float:
        """Of the outputs, how many have a gradient."""
        return self.index.shape[-1] / self.positions

    def examples(self, rows: slice) -> Outer:
        return self.spread().examples(rows)

    def multiplied_out(self) -> Float[Tensor, "K B p"]:
        return self.spread().multiplied_out()

    def spread(self) -> Outer:
        """With the zeros."""
        g = self.g.new_zeros(*self.g.shape[:-1], self.positions).scatter_(-1, self.index.expand_as(self.g), self.g)
        return Outer(self.inputs, g.permute(0, 1, 4, 2, 3))

    def squares(self, *others: Pooled) -> Float[Tensor, " p"]:
        """As `Outer.squares`, by the positions that count where that is faster."""
        columns = [g for part in (self, *others) for g in part.g]  # (B, G, O, S) each
        K = len(columns)
        if self.share * (_GATHER + _PRODUCT * K) > K:
            return self.spread().squares(*(part.spread() for part in others))
        B, T, G, kernel, channels = self.rows.shape
        O, S = self.index.shape[2:]
        table, I = self.rows.value().reshape(B * T * G, -1), kernel * channels
        device = self.index.device
        first = T * G * torch.arange(B, device=device)[:, None] + torch.arange(G, device=device)
        place = first[:, :, None, None] + G * self.index
        total = []
        for some in slices(O, (S + K) * I, GATHERED):
            sums = None  # of as many examples, apart, as are multiplied at once
            width = place[0, 0, some].shape[0]
            for rows in slices(B, G * width * (S + K) * I, GATHERED):
                a = table.index_select(0, place[rows, :, some].reshape(-1)).view(-1, S, I)
                g = torch.stack([g[rows, :, some] for g in columns], 3).flatten(0, 2)  # (B·G·O, K, S)
                products = torch.bmm(g, a)
                if sums is None:
                    sums = products.square_()
                else:
                    sums[: len(products)].addcmul_(products, products)
            assert sums is not None
            total.append(sums.unflatten(0, (-1, G, width)).sum((0, 3)))
        return torch.cat(total, 1).unflatten(2, (kernel, channels)).mT.reshape(-1)
