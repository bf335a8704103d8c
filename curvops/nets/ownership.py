"""Which rows belong to which examples, at every place where a parameter is used.

Operations see rows, and whose they are is not written anywhere: an example's rows may follow each other, or lie one by
one between those of the others, or anywhere, or be shared by all. Mostly the operations show it, see `order`. Otherwise
it is found out by two cotangents or three: random ones of all examples, and the same with each example's scaled by a
power of two of its own. A row that arrives scaled is the example's of that power; one that arrives bent belongs to
several; and of one where nothing arrives it is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.layergraph import LayerGraph, Layout, Scattered, edge_key
from curvops.nets.layers import Site, shape_at
from curvops.nets.order import Strides
from curvops.nets.rules import Tap

Layouts = list[list[Layout] | None]
"""Per parameter the layout of each of its sites; None where that of one is none, or a site has no rule."""

_LEFT = {"MmBackward0": 0, "BmmBackward0": 0, "AddmmBackward0": 1}
"""Matrix products → the slot of their first factor."""

_POWERS = 32
"""Different scales of one cotangent: 2^-16 to 2^15, which single precision has room for."""


def layouts_by_order(graph: LayerGraph) -> Layouts | None:
    """The layouts that the graph's operations show, without a pass; None where they leave one open."""
    B = len(graph.outputs)
    strides = {} if B == 1 else graph.example_strides()
    if strides is None:
        return None
    found: Layouts = []
    for pairs in graph.taps():
        layouts: list[Layout] | None = []
        for site, t in pairs:
            if t is None:
                layouts = None
                continue
            layout: Layout | None = "batch first" if B == 1 else _placed(graph, strides, site, t)
            if layout is None:
                return None
            layouts = None if layouts is None else [*layouts, layout]
        found.append(layouts)
    return found


def _placed(graph: LayerGraph, strides: Strides, site: Site, t: Tap) -> Layout | None:
    """How a tap's rows hold the examples, whose strides are known; None where that is no layout."""
    B, stride = len(graph.outputs), strides.get(edge_key(t.edge))
    if stride is None:  # it has no examples yet
        shared = graph.shared(site, t, B)
        where = None if shared is None else strides.get(edge_key(shared.edge))
        return None if shared is None or where is None or where * B != shape_at(shared.edge).numel() else "shared"
    if site.slot == _LEFT.get(site.name):  # its rows are the product's columns
        return None
    entries = shape_at(t.edge).numel()
    if stride * B == entries and t.rows % B == 0:
        return "batch first"
    return "batch last" if stride * t.rows == entries else None


def layouts_by_pass(graph: LayerGraph) -> tuple[Layouts, frozenset[int]]:
    """The layouts that scaled cotangents show, for this batch; and of which parameters they are partly guessed.

    Rows that no cotangent reaches (behind a ReLU at zero, of a token that is not read) have no part in any gradient,
    and nobody's name on them. Where an example has none but such, or the others fit two layouts, it is a guess whose
    they are.

    Cost: two backwards of one column for up to 32 examples, three for up to 1,024.
    """
    asked = [[None if t is None else _Asked(graph, site, t) for site, t in pairs] for pairs in graph.taps()]
    _find_owners(graph, [place for some in asked for a in some if a is not None for place in a.places])
    found: Layouts = []
    guessed: set[int] = set()
    for i, some in enumerate(asked):
        layouts: list[Layout] | None = []
        for a in some:
            layout, sure = (None, True) if a is None else a.answer(len(graph.outputs))
            layouts = None if layout is None or layouts is None else [*layouts, layout]
            guessed |= set() if sure else {i}
        found.append(layouts)
    return found, frozenset(guessed)


@dataclass
class _Place:
    """Rows somewhere on the graph, and whose they are.

    Attributes:
        edge: Where.
        rows: `(1, *shape there)` → `(R, entries)`.
        owners: `(R,)` number of the example, -1 where nothing arrived; None where nothing arrived at all.
        apart: Whether no row is of several examples.
    """

    edge: GradientEdge
    rows: Callable[[Tensor], Tensor]
    owners: Tensor | None = None
    apart: bool = True

    def hear(self, one: Tensor, other: Tensor, unit: int) -> None:
        """A digit of the owners, by the rows `(R, entries)` of a cotangent and of the scaled one."""
        before, after = one.abs().amax(1), other.abs().amax(1)
        here = (before > 0) | (after > 0)
        power = torch.where(here, (after / before).log2().round(), 0.0)
        bent = (other - one * torch.exp2(power)[:, None]).abs().amax(1) > math.sqrt(torch.finfo(one.dtype).eps) * after
        digit = power + _POWERS // 2
        self.apart &= not bool((bent | (digit < 0) | (digit >= _POWERS)).any())
        if self.apart:
            digits = unit * digit.long()
            self.owners = torch.where(here, digits if self.owners is None else self.owners + digits, -1)

    def fits(self, owners: Tensor) -> bool:
        """Whether these may be the owners."""
        return self.apart and (self.owners is None or not bool(((self.owners != owners) & (self.owners >= 0)).any()))


def _find_owners(graph: LayerGraph, places: Sequence[_Place]) -> None:
    edges, U, B = [place.edge for place in places], graph.cotangent(), len(graph.outputs)
    plain, unit = graph.pulled_to(edges, U), 1
    while unit < B:
        powers = torch.arange(B, device=U.device) // unit % _POWERS - _POWERS // 2
        scale = torch.exp2(powers.to(U.dtype)).reshape(B, *(1,) * (U.dim() - 1))
        scaled = graph.pulled_to(edges, U * scale)
        for place in places:
            one, other = plain[edge_key(place.edge)], scaled[edge_key(place.edge)]
            if one is not None and other is not None:
                place.hear(place.rows(one), place.rows(other), unit)
        unit *= _POWERS


class _Asked:
    """A site, its rows, and those of the sum where they meet the examples, if all share them."""

    def __init__(self, graph: LayerGraph, site: Site, t: Tap) -> None:
        self.rows, self.device, self.own, self.shared = t.rows, graph.outputs.device, None, None
        if t.rows:  # otherwise routed by the data, and no example came this way
            self.own = _Place(t.edge, lambda g: t.cotangent(g).reshape(t.rows, -1))
            if (shared := graph.shared(site, t, len(graph.outputs))) is not None:
                self.shared = _Place(shared.edge, lambda g: g.reshape(len(graph.outputs), -1))

    @property
    def places(self) -> list[_Place]:
        return [place for place in (self.own, self.shared) if place is not None]

    def answer(self, B: int) -> tuple[Layout | None, bool]:
        """The layout, None where it is none; and whether that is no guess."""
        own, R = self.own, self.rows
        if own is None:
            return "batch first", True
        if self.shared is not None and self.shared.fits(torch.arange(B, device=self.device)):
            return "shared", True
        if not own.apart or R % B:
            return None, True
        numbers = torch.arange(R, device=self.device)
        owners = -torch.ones_like(numbers) if own.owners is None else own.owners
        counts = owners[owners >= 0].bincount(minlength=B)
        all_seen = bool((counts[:B] > 0).all())
        last = own.fits(numbers % B)
        if own.fits(numbers // (R // B)):
            return "batch first", all_seen and (R == B or not last)
        if last:
            return "batch last", all_seen
        missing = R // B - counts
        if len(counts) > B or bool((missing < 0).any()):
            return None, True
        owners = owners.clone()
        owners[owners < 0] = torch.arange(B, device=self.device).repeat_interleave(missing)
        return Scattered(owners.argsort(stable=True).reshape(B, -1)), not bool(missing.any())
