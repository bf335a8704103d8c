"""Where each parameter enters the forward: read off the autograd graph, so that nothing of the model is touched.

A parameter is found wherever it is used: in a layer, in two layers, in a time step of a recurrence, in functional code
between modules. From its leaf the graph is followed through operations that only move entries (transposes, views,
slices) to the first operation that computes with it; that is a `Site`. What the operation means is for `rules` to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Node = Any
"""A node of the autograd graph."""

Users = dict[Node, list[tuple[Node, int, int]]]
"""Node → the nodes computed from it, with the position among their inputs and the number of the output used."""

MOVING = frozenset(
    f"{name}Backward0"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Split", "SplitWithSizes", "UnsafeSplit",
        "UnsafeSplitWithSizes", "Slice", "Select", "Unbind", "Unsqueeze", "Squeeze", "Clone", "Alias", "Swapaxes",
    )
) | {"SqueezeBackward1", "SqueezeBackward2"}  # fmt: skip
"""Operations whose result holds entries of their input, each at most once."""


class Site(NamedTuple):
    """One place where a parameter is computed with.

    Attributes:
        parameter: Position in the selection.
        node: The operation.
        slot: Position of the operand among the operation's inputs.
        operand: The graph edge at which the parameter, or a rearranged part of it, enters.
        moved: Names of the operations between the parameter and the operand.
    """

    parameter: int
    node: Node
    slot: int
    operand: GradientEdge
    moved: tuple[str, ...]

    @property
    def name(self) -> str:
        """The operation, as the graph calls it."""
        return self.node.name()

    @property
    def operand_shape(self) -> torch.Size:
        """Shape of what enters."""
        return shape_at(self.operand)


class Placement:
    """Where the entries of an operand lie in its parameter.

    Attributes:
        whole: Whether operand and parameter are the same entries in the same order.
        transposed: Whether the operand is the parameter's transpose.
    """

    def __init__(self, size: int, device: torch.device, labels: Tensor | None = None, transposed: bool = False) -> None:
        self._size, self._device, self._labels = size, device, labels
        self.transposed = transposed
        self.whole = labels is None and not transposed

    @property
    def labels(self) -> Tensor:
        """`(p,)` for each flat entry of the parameter, 1 + the flat position in the operand, 0 where unused."""
        if self._labels is None:
            return torch.arange(1, self._size + 1, device=self._device)
        return self._labels


def shape_at(edge: GradientEdge) -> torch.Size:
    """Shape of the tensor at an edge of the graph."""
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def graph_users(f: Tensor) -> Users:
    """Every node behind `f` with its users, in an order that depends on the graph alone. One visit per node."""
    users: Users = defaultdict(list)
    if f.grad_fn is None:
        return users
    seen = {f.grad_fn}
    pending = [f.grad_fn]
    while pending:
        node = pending.pop()
        for slot, (parent, number) in enumerate(node.next_functions):
            if parent is None:
                continue
            users[parent].append((node, slot, number))
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return users


def find_sites(users: Users, tensors: Sequence[Tensor]) -> list[list[Site]]:
    """The sites of each tensor, in the graph's own order; none for a tensor that the output does not depend on."""
    leaves = {id(n.variable): n for n in users if hasattr(n, "variable")}
    nodes = [leaves.get(id(tensor)) for tensor in tensors]
    return [[] if node is None else list(_below(users, i, node, ())) for i, node in enumerate(nodes)]


def _below(users: Users, i: int, node: Node, moved: tuple[str, ...]) -> Iterator[Site]:
    # No closure: one that calls itself is a cycle, and would keep the graph until Python's collector comes round.
    for user, slot, number in users[node]:
        if user.name() in MOVING:
            yield from _below(users, i, user, (*moved, user.name()))
        else:
            yield Site(i, user, slot, GradientEdge(node, number), moved)


def placement(site: Site, tensor: Tensor) -> Placement | None:
    """Where the operand's entries lie in the parameter; None where that cannot be told.

    The operations between them only move entries, so that pulling back the numbers 1, 2, … shows where each came from.
    """
    p = tensor.numel()
    if not site.moved:
        return Placement(p, tensor.device)
    if site.moved == ("TBackward0",) and tensor.dim() == 2:
        return Placement(p, tensor.device, transposed=True)
    shape = site.operand_shape
    if shape.numel() > 1 / torch.finfo(tensor.dtype).eps:
        return None
    numbers = torch.arange(1, shape.numel() + 1, dtype=tensor.dtype, device=tensor.device).reshape(shape)
    (labels,) = torch.autograd.grad([site.operand], [tensor], [numbers], retain_graph=True)
    labels = labels.reshape(-1).long()
    ordered = p == shape.numel() and torch.equal(labels, numbers.reshape(-1).long())
    return Placement(p, tensor.device, None if ordered else labels)
