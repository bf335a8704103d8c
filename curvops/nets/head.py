"""The last layer of a network, where it is linear: fewer columns say the same behind it than in front of it.

With f = φ W + b, one datum (and position) at a time, a curvature of the parameters behind the features φ `(d,)` sees of
a root S `(C, R)` of Λ only W S Sᵀ Wᵀ, which has a root of d columns. With a vocabulary of thousands and features of
hundreds that is most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        whole: Whether each of them enters as it is, or transposed: not a part of it, nothing rearranged or broadcast.
    """

    output: GradientEdge
    features: GradientEdge
    weight: Float[Tensor, "d C"]
    parameters: frozenset[int]
    whole: bool

    def root(self, through: Callable[[Tensor], Iterable[Float[Tensor, "n d R"]]]) -> Float[Tensor, "N d d"]:
        """Roots of W S Sᵀ Wᵀ with d columns, where R is at least d. N (R·d² + d³/3) multiplications for N of them.

        Args:
            through: W → W S, some data after the other.
        """
        # Columns one by one in memory, as LAPACK leaves them.
        return torch.cat([_narrowed(X).mT for X in through(self.weight)]).mT


def _narrowed(X: Float[Tensor, "n d R"]) -> Float[Tensor, "n d d"]:
    """A lower triangular root of X Xᵀ.

    Only root · rootᵀ enters a curvature, and there a Cholesky factor of the product errs no more than the triangle of a
    QR decomposition of X, which takes far longer. But a confident softmax makes products that are singular to rounding,
    and have no such factor. What is narrower than float64 is multiplied out in that, and each entry of the diagonal
    raised by what is still far below its own rounding; rows without a factor are decomposed the longer way.
    """
    wide = X.dtype if X.device.type == "mps" else torch.float64
    dtype, X = X.dtype, X.to(wide)
    product = X @ X.mT
    diagonal = product.diagonal(0, -2, -1)
    nothing = diagonal == 0  # where rows of X are zero, those of the root are
    if dtype != wide:
        diagonal *= 1 + X.shape[-2] ** 2 * torch.finfo(wide).eps
    diagonal += nothing
    root, failed = torch.linalg.cholesky_ex(product)
    root *= ~nothing.unsqueeze(-1)
    for n in failed.nonzero().flatten().tolist():
        root[n] = torch.linalg.qr(X[n].mT, mode="r").R.mT
    return root.to(dtype)


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
    W = node._saved_mat2.detach()
    entries = {len(node.next_functions) - 1: W.numel(), 0 if slot else -1: W.shape[1]}  # of weight and bias, by slot
    whole = all(
        site.moved in ((), ("TBackward0",)) and site.operand_shape.numel() == entries[site.slot]
        for i in own
        for site in sites[i]
    )
    return Head(output, GradientEdge(inside, number), W, frozenset(own), whole)
