"""Which rows belong to which examples, at every place where a parameter is used.

Operations see rows, and whose they are is not written anywhere: an example's rows may follow each other, or lie one by
one between those of the others, or be shared by all. Mostly the shapes of two batches show it: the axis that is longer
where there are more examples is theirs. Otherwise it is found out by sending a cotangent through single examples, and
looking where it arrives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.layergraph import AtEdges, LayerGraph, Layout, Reading, edge_key
from curvops.nets.layers import Node, Site, shape_at
from curvops.nets.rules import Tap, signed

Needs = Literal["terms", "examples", "all"]
"""What must be known of rows: that each is of one example, where they are terms of a sum over all; which belong to one
example, where those of one place are put together; or which example, where those of several places are."""

WITNESSES = 2
"""Examples on which the rows' ownership is established."""


@dataclass(frozen=True)
class Plan:
    """What was learned on the witnesses: per parameter the layout of each site, or None for the exact fallback."""

    layouts: list[list[Layout] | None]
    signature: list[list[tuple[str, int, float]]]
    bytes_per_example: int
    certain: bool


def layouts_by_shapes(few: LayerGraph, whole: LayerGraph, needs: Needs) -> list[list[Layout] | None] | None:
    """The layouts that shapes show: those of a batch beside those of another number of examples. No pass is made.

    What has rows in proportion to the number of examples has them for each apart if examples do not depend on each
    other. That outputs do not is for the caller to compare; and no operation may work along the examples' axis.

    Returns:
        As `layouts_by_pass`; None where shapes leave open what is needed.
    """
    if needs == "all" or len(few.outputs) == len(whole.outputs) or whole.moves_by_index:
        return None
    axes = _examples_axes(few, whole)
    if axes is None:
        return None
    first: Layout = "batch first"
    if all(_is_plain(pairs, axes, len(whole.outputs)) for pairs in whole.taps()):
        return [[first for _ in pairs] for pairs in whole.taps()]
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
                shared = [graph.shared(s, r, len(graph.outputs)) for graph, s, r in ((few, site, t), (whole, other, u))]
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


def _examples_axes(few: LayerGraph, whole: LayerGraph) -> dict[Node, tuple[int, int]] | None:
    """Operation of the whole batch → the axis of the examples in its result, and of how many axes.

    None unless every operation keeps that axis, and none that is told an axis is told that one.
    """
    b, B = len(few.outputs), len(whole.outputs)
    nodes, others = few.nodes, whole.nodes
    if len(nodes) != len(others):
        return None
    along: dict[Node, tuple[int, int]] = {}
    for node, other in zip(nodes, others, strict=True):
        s, S = node._input_metadata[0].shape, other._input_metadata[0].shape
        if type(node) is not type(other) or len(s) != len(S):
            return None
        if s == S:
            continue
        axis, *more = (i for i, (n, N) in enumerate(zip(s, S, strict=True)) if n != N)
        if more or s[axis] * B != S[axis] * b:
            return None
        along[other] = axis, len(s)
    for node in others:
        entering = [along[parent] for parent, _ in node.next_functions if parent in along]
        if not entering:
            continue
        if node not in along:
            return None
        name = _axis_argument(type(node))
        if name is None:
            continue
        value = getattr(node, name)
        told = [signed(axis) for axis in (value if isinstance(value, tuple | list) else [value])]
        if any(axis in (told_axis, told_axis + dim) for axis, dim in entering for told_axis in told):
            return None
    return along


def _is_plain(pairs: Sequence[tuple[Site, Tap | None]], axes: dict[Node, tuple[int, int]], B: int) -> bool:
    """Whether a parameter is used once at most, where the first axis is that of the examples, one row for each.

    Then there are no two places to keep apart, and no more to be seen in the rows of fewer examples.
    """
    if len(pairs) != 1:
        return not pairs
    t = pairs[0][1]
    if t is None or t.rows != B or t.edge.output_nr != 0 or t.edge.node not in axes:
        return False
    return axes[t.edge.node][0] == 0


@functools.lru_cache(maxsize=256)
def _axis_argument(kind: type) -> str | None:
    """Under which name nodes of one kind show along which axes they sum, cut, join, turn or normalise.

    A permutation names all axes, and works along none.
    """
    if kind.__name__ == "PermuteBackward0":
        return None
    return next((a for a in ("_saved_dim", "_saved_dims") if hasattr(kind, a)), None)


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


def layouts_by_pass(graph: LayerGraph, examples: Sequence[int]) -> tuple[list[list[Layout] | None], bool]:
    """Layouts found by sending random cotangents through single examples; and whether all are certain.

    Args:
        examples: Which, one column for each. One usually decides; if what it reaches fits two layouts, all do.
    """
    only = torch.arange(graph.outputs.shape[0], device="cpu")
    B = graph.outputs.shape[0]
    U = torch.cat([graph.through(only == n) for n in examples], -1)
    # A site of rows that all examples share is read elsewhere; one backward goes to both places.
    read = [[(t, None if t is None else graph.shared(site, t, B)) for site, t in pairs] for pairs in graph.taps()]
    edges = [where.edge for pairs in read for t, other in pairs for where in (t, other and other.tap) if where]
    others = torch.arange(B, device=U.device) != torch.tensor(examples, device=U.device)[:, None]
    reached = _Reached(graph.pulled_to(edges, U), others)
    sure = True
    found: list[list[Layout] | None] = []
    for pairs in read:
        layouts: list[Layout] | None = []
        for t, shared in pairs:
            layout, certain = (None, True) if t is None else _layout(t, shared, reached)
            sure = sure and certain
            layouts = None if layout is None or layouts is None else [*layouts, layout]
        found.append(layouts)
    return found, sure


def plan_of_batch(graph: LayerGraph) -> Plan:
    """What this batch itself says of its rows, by a backward of its own."""
    B = graph.outputs.shape[0]
    layouts, sure = layouts_by_pass(graph, [B // 2 + B % 2 if B > 1 else 0])  # not the middle, which stays if all turn
    if not sure:
        layouts, sure = layouts_by_pass(graph, range(0, B, max(1, B // WITNESSES)))
    return Plan(layouts, graph.signature(), graph.graph_bytes // B, sure)


def _layout(t: Tap, shared: Reading | None, reached: _Reached) -> tuple[Layout | None, bool]:
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
        if g is None or t.rows == 0:  # routed by the data, and none of these examples came this way
            return None
        g = t.cotangent(g).reshape(g.shape[0], t.rows, -1)
        place = g.data_ptr(), g.shape, g.stride()  # a weight and its bias are read in one place
        if place not in self._found:
            reach, B = g.abs().amax(-1).ne(0), self.others.shape[1]
            first = not bool((reach.unflatten(1, (B, -1)).any(2) & self.others).any())
            last = first if t.rows == B else not bool((reach.unflatten(1, (-1, B)).any(1) & self.others).any())
            self._found[place] = g, (first, last)  # g is kept, so that its place stays taken
        return self._found[place][1]
