"""The graph of one forward, the places where it uses parameters, and cotangents pulled back to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, disable_saved_tensors_hooks

from curvops.nets.forward import Inputs, Network
from curvops.nets.graph import graph_bytes
from curvops.nets.kept import Kept
from curvops.nets.kernels import LeanFunctions
from curvops.nets.layers import Site, Users, find_sites, graph_users, placement, shape_at
from curvops.nets.order import Edge, Strides, example_strides
from curvops.nets.parameters import ParameterSelection
from curvops.nets.pooled import Pool
from curvops.nets.rules import Tap, tap

AtEdges = dict[Edge, Tensor | None]
"""Edge → `(K, *shape there)`, None where nothing arrives."""


@dataclass(frozen=True, eq=False)
class Scattered:
    """Rows anywhere: which are whose, `(B, positions)`."""

    index: Tensor


Layout = Literal["batch first", "batch last", "shared"] | Scattered
"""How rows hold the examples: all rows of example 0 first; row by row one of each; every example uses every row; or in
no such order."""

_TOGETHER = 2**22
"""Bytes of a graph up to which columns share a pass to the layers, which ends before the gradients of parameters."""

_NO_HOOKS = "saved tensors are looked for without hooks"


@dataclass(frozen=True)
class Reading:
    """A tap with the layout of its rows."""

    tap: Tap
    layout: Layout
    # shared: brings g at the tap's edge, where examples are apart, back to the operation's own output, per example
    back: Callable[[Tensor, int], Tensor] | None = None
    # where the operation's outputs are pooled and g is read behind that
    pool: Pool | None = None

    @property
    def edge(self) -> GradientEdge:
        """Where g is read."""
        return self.tap.edge if self.pool is None else self.pool.edge


class LayerGraph(Kept):
    """One forward, and where it uses the selected parameters.

    Args:
        network: The network.
        selection: The parameters.
        x: Inputs of the batch.
        hooked: Whether hooks are known to intercept what the forward saves.

    Attributes:
        outputs: f, detached.
        hooked: Whether hooks intercept what the forward saves (checkpoints, offloading): passes may fail half-way, and
            are then made again.
        tensor_hooks: Whether the forward put hooks on its activations, or may have.
    """

    def __init__(self, network: Network, selection: ParameterSelection, x: Inputs, *, hooked: bool = False) -> None:
        super().__init__(network, selection, "double_backward")
        functions = None if network.fused else LeanFunctions()
        self._f, self.hooked = _recorded(functools.partial(network, x, selection.tensors, within=functions), hooked)
        self.tensor_hooks = functions is None or functions.hooks
        # Hooks that keep what they see shall see tensors, and not those of a vectorised pass.
        self._watched = functions is not None and functions.hooks
        self.outputs: Tensor = self._f.detach()

    @functools.cached_property
    def _users(self) -> Users:
        return graph_users(self._f)

    @functools.cached_property
    def _sites(self) -> list[list[Site]]:
        return find_sites(self._users, self.selection.tensors)

    @functools.cached_property
    def _taps(self) -> list[list[Tap | None]]:
        return self._guarded(lambda: [[self._tap(site) for site in sites] for sites in self._sites])

    @property
    def operations(self) -> int:
        """How many there are behind the outputs."""
        return len(self._users)

    @property
    def graph_bytes(self) -> int:
        """Bytes that the kept graph holds beyond parameters and buffers."""
        return graph_bytes([self._f], self._network.module) if self._f.requires_grad else 0

    @property
    def _together(self) -> int:
        return 0 if self._watched else _TOGETHER

    def release(self) -> None:
        """Drop the graph; the outputs stay."""
        self._released = True
        self._f = self.outputs
        self._users, self._sites, self._taps = {}, [], []

    def taps(self) -> list[list[tuple[Site, Tap | None]]]:
        """Per parameter its sites, and how each is read."""
        return [list(zip(sites, taps, strict=True)) for sites, taps in zip(self._sites, self._taps, strict=True)]

    def example_strides(self) -> Strides | None:
        """The stride of the examples in every tensor of the graph, see `order`; None where it does not show them."""
        return example_strides(self._f)

    def cotangent(self) -> Tensor:
        """A random cotangent `(*f.shape, 1)`, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(*self.outputs.shape, 1, generator=generator, dtype=self.outputs.dtype, device="cpu")
        return draw.to(self.outputs.device)

    def shared(self, site: Site, t: Tap, size: int) -> Reading | None:
        """The reading of rows that all examples share, at the sum where they meet the examples.

        Positional lookups and projections of constants have no batch axis; it comes in where their result is broadcast
        to it. There g is apart for each example.
        """
        node, number = site.node, 0
        while True:
            users = self._users[node]
            if len(users) != 1:
                return None
            user, slot, number = users[0]
            if user.name() not in ("ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "AliasBackward0"):
                break
            node = user
        if user.name() != "AddBackward0" or (slot == 1 and user._saved_alpha != 1):
            return None
        edge, operand = GradientEdge(user, 0), GradientEdge(node, number)
        full, own = shape_at(edge), shape_at(operand)
        aligned = (1,) * (len(full) - len(own)) + tuple(own)
        if len(full) < 2 or full[0] != size or aligned[0] != 1:
            return None

        def back(g: Tensor, K: int) -> Tensor:  # (K, B, …) → (K · B, *shape of the operation's output)
            g = g.reshape(K * size, 1, *full[1:])
            for axis, n in enumerate(aligned):
                if n == 1 and axis > 0:
                    g = g.sum(1 + axis, keepdim=True)
            g = g.reshape(K * size, *own)
            if node is site.node:
                return g
            (result,) = self._grad([operand], [GradientEdge(site.node, 0)], [g])  # type: ignore[list-item]
            assert result is not None
            return result

        return Reading(replace(t, edge=edge), "shared", back)

    def pulled_to(self, edges: Iterable[GradientEdge], U: Tensor, *, last: bool = False) -> AtEdges:
        """The cotangents U `(*f.shape, K)` pulled back to edges of the graph, each once, in one batched backward."""
        return self._pulled(edges, self._f, U.movedim(-1, 0), last=last)

    def _pulled(
        self, edges: Iterable[GradientEdge], start: Tensor | GradientEdge, g: Tensor, *, last: bool = False
    ) -> AtEdges:
        """K cotangents of what is at `start`, `(K, …)`, pulled back."""
        wanted = {edge_key(edge): edge for edge in edges}
        if not wanted:
            return {}
        found = self._grad([start], list(wanted.values()), [g], last=last)  # type: ignore[list-item]
        return dict(zip(wanted, found, strict=True))

    def _tap(self, site: Site) -> Tap | None:
        tensor = self.selection.tensors[site.parameter]
        place = placement(site, tensor)
        return None if place is None else tap(site, place, tensor.shape)


def _recorded(forward: Callable[[], Tensor], hooked: bool) -> tuple[Tensor, bool]:
    """f on its graph, and whether hooks intercept what is saved; to find that out may take a forward of its own."""
    if not hooked:
        try:
            with disable_saved_tensors_hooks(_NO_HOOKS):
                return forward(), False
        except RuntimeError as error:
            if _NO_HOOKS not in str(error):
                raise
    return forward(), True


def edge_key(edge: GradientEdge) -> Edge:
    return edge.node, edge.output_nr
