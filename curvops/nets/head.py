"""The last layer of a network, where it is linear: fewer columns say the same behind it than in front of it.

With f = φ W + b, one datum (and position) at a time, a curvature of the parameters behind the features φ `(d,)` sees of
a root S `(C, R)` of Λ only W S Sᵀ Wᵀ, which has a root of d columns. With a vocabulary of thousands and features of
hundreds that is most of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.layers import Node, Site, shape_at

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "AliasBackward0", "ReshapeAliasBackward0")

_SLOTS = {"AddmmBackward0": 1, "MmBackward0": 0}
"""Operation → at which of its inputs the features enter."""


class Head(NamedTuple):
    """A last layer through which all of the network is seen.

    Attributes:
        output: Where its result is, `(rows, C)`, rows those of f.
        features: Where φ enters, `(rows, d)`.
        weight: W `(d, C)`.
        parameters: Positions of those that are its own, and used nowhere else.
    """

    output: GradientEdge
    features: GradientEdge
    weight: Float[Tensor, "d C"]
    parameters: frozenset[int]

    def root(self, S: Float[Tensor, "*n C R"]) -> Float[Tensor, "*n d d"]:
        """A root of W S Sᵀ Wᵀ with no more than d columns, R of at least d. 2·n·R·d² operations, and those of W S."""
        # The triangle of a QR decomposition, example by example: as accurate as S, unlike a root of the product.
        triangles = [torch.linalg.qr((self.weight @ one).transpose(-1, -2), mode="r").R for one in S]
        return torch.stack(triangles).transpose(-1, -2)


def find_head(f: Tensor, sites: Sequence[Sequence[Site]]) -> Head | None:
    """The last layer of the graph behind f, given the sites of each parameter; None where it is of another kind."""
    node: Node = f.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _SLOTS:
        return None
    if node.name() == "AddmmBackward0" and not node._saved_alpha == node._saved_beta == 1:
        return None
    output, slot = GradientEdge(node, 0), _SLOTS[node.name()]
    inside, number = node.next_functions[slot]
    if inside is None or tuple(shape_at(output)) != (f.shape[:-1].numel(), f.shape[-1]):
        return None
    own = {i: [site.slot for site in mine if site.node is node] for i, mine in enumerate(sites)}
    own = {i: slots for i, slots in own.items() if slots}
    entered = sorted(s for slots in own.values() for s in slots)
    others = [s for s, (parent, _) in enumerate(node.next_functions) if parent is not None and s != slot]
    # Whatever else enters must be a parameter itself, and enter here alone.
    if entered != others or any(len(sites[i]) != len(slots) for i, slots in own.items()):
        return None
    return Head(output, GradientEdge(inside, number), node._saved_mat2.detach(), frozenset(own))
