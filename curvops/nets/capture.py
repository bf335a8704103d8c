"""One batch seen layer by layer: inputs a and output derivatives g at every place where a parameter is used.

    layers = Layers(network, selection)           # once
    batch = layers.capture(x, size)               # one forward; works out which rows are whose
    factors = batch.factors(U)                    # one batched backward, U (*f.shape, K)

`factors[i]` holds the per-example gradients of parameter i along the K cotangents without forming them. No hook is
set: what the operations saved is read off the autograd graph, and g is asked for at the graph's edges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Set
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.nets.factors import Direct, Factors, Lookup, Made, Outer, Part, Shift
from curvops.nets.forward import Inputs, Network, is_batched, rebuilt, take
from curvops.nets.head import Head, find_head
from curvops.nets.jacobians import example_rows
from curvops.nets.layergraph import AtEdges, LayerGraph, Layout, Reading, Scattered, edge_key
from curvops.nets.layers import Node, Site
from curvops.nets.mixing import require_independent
from curvops.nets.ownership import Layouts, layouts_by_order, layouts_by_pass
from curvops.nets.parameters import ParameterSelection
from curvops.nets.pooled import Pool, Pooled, find_pool
from curvops.nets.rules import Tap

WITNESSES = 2
"""Examples whose outputs are compared with those that they have among all."""

Place = Literal["everywhere", "head", "body"]
"""Of which parameters factors are wanted: all, those of the last layer, or those behind it."""


class Layers:
    """The layers of a network, as far as the selected parameters are concerned.

    Args:
        network: The network.
        selection: The parameters. Flat indices are not looked at: factors are those of whole parameters.
        byte_budget: Working memory of the fallback's chunks.
        few: Whether few cotangents pass over each graph.
        pooled: Read the gradients of convolutions behind their pooling, see `Pooled`.
    """

    def __init__(
        self,
        network: Network,
        selection: ParameterSelection,
        *,
        byte_budget: int = 2**28,
        few: bool = False,
        pooled: bool = False,
    ) -> None:
        self.network, self.selection, self.byte_budget = network, selection, byte_budget
        self.pooled = pooled
        self.recorded = network.fusing() if few else network
        """The network as graphs of it are recorded."""
        self.hooked = self.recomputes = False
        """Whether hooks intercept what a forward saves; whether passes run parts of it again (checkpoints), which must
        then see what the first one saw."""
        self.bytes_per_example = 0
        """Bytes that the kept graph takes per example; 0 before a batch was learned."""
        # Bytes by the kind of examples; and operations of batches whose examples were seen not to depend on each other.
        self._bytes: dict[object, int] = {}
        self._independent: dict[tuple[object, int], int] = {}
        self._waiting: _Witnesses | None = None

    def learn(self, x: Inputs, size: int) -> None:
        """Look at a few examples of a batch of `size` by themselves: what one takes, and its outputs, which `capture`
        compares with those among all. Once for batches of one shape.
        """
        kind, self._waiting = _example_shapes(x, size), None
        if (kind, size) in self._independent or (size == 1 and kind in self._bytes):
            self.bytes_per_example = self._bytes[kind]
            return
        # Not the first one: examples that depend on a neighbour have another one here than among all.
        start = min(1, size - 1)
        stop = min(size, start + WITNESSES)
        few = Capture(self, _copied(take(x, start, stop, size)))
        self.bytes_per_example = self._bytes[kind] = few.graph_bytes // (stop - start)
        if size > 1:
            self._waiting = _Witnesses((kind, size), few.outputs, x, start, stop)

    def capture(self, x: Inputs, size: int) -> Capture:
        """One forward over a batch of `size`, or a chunk of the learned one, ready to be asked for factors.

        Raises:
            DependentExamplesError: An example's outputs depend on the other examples.
        """
        kind = _example_shapes(x, size), size
        if self._waiting is None:
            self.learn(x, size)
        few, self._waiting = self._waiting, None
        batch = Capture(self, x)
        if few is not None:
            self._compare(few, batch.outputs)
            self._independent[few.kind] = self._independent[kind] = batch.operations
        elif self._independent.setdefault(kind, batch.operations) != batch.operations:
            self._require_alone(x, size, batch)  # the forward does something else with this batch
        layouts, guessed = layouts_by_order(batch), frozenset()
        if layouts is None:
            layouts, guessed = layouts_by_pass(batch)
            if not all(found is not None and all(isinstance(a, str) for a in found) for found in layouts):
                self._require_alone(x, size, batch)  # examples that meet, or lie elsewhere, may depend on each other
        batch.read(layouts)
        batch.guessed = guessed
        return batch

    def _compare(self, few: _Witnesses, outputs: Tensor) -> None:
        """Refuse witnesses that have other outputs among all of a batch, or of the chunk that it begins with."""
        size = few.kind[1]
        if len(outputs) < few.stop:
            outputs = self.network.evaluate(take(few.x, 0, few.stop, size))
        require_independent(self.network, few.x, size, few.outputs, outputs[few.start : few.stop], few.start)

    def _require_alone(self, x: Inputs, size: int, batch: Capture) -> None:
        """Refuse a batch whose first example has other outputs when it is alone."""
        alone = self.network.evaluate(take(x, 0, 1, size))
        require_independent(self.network, x, size, alone, batch.outputs[:1])


class _Witnesses(NamedTuple):
    """A few examples of a batch: its kind and size, their outputs by themselves, the batch, where in it they are."""

    kind: tuple[object, int]
    outputs: Tensor
    x: Inputs
    start: int
    stop: int


class Capture(LayerGraph):
    """The graph of one batch, and where to read the factors of its layers.

    Attributes:
        outputs: f, detached.
        fallback: Positions of the parameters that no rule covers.
        guessed: Positions of those where it is guessed whose some inputs are: of rows that no gradient goes through.
    """

    def __init__(self, layers: Layers, x: Inputs) -> None:
        super().__init__(layers.recorded, layers.selection, x, hooked=layers.hooked)
        layers.hooked = self.hooked
        self._recomputes = layers.recomputes
        self._layers, self._x = layers, x
        self._readings: list[list[Reading] | None] = []
        self._values: dict[tuple[int, int], Tensor | Made] = {}
        self._by_position: dict[tuple[int, int], Made] = {}
        self.fallback: list[int] = []
        self.guessed: Set[int] = frozenset()

    @property
    def unused(self) -> list[int]:
        """Positions of the parameters that the outputs do not depend on."""
        return [i for i, sites in enumerate(self._sites) if not sites]

    @functools.cached_property
    def head(self) -> Head | None:
        """The last layer, where the parameters behind it can be asked for by cotangents of its features."""
        return None if self.fallback else self._guarded(lambda: find_head(self._f, self._sites))

    # ---- what is asked ------------------------------------------------------------------------------------------

    def factors(
        self, U: Float[Tensor, "*f K"], place: Place = "everywhere", *, last: bool = False
    ) -> list[Factors | None]:
        """Per-example gradients along K cotangents, factored, one entry per parameter; None where they are zero.

        Args:
            U: `(*f.shape, K)`: row n of column k is the k-th cotangent of example n. For the "body" cotangents of the
                head's features, `(B, [T,] d, K)`.
            place: Whose are wanted, where there is a `head`; the others' are None.
            last: No others are asked for: the backward may free on its way what only further ones would need.

        Cost: the backward of K columns through the activations; no gradient of a parameter is formed, except in the
        fallback, which pulls back every example's cotangents through the whole network. Those of the head are free.
        """
        last = last and not self.hooked  # a pass that is made again must find the graph
        head = self.head if place != "everywhere" else None
        width = self.outputs.shape[-1] if head is None or place == "head" else head.weight.shape[0]
        self._check(U, (*self.outputs.shape[:-1], width), "factors")
        B = self.outputs.shape[0]
        wanted = [
            [] if readings is None or (head is not None and (i in head.parameters) != (place == "head")) else readings
            for i, readings in enumerate(self._readings)
        ]
        edges = [r.edge for readings in wanted for r in readings]
        if head is None:
            grads = self.pulled_to(edges, U, last=last)
        else:
            rows = U.movedim(-1, 0).flatten(1, -2)
            there: AtEdges = {edge_key(head.output): rows}
            grads = there if place == "head" else self._pulled(edges, head.features, rows, last=last)

        pools = {edge_key(r.edge): r.pool for readings in wanted for r in readings if r.pool is not None}
        grads |= {key: pool.gradients(g) for key, pool in pools.items() if (g := grads[key]) is not None}

        def read(i: int, readings: list[Reading]) -> Factors | None:
            found = [(j, r, grads[edge_key(r.edge)]) for j, r in enumerate(readings)]
            parts = [self._part((i, j), r, g.detach(), B) for j, r, g in found if g is not None]
            return Factors(self.selection.sizes[i], parts) if parts else None

        @torch.no_grad()
        def all_read() -> list[Factors | None]:
            return [read(i, readings) for i, readings in enumerate(wanted)]

        result = self._guarded(all_read)
        self._layers.recomputes = self._recomputes
        if self.fallback:
            for i, rows in zip(self.fallback, self._rows(U), strict=True):
                result[i] = Factors(self.selection.sizes[i], [Direct(rows)])
        return result

    def release(self) -> None:
        """Drop the graph; the outputs stay."""
        super().release()
        self._readings, self._values, self._by_position = [], {}, {}
        self.__dict__.pop("head", None)

    # ---- which rows are whose -----------------------------------------------------------------------------------

    def read(self, layouts: Layouts) -> None:
        """Decide how each site is read; a parameter without layouts goes to the fallback."""
        self._readings = [
            None if found is None else self._of_sites(pairs, found)
            for pairs, found in zip(self.taps(), layouts, strict=True)
        ]
        self.fallback = [i for i, readings in enumerate(self._readings) if readings is None]
        self.__dict__.pop("head", None)
        if self._layers.pooled and not (self.hooked or self.tensor_hooks):
            self._guarded(self._read_behind_pools)

    def _of_sites(self, pairs: list[tuple[Site, Tap | None]], layouts: list[Layout]) -> list[Reading]:
        readings: list[Reading] = []
        for (site, t), layout in zip(pairs, layouts, strict=True):
            assert t is not None
            reading = self.shared(site, t, len(self.outputs)) if layout == "shared" else Reading(t, layout)
            assert reading is not None
            if reading.tap.rows:  # otherwise none of the batch came this way: no part of any gradient
                readings.append(reading)
        return readings

    def _read_behind_pools(self) -> None:
        """Have parameters of convolutions that are pooled read where their gradients are few."""
        pools: dict[Node, Pool | None] = {}
        for sites, readings in zip(self._sites, self._readings, strict=True):
            if readings is None or len(readings) != 1 or len(sites) != 1:
                continue
            (site,), (r,) = sites, readings
            if r.layout == "batch first" and r.tap.rows == len(self.outputs):
                if site.node not in pools:
                    pools[site.node] = find_pool(self._users, site.node)
                readings[0] = replace(r, pool=pools[site.node])

    def _part(self, key: tuple[int, int], r: Reading, g: Tensor, B: int) -> Part:
        K, t = g.shape[0], r.tap
        if r.pool is not None:
            return self._pooled(key, r, r.pool, g, B)
        if r.back is None:
            cotangent = self._split(t.cotangent(g), 1, r.layout, B)
        else:
            cotangent = t.cotangent(r.back(g, K)).unflatten(0, (K, B))
        cotangent = _merge_positions(cotangent, t.kind)
        value = self._value(key, r, B)
        if t.kind == "outer":
            assert value is not None
            return Outer(value, cotangent, t.flipped)
        if t.kind == "lookup":
            assert isinstance(value, Tensor)
            return Lookup(value, cotangent, t.size)
        return Shift(cotangent) if t.kind == "shift" else Direct(cotangent)

    def _pooled(self, key: tuple[int, int], r: Reading, pool: Pool, g: Float[Tensor, "K B O S"], B: int) -> Part:
        make, inputs = r.tap.by_position, self._value(key, r, B)
        if make is None:
            return Shift(g.mT)
        assert isinstance(inputs, Made)
        T, G, _ = inputs.shape[1:]
        if key not in self._by_position:
            _, channels, *kernel = self._sites[key[0]][0].operand_shape  # not always the parameter's own
            self._by_position[key] = Made((B, T, G, math.prod(kernel), channels), self.outputs.dtype, make)
        return Pooled(inputs, self._by_position[key], g.unflatten(2, (G, -1)), pool.index.unflatten(1, (G, -1)))

    def _value(self, key: tuple[int, int], r: Reading, B: int) -> Tensor | Made | None:
        """The site's input with examples first, kept for further cotangents."""
        t = r.tap
        if t.value is None:
            return None
        if key not in self._values:
            get, layout, split = t.value, r.layout, self._split

            def value() -> Tensor:
                rows = get().detach()
                rows = rows.expand(B, *rows.shape) if layout == "shared" else split(rows, 0, layout, B)
                return rows.flatten(1, 2)

            positions = t.rows if layout == "shared" else t.rows // B
            shape = None if t.made is None else (B, positions * t.made[0], *t.made[1:])
            self._values[key] = value() if shape is None else Made(shape, self.outputs.dtype, value)
        return self._values[key]

    @staticmethod
    def _split(t: Tensor, axis: int, layout: Layout, B: int) -> Tensor:
        """The axis of rows as `(B, positions)`."""
        if isinstance(layout, Scattered):
            return t.index_select(axis, layout.index.flatten()).unflatten(axis, layout.index.shape)
        if t.shape[axis] == B:
            return t.unsqueeze(axis + 1)
        if layout == "batch last":
            return t.unflatten(axis, (-1, B)).transpose(axis, axis + 1)
        return t.unflatten(axis, (B, -1))

    def _rows(self, U: Tensor) -> list[Tensor]:
        """`(K, B, p)` per-example gradients of each parameter without a rule, by the exact roads of `jacobians`."""
        names = [self.selection.names[i] for i in self.fallback]
        some = ParameterSelection(self._network.module, names)
        cotangents = U.movedim(-1, 1)
        budget = self._layers.byte_budget
        chunks = example_rows(self._layers.network, some, self._x, cotangents, f=self.outputs, byte_budget=budget)
        rows = torch.cat([r for _, r, _ in chunks]).transpose(0, 1)
        return list(rows.split(list(some.sizes), dim=-1))


def _example_shapes(x: Inputs, size: int) -> object:
    """Shapes and dtypes of one example's inputs."""
    if isinstance(x, Tensor):
        return x.shape[1:], x.dtype
    tensors = ((key, value) for key, value in x.items() if isinstance(value, Tensor))
    return tuple((key, value.shape[is_batched(value, size) :], value.dtype) for key, value in tensors)


def _copied(x: Inputs) -> Inputs:
    """Inputs on storage of their own, so that what a graph keeps of them is their share alone."""
    if isinstance(x, Tensor):
        return x.clone()
    return rebuilt(x, {key: value.clone() for key, value in x.items() if isinstance(value, Tensor)})


def _merge_positions(cotangent: Tensor, kind: str) -> Tensor:
    """`(K, B, positions in the rows, …)` with the rows' positions joined to the operation's own, or summed."""
    return cotangent.sum(2) if kind == "direct" else cotangent.flatten(2, 3)
