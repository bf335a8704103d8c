"""The graph of one batch, the places where parameters are used in it, and which rows there belong to which examples.

Operations see rows, and whose they are is not written anywhere: an example's rows may follow each other, or lie one by
one between those of the others, or be shared by all. Mostly the shapes of two batches show it: the axis that is
longer where there are more examples is theirs. Otherwise it is found out by sending a cotangent through single
examples, and looking where it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.forward import Inputs, Network
from curvops.nets.graph import graph_bytes
from curvops.nets.kept import Kept
from curvops.nets.layers import Site, find_sites, graph_users, placement, shape_at
from curvops.nets.parameters import ParameterSelection
from curvops.nets.rules import Tap, tap

AtEdges = dict[tuple[Any, int], Tensor | None]
"""Edge → `(K, *shape there)`, None where nothing arrives."""

Layout = Literal["batch first", "batch last", "shared"]
"""How rows hold the examples: all rows of example 0 first; row by row one of each; or every example uses every row."""

Needs = Literal["terms", "examples", "all"]
"""What must be known of rows: that each is of one example, where they are terms of a sum over all; which belong to one
example, where those of one place are put together; or which example, where those of several places are."""

WITNESSES = 2
"""Examples on which the rows' ownership is established."""


@dataclass(frozen=True)
class Reading:
    """A tap with the layout of its rows."""

    tap: Tap
    layout: Layout
    # shared: brings g at the tap's edge, where examples are apart, back to the operation's own output, per example
    back: Callable[[Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """What was learned on the witnesses: per parameter the layout of each site, or None for the exact fallback."""

    layouts: list[list[Layout] | None]
    signature: list[list[tuple[str, int, float]]]
    bytes_per_example: int
    certain: bool


class LayerGraph(Kept):
    """One forward, and where it uses the selected parameters.

    Args:
        network: The network.
        selection: The parameters.
        x: Inputs of the batch.

    Attributes:
        outputs: f, detached.
    """

    def __init__(self, network: Network, selection: ParameterSelection, x: Inputs) -> None:
        super().__init__(network, selection, "double_backward")
        self._f = network(x, selection.tensors)
        self.outputs: Tensor = self._f.detach()
        self._users = graph_users(self._f)
        self._sites = find_sites(self._users, selection.tensors)
        self._taps = self._guarded(lambda: [[self._tap(site) for site in sites] for sites in self._sites])

    @property
    def graph_bytes(self) -> int:
        """Bytes that the kept graph holds beyond parameters and buffers."""
        return graph_bytes([self._f], self._network.module) if self._f.requires_grad else 0

    def release(self) -> None:
        """Drop the graph; the outputs stay."""
        self._released = True
        self._f = self.outputs
        self._users, self._sites, self._taps = {}, [], []

    def signature(self) -> list[list[tuple[str, int, float]]]:
        """Per parameter and site: the operation, the operand's slot, rows per example."""
        B = self.outputs.shape[0]
        return [
            [(s.name, s.slot, -1.0 if t is None else t.rows / B) for s, t in zip(sites, taps, strict=True)]
            for sites, taps in zip(self._sites, self._taps, strict=True)
        ]

    def taps(self) -> list[list[tuple[Site, Tap | None]]]:
        """Per parameter its sites, and how each is read."""
        return [list(zip(sites, taps, strict=True)) for sites, taps in zip(self._sites, self._taps, strict=True)]

    def learned(self) -> Plan:
        """What this batch itself says of its rows, by a backward of its own."""
        B = self.outputs.shape[0]
        layouts, sure = self.layouts([B // 2])
        if not sure:
            layouts, sure = self.layouts(range(0, B, max(1, B // WITNESSES)))
        return Plan(layouts, self.signature(), self.graph_bytes // B, sure)

    def layouts(self, examples: Sequence[int]) -> tuple[list[list[Layout] | None], bool]:
        """Layouts found by sending random cotangents through single examples; and whether all are certain.

        Args:
            examples: Which, one column for each. One usually decides; if what it reaches fits two layouts, all do.
        """
        only = torch.arange(self.outputs.shape[0])
        B = self.outputs.shape[0]
        U = torch.cat([self._through(only == n) for n in examples], -1)
        # A site of rows that all examples share is read elsewhere; one backward goes to both places.
        read = [
            [(t, None if t is None else self._shared(site, t, B)) for site, t in zip(sites, taps, strict=True)]
            for sites, taps in zip(self._sites, self._taps, strict=True)
        ]
        edges = [where.edge for pairs in read for t, other in pairs for where in (t, other and other.tap) if where]
        others = torch.arange(B, device=U.device) != torch.tensor(examples, device=U.device)[:, None]
        reached = _Reached(self._pulled_to(edges, U), others)
        sure = True
        found: list[list[Layout] | None] = []
        for pairs in read:
            layouts: list[Layout] | None = []
            for t, shared in pairs:
                layout, certain = (None, True) if t is None else self._layout(t, shared, reached)
                sure = sure and certain
                layouts = None if layout is None or layouts is None else [*layouts, layout]
            found.append(layouts)
        return found, sure

    def _layout(self, t: Tap, shared: Reading | None, reached: _Reached) -> tuple[Layout | None, bool]:
        """The layout of a tap's rows, and whether it is certain."""
        columns, B = reached.others.shape
        if t.rows % B == 0:
            apart = reached.apart(t)
            if apart is None:
                return "batch first", False
            first, last = apart
            if first or last:
                # Shared rows, of which one example may reach only some, are told apart by all examples together.
                certain = (first != last or t.rows == B) and (shared is None or columns == B)
                return "batch first" if first else "batch last", certain
        if shared is None:
            return None, True
        g = reached.at(shared.tap.edge)
        own = g is not None and not bool((g.flatten(2).abs().amax(-1).ne(0) & reached.others).any())
        return ("shared", True) if own else (None, True)

    def _through(self, chosen: Tensor) -> Tensor:
        """One random cotangent `(*f.shape, 1)` of the chosen examples, zero for the others."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.zeros(self.outputs.shape, dtype=self.outputs.dtype)
        draw[chosen] = torch.randn(int(chosen.sum()), *draw.shape[1:], generator=generator, dtype=draw.dtype)
        return draw.to(self.outputs.device).unsqueeze(-1)

    def _shared(self, site: Site, t: Tap, size: int) -> Reading | None:
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

    def _pulled_to(self, edges: Iterable[GradientEdge], U: Tensor, *, last: bool = False) -> AtEdges:
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

    # ---- reading ------------------------------------------------------------------------------------------------

    def _tap(self, site: Site) -> Tap | None:
        tensor = self.selection.tensors[site.parameter]
        place = placement(site, tensor)
        return None if place is None else tap(site, place, tensor.shape)


def shown_layouts(few: LayerGraph, whole: LayerGraph, needs: Needs) -> list[list[Layout] | None] | None:
    """The layouts that shapes show: those of a batch beside those of another number of examples. No pass is made.

    That examples do not depend on each other is for the caller to compare: then what has rows in proportion to their
    number has them for each apart. Which example owns which, under a permutation, no shape shows.

    Returns:
        As `LayerGraph.layouts`; None where shapes leave open what is needed.
    """
    if needs == "all" or len(few.outputs) == len(whole.outputs):
        return None
    found: list[list[Layout] | None] = []
    for mine, theirs in zip(few.taps(), whole.taps(), strict=True):
        several = len(mine) > 1
        if len(mine) != len(theirs):
            return None
        layouts: list[Layout] | None = []
        for (site, t), (other, u) in zip(mine, theirs, strict=True):
            if (site.name, site.slot) != (other.name, other.slot) or (t is None) != (u is None):
                return None
            if t is None or u is None:
                layouts = None
                continue
            if t.rows == u.rows and shape_at(t.edge) == shape_at(u.edge):
                shared = [graph._shared(s, r, len(graph.outputs)) for graph, s, r in ((few, site, t), (whole, other, u))]
                layouts = None if None in shared or layouts is None else [*layouts, "shared"]
                continue
            if several and (needs == "examples" or t.kind == "direct"):
                return None
            layout = _shown(t, u, len(few.outputs), len(whole.outputs), needs)
            if layout is None:
                return None
            layouts = None if layouts is None else [*layouts, layout]
        found.append(layouts)
    return found


def _shown(t: Tap, u: Tap, b: int, B: int, needs: Needs) -> Layout | None:
    """The layout of rows that are t's among b examples and u's among B; None where the two do not show it."""
    if t.rows * B != u.rows * b:
        return None
    if u.rows == B or (needs == "terms" and t.kind != "direct"):
        return "batch first"
    s, S = shape_at(t.edge), shape_at(u.edge)
    axes = [i for i, (n, N) in enumerate(zip(s, S, strict=True)) if n != N] if len(s) == len(S) else []
    if len(axes) != 1 or (s[axes[0]], S[axes[0]]) != (b, B):
        return None
    if S[: axes[0]].numel() == 1:
        return "batch first"
    return "batch last" if S[: axes[0] + 1].numel() == u.rows else None


class _Reached:
    """Where the cotangents of single examples arrived.

    Attributes:
        others: `(K, B)`, whose each column is not.
    """

    def __init__(self, at: AtEdges, others: Tensor) -> None:
        self._at, self.others = at, others
        self._found: dict[Any, tuple[Tensor, tuple[bool, bool]]] = {}

    def at(self, edge: GradientEdge) -> Tensor | None:
        """`(K, *shape there)`; None where nothing arrived."""
        return self._at[edge_key(edge)]

    def apart(self, t: Tap) -> tuple[bool, bool] | None:
        """Whether no other example's rows of a tap are reached, under either order; None where nothing arrived."""
        g = self.at(t.edge)
        if g is None:
            return None
        g = t.cotangent(g).reshape(g.shape[0], t.rows, -1)
        place = g.data_ptr(), g.shape, g.stride()  # a weight and its bias are read in one place
        if place not in self._found:
            reach, B = g.abs().amax(-1).ne(0), self.others.shape[1]
            first = not bool((reach.unflatten(1, (B, -1)).any(2) & self.others).any())
            last = first if t.rows == B else not bool((reach.unflatten(1, (-1, B)).any(1) & self.others).any())
            self._found[place] = g, (first, last)  # g is kept, so that its place stays taken
        return self._found[place][1]


def edge_key(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr
