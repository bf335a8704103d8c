"""Per-example Jacobians and gradients: rows `uᵀ J_n`, one example at a time in meaning, many at a time in fact.

Three roads, each exact, tried in this order:

* `"vmap"`: the pullback of one example, vectorised over the examples of a chunk;
* `"example"`: each example alone through the network, all its rows in one pass; for operations without batching rule;
* `"batch"`: the whole batch through the network, a cotangent per example and row; for networks whose forward lets one
  example's output depend on the others, where only this road follows the definition.

What the vectorised road finds is compared with a backward over the chunk as a whole, which sees every use of a
parameter: by one random combination of all rows, once for chunks of one size. Batching rules of operations err, too:
that of PReLU's backward takes the inputs of example r for column r where there are as many of both (PyTorch 2.14).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.nets.forward import Inputs, Network, explained_product, is_batched, rebuilt, take
from curvops.nets.parameters import ParameterSelection
from curvops.nets.patches import recording, substituted, unhooked, without_backward_hooks
from curvops.nets.products import Linearisation

Road = Literal["vmap", "example", "batch"]

_TINY = 1e-3
"""Of the largest entry of a gradient: a parameter whose entries are smaller is compared on that scale."""

DEFAULT_BYTES = 2**28
"""Working memory of a chunk unless told otherwise, beside the result itself."""


class Gradient(Protocol):
    """What per-example gradients need of a likelihood: ∂loss/∂f in f's shape."""

    def gradient(self, f: Tensor, y: Tensor) -> Tensor: ...


def jacobians(
    network: Network,
    selection: ParameterSelection,
    x: Inputs,
    *,
    enable_backprop: bool = False,
    byte_budget: int = DEFAULT_BYTES,
    road: Road | None = None,
) -> tuple[Float[Tensor, "*f P"], Float[Tensor, "*f"]]:
    """Jacobian of every example's outputs in the selected parameters.

    Args:
        network: The network.
        selection: The P parameters.
        x: Inputs of one batch.
        enable_backprop: Keep the graph from both results to `x` and the parameters (small batches).
        byte_budget: Working memory of a chunk of examples; the result's own B·C·P entries come on top.
        road: Force one of the three roads; None picks the fastest that is right.

    Returns:
        `(B, C, P)` and f `(B, C)`; `(B, T, C, P)` and `(B, T, C)` for sequences. Always exactly P columns.

    Cost: one forward, and C (or T·C) backward passes over each example.
    """
    if enable_backprop:
        with recording():
            return _attached(network, selection, x)
    chunks = list(example_rows(network, selection, x, byte_budget=byte_budget, road=road))
    rows = chunks[0][1] if len(chunks) == 1 else torch.cat([r for _, r, _ in chunks])
    f = chunks[0][2] if len(chunks) == 1 else torch.cat([f for _, _, f in chunks])
    return rows.reshape(*f.shape, selection.size), f


def gradients(
    network: Network,
    selection: ParameterSelection,
    likelihood: Gradient,
    x: Inputs,
    y: Tensor,
    *,
    byte_budget: int = DEFAULT_BYTES,
    road: Road | None = None,
) -> tuple[Float[Tensor, "B P"], Float[Tensor, "*f"]]:
    """Gradient of the loss of every example, summed over its positions.

    Args:
        network: The network.
        selection: The P parameters.
        likelihood: Whose `gradient(f, y)` is pulled back.
        x: Inputs of one batch.
        y: Targets of one batch.
        byte_budget: Working memory of a chunk of examples.
        road: As in `jacobians`.

    Returns:
        `(B, P)` and f.

    Cost: two forwards and one backward over each example, and as much as a gradient to compare with.
    """
    f = network.evaluate(x)
    with torch.no_grad():
        residuals = likelihood.gradient(f, y)
    chunks = example_rows(network, selection, x, residuals.unsqueeze(1), f=f, byte_budget=byte_budget, road=road)
    return torch.cat([rows[:, 0] for _, rows, _ in chunks]), f


def example_rows(
    network: Network,
    selection: ParameterSelection,
    x: Inputs,
    cotangents: Float[Tensor, "B R *event"] | None = None,
    *,
    f: Tensor | None = None,
    byte_budget: int = DEFAULT_BYTES,
    road: Road | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b R P"], Float[Tensor, "b ..."]]]:
    """Rows `u_{n,r}ᵀ J_n` of the examples of a batch, chunk by chunk.

    Args:
        network: The network.
        selection: The P parameters.
        x: Inputs of one batch.
        cotangents: R cotangents for every example; None for the unit vectors of its outputs (R = C or T·C).
        f: The outputs, where already known.
        byte_budget: Working memory of a chunk; sets how many examples it holds, at least one.
        road: As in `jacobians`.

    Yields:
        The chunk's first example, its rows and its outputs, all detached.

    Raises:
        ShapeError: cotangents that do not fit the outputs.
    """
    f = network.evaluate(x) if f is None else f
    size, event = f.shape[0], f.shape[1:]
    if cotangents is None:
        units = torch.eye(event.numel(), dtype=f.dtype, device=f.device).reshape(-1, *event)
        cotangents = units.expand(size, *units.shape)
    elif cotangents.shape[:1] + cotangents.shape[2:] != f.shape:
        raise ShapeError(f"cotangents: expected {(size, 'R', *event)}, got {tuple(cotangents.shape)}")
    # Gradients, their concatenation, and the activations' share.
    per_example = 4 * cotangents.shape[1] * selection.full_size * f.element_size()
    step = max(1, min(size, byte_budget // max(per_example, 1)))
    rows = _Rows(network, selection, x, f, road)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield start, rows(start, stop, cotangents[start:stop]), f[start:stop]


class _Blocked(Exception):
    """This road does not lead there; the next one is tried."""


class _Rows:
    """Walks the roads: keeps to the first that works."""

    def __init__(
        self, network: Network, selection: ParameterSelection, x: Inputs, f: Tensor, road: Road | None
    ) -> None:
        self.network, self.selection, self.x, self.f = network, selection, x, f
        self.roads: list[Road] = [road] if road else ["vmap", "example", "batch"]
        self._trusted: set[tuple[int, ...]] = set()
        self._batched: bool | None = None
        self._whole: Linearisation | None = None

    def __call__(self, start: int, stop: int, u: Tensor) -> Tensor:
        """`(b, R, P)` for cotangents `(b, R, *event)` of the examples `start … stop`."""
        walk = {"vmap": self._vmap, "example": self._example, "batch": self._batch}
        while True:
            try:
                return walk[self.roads[0]](start, stop, u)
            except _Blocked as why:
                if len(self.roads) == 1:
                    raise UnsupportedError(f"road={self.roads[0]!r}: {why}; leave road=None") from why
                self.roads.pop(0)

    def _vmap(self, start: int, stop: int, u: Tensor) -> Tensor:
        part = take(self.x, start, stop, len(self.f))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                rows, f = _pulled_back(self.network, self.selection, part, u)
            except Exception as error:  # The model's own code runs here: the plain road says what is wrong with it.
                raise _Blocked(f"the model does not vectorise over examples ({error})") from error
        if any("performance drop" in str(w.message) for w in caught):
            raise _Blocked("an operation of the model has no batching rule")
        if not close(f, self.f[start:stop]):
            raise _Blocked("an example's outputs depend on the other examples")
        if u.shape[:2] not in self._trusted:
            if not self._agrees(part, u, rows):
                raise _Blocked(
                    "a parameter is used beside the place where it is registered, or an operation's batching rule errs"
                )
            self._trusted.add(u.shape[:2])
        return rows

    def _agrees(self, part: Inputs, u: Tensor, rows: Tensor) -> bool:
        """Whether a random combination of all rows is what one backward over their examples gives."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(u.shape[:2], generator=generator, dtype=torch.float64, device="cpu").add_(0.5).to(u)
        whole = Linearisation(self.network, self.selection, part)
        expected = whole.vjp(torch.einsum("br,br...->b...", weights, u).unsqueeze(-1))[:, 0]
        found = torch.einsum("br,brp->p", weights, rows)
        if self.selection.indices is not None:
            return close(found, expected)
        sizes = list(self.selection.sizes)
        least = _TINY * float(_largest(expected)) if expected.numel() else 0.0  # what is zero but for rounding
        pairs = zip(found.split(sizes), expected.split(sizes), strict=True)
        return all(close(a, b, at_least=least) for a, b in pairs)

    def _example(self, start: int, stop: int, u: Tensor) -> Tensor:
        rows = []
        for n in range(start, stop):
            one = Linearisation(self.network, self.selection, take(self.x, n, n + 1, len(self.f)))
            if not close(one.outputs, self.f[n : n + 1]):
                raise _Blocked("an example's outputs depend on the other examples")
            one.batched = self._batched
            rows.append(one.vjp(u[n - start].unsqueeze(0).movedim(1, -1)).T)
            self._batched = one.batched
        return torch.stack(rows)

    def _batch(self, start: int, stop: int, u: Tensor) -> Tensor:
        if self._whole is None:
            self._whole = Linearisation(self.network, self.selection, self.x)
        rows = []
        for n in range(start, stop):
            only_n = u.new_zeros(*self.f.shape, u.shape[1])
            only_n[n] = u[n - start].movedim(0, -1)
            rows.append(self._whole.vjp(only_n).T)
        return torch.stack(rows)


def close(a: Tensor, b: Tensor, *, at_least: float = 0.0) -> bool:
    """Equal up to what another order of summation does, of entries that are `at_least` as large as that."""
    if a.shape != b.shape:
        return False
    tolerance = 1e-8 if b.dtype == torch.float64 else 2e-3
    return not b.numel() or float(_largest(a - b)) <= tolerance * max(at_least, float(_largest(b)))


def _largest(t: Tensor) -> Tensor:
    return t.abs().amax()


def _pulled_back(
    network: Network, selection: ParameterSelection, x: Inputs, u: Tensor
) -> tuple[Float[Tensor, "b R P"], Tensor]:
    """The pullback of one example, vectorised over the examples; also the outputs that it saw."""
    size, number = u.shape[:2]
    batched = [x] if isinstance(x, Tensor) else [v for v in x.values() if is_batched(v, size)]
    keys = [] if isinstance(x, Tensor) else [k for k, v in x.items() if is_batched(v, size)]
    values = tuple(p.detach() for p in selection.tensors)

    def outputs(parameters: tuple[Tensor, ...], pieces: tuple[Tensor, ...]) -> Tensor:
        single: Any = pieces[0].unsqueeze(0)
        if not isinstance(x, Tensor):
            single = rebuilt(x, dict(zip(keys, (t.unsqueeze(0) for t in pieces), strict=True)))
        with substituted(network.module, selection.tensors, parameters):
            return network.output_tensor(network.call(single)).squeeze(0)

    def one(pieces: tuple[Tensor, ...], cotangents: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        f, pullback = cast(Any, torch.func.vjp(lambda *p: outputs(p, pieces), *values))
        return torch.func.vmap(lambda c: pullback(c.to(f.dtype)))(cotangents), f

    with network.differentiable(), without_backward_hooks(network.module.modules()), torch.no_grad():
        grads, f = torch.func.vmap(one)(tuple(t.detach() for t in batched), u)
    flat = selection.join_rows([g.flatten(0, 1) for g in grads], size * number)
    return flat.reshape(size, number, selection.size), f.to(u.dtype)


def _attached(network: Network, selection: ParameterSelection, x: Inputs) -> tuple[Tensor, Tensor]:
    """Jacobians with their own graph to x and the parameters, example by example where examples do not mix."""
    together = network(x, detach=False)
    size = together.shape[0]
    rows, f = [], []
    for n in range(size):
        alone = network(take(x, n, n + 1, size), detach=False)
        if not close(alone.detach(), together[n : n + 1].detach()):
            return _attached_rows(selection, together).reshape(*together.shape, selection.size), together
        rows.append(_attached_rows(selection, alone))
        f.append(alone)
    return torch.stack(rows).reshape(size, *together.shape[1:], selection.size), torch.cat(f)


def _attached_rows(selection: ParameterSelection, f: Tensor) -> Tensor:
    if not f.requires_grad:
        return f.new_zeros(f.numel(), selection.size)
    with unhooked(selection.tensors):
        rows = []
        for entry in f.reshape(-1):
            try:
                grads = torch.autograd.grad(entry, selection.tensors, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise explained_product(error) from error
            rows.append(selection.join_rows(grads, 1)[0])
        return torch.stack(rows)
