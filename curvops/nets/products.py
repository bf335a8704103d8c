"""Products with the Jacobian and the loss Hessian of one batch, on a graph that is built once and kept.

Double backward: the vector-Jacobian product `g(u) = Jᵀu` is linear in its cotangent u, so that differentiating it along
v gives `J v` without forward-mode AD, whose formulas many layers lack. With the graphs of f and g kept, each further
product costs one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.nets.curved import CurvedLayers
from curvops.nets.forward import Inputs, Network, tensors_of
from curvops.nets.graph import Footprint, footprint, graph_bytes
from curvops.nets.kept import Engine, Kept
from curvops.nets.kernels import LeanLayers
from curvops.nets.parameters import ParameterSelection, paired
from curvops.nets.patches import recording


class Loss(Protocol):
    """What a Hessian needs of a likelihood: the negative log-likelihood summed over the batch."""

    def loss(self, f: Tensor, y: Tensor) -> Tensor: ...


class Linearisation(Kept):
    """J, the Jacobian of the outputs of one batch in the selected parameters, as two products.

    Args:
        network: The network.
        selection: The parameters, P of them.
        x: Inputs of the batch.
        engine: How `jvp` is computed; only double backward so far.

    Attributes:
        outputs: `(B, C)` or `(B, T, C)`, detached.
        batched: Whether many columns run in one pass (None until tried, then fixed; both give the same numbers).

    Cost: one forward to build; the first `jvp` adds one backward; then one backward per column and product.
    Parameters that the outputs do not depend on have zero columns.
    """

    def __init__(
        self, network: Network, selection: ParameterSelection, x: Inputs, *, engine: Engine = "double_backward"
    ) -> None:
        super().__init__(network, selection, engine)
        self._f: Tensor = network(x, selection.tensors, within=LeanLayers(self._into))
        self.outputs: Tensor = self._f.detach()
        self._inputs = tensors_of(x)
        # Zero Jacobian: nothing selected reaches the output.
        self._constant = not self._f.requires_grad
        self._tangent: tuple[Tensor, list[int], list[Tensor]] | None = None

    def jvp(self, v: Float[Tensor, "P K"]) -> Float[Tensor, "*f K"]:
        """`J V`: columns of parameters → columns of outputs, `(*f.shape, K)`.

        Raises:
            ShapeError: wrong length, dtype or device.
            UnsupportedLayerError: an operation without second derivative.
        """
        self._check(v, (self.selection.size,), "jvp")
        shape = (*self.outputs.shape, v.shape[1])
        if self._constant or v.shape[1] == 0:
            return self.outputs.new_zeros(shape)
        dummy, which, adjoint = self._tangent if self._tangent is not None else self._build_tangent()
        if not adjoint:
            return self.outputs.new_zeros(shape)
        if v.shape[1] == 1:
            pieces = self.selection.split_row(v[:, 0].contiguous())
            (result,) = self._column(adjoint, [dummy], [paired(pieces[i]) for i in which])
            return self.outputs.new_zeros(shape) if result is None else result.unsqueeze(-1)
        rows = self.selection.split_rows(v.T.contiguous())
        (result,) = self._grad(adjoint, [dummy], [paired(rows[i]) for i in which])
        return self.outputs.new_zeros(shape) if result is None else result.movedim(0, -1)

    def vjp(self, u: Float[Tensor, "*f K"]) -> Float[Tensor, "P K"]:
        """`Jᵀ U`: columns of outputs, `(*f.shape, K)` → columns of parameters, summed over the batch.

        Raises:
            ShapeError: wrong shape, dtype or device.
        """
        self._check(u, tuple(self.outputs.shape), "vjp")
        columns = u.shape[-1]
        if self._constant or columns == 0:
            return self.outputs.new_zeros(self.selection.size, columns)
        if columns > 1 and not self._takes_turns():
            grads = self._grad([self._f], self.selection.tensors, [u.movedim(-1, 0)])
            return self.selection.join_rows(grads, columns).T
        rows = u.new_empty(columns, self.selection.size)
        for row, column in zip(rows, u.movedim(-1, 0).contiguous(), strict=True):
            self._fill(row, [self._f], [column])
        return rows.T

    def sandwich(self, V: Float[Tensor, "P K"], product: Callable[[Tensor], Tensor]) -> Float[Tensor, "P K"]:
        """`Jᵀ Λ J V` with `product` for Λ, `(*f.shape, K)` → the same.

        Where columns take turns, each goes the whole way before the next one starts.
        """
        self._check(V, (self.selection.size,), "jvp")
        if V.shape[1] == 0 or self._constant or (V.shape[1] > 1 and not self._takes_turns()):
            return self.vjp(product(self.jvp(V)))

        def run(v: Tensor, row: Tensor) -> None:
            self._fill(row, [self._f], [product(self.jvp(v.unsqueeze(1))).squeeze(-1)])

        return self._by_columns(V, product, run, in_place=True)

    @property
    def _work(self) -> int:
        return self.selection.size * self.outputs.shape[:-1].numel()

    @property
    def graph_bytes(self) -> int:
        """Bytes that the kept graphs hold beyond parameters and buffers, each storage once.

        Grows when the first `jvp` adds the adjoint's graph. K columns in one pass hold transients of the order of K
        times this. Cost: a walk over the graph.
        """
        roots = [] if self._released else [self._f]
        if self._tangent is not None:
            roots += self._tangent[2]
        return graph_bytes(roots, self._network.module)

    @property
    def footprint(self) -> Footprint:
        """What the graphs hold beyond the inputs, and what a product takes; the adjoint's graph as `graph_bytes`.

        Many columns at once have their share of the inputs each, which products with a layer's weights expand.
        """
        roots = [self._f, *(self._tangent[2] if self._tangent is not None else ())]
        found = footprint([] if self._released else roots, self._network.module, self._inputs)
        if self._in_turn():
            return found
        given = sum(t.untyped_storage().nbytes() for t in self._inputs)
        return found._replace(working=found.working + given, together=True)

    @property
    def has_adjoint(self) -> bool:
        """Whether the adjoint's graph, which the first `jvp` builds, is there (a constant needs none)."""
        return self._tangent is not None or self._constant

    def release(self) -> None:
        """Drop the graphs; the outputs stay."""
        self._released = True
        self._tangent = self._replayed = None
        self._f = self.outputs

    def _build_tangent(self) -> tuple[Tensor, list[int], list[Tensor]]:
        with recording():
            dummy = torch.zeros_like(self.outputs, requires_grad=True)
        adjoint = self._guarded(
            lambda: torch.autograd.grad(self._f, self.selection.tensors, dummy, create_graph=True, allow_unused=True)
        )
        which = [i for i, g in enumerate(adjoint) if g is not None and g.requires_grad]
        self._tangent = (dummy, which, [g for g in adjoint if g is not None and g.requires_grad])
        return self._tangent


class HessianProduct(Kept):
    """The exact Hessian of one batch's summed negative log-likelihood, by a second backward on a kept gradient graph.

    Args:
        network: The network.
        selection: The parameters, P of them.
        likelihood: Whose `loss(f, y)` is differentiated; any object with that method.
        x: Inputs of the batch.
        y: Targets of the batch.

    Attributes:
        outputs: f, detached.
        loss: The summed loss, 0-dim, detached.
        gradient: `(P,)` gradient of the loss, detached.
        batched: As in `Linearisation`.

    Cost: one forward and one backward to build, two backward passes' work per column and product.
    """

    def __init__(
        self,
        network: Network,
        selection: ParameterSelection,
        likelihood: Loss,
        x: Inputs,
        y: Tensor,
        *,
        engine: Engine = "double_backward",
    ) -> None:
        super().__init__(network, selection, engine)
        f = network(x, selection.tensors, within=CurvedLayers(self._into))
        self.outputs: Tensor = f.detach()
        self._inputs = tensors_of(x)
        with recording():
            loss = likelihood.loss(f, y.clone() if y.is_inference() else y.detach())
        grads: Sequence[Tensor | None] = [None] * len(selection.tensors)
        if loss.requires_grad:
            grads = self._guarded(
                lambda: torch.autograd.grad(loss, selection.tensors, create_graph=True, allow_unused=True)
            )
        self.loss: Tensor = loss.detach()
        self.gradient: Tensor = selection.join_rows([None if g is None else g.detach() for g in grads], 1)[0]
        self._which = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [g for g in grads if g is not None and g.requires_grad]

    def matmat(self, v: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """`H V`, summed over the batch.

        Raises:
            ShapeError: wrong length, dtype or device.
        """
        self._check(v, (self.selection.size,), "matmat")
        if not self._grads or v.shape[1] == 0:
            return torch.zeros_like(v)
        if v.shape[1] > 1 and not self._takes_turns():
            rows = self.selection.split_rows(v.T.contiguous())
            grads = self._grad(self._grads, self.selection.tensors, [paired(rows[i]) for i in self._which])
            return self.selection.join_rows(grads, v.shape[1]).T

        def run(v: Tensor, row: Tensor) -> None:
            pieces = self.selection.split_row(v)
            self._fill(row, self._grads, [paired(pieces[i]) for i in self._which])

        return self._by_columns(v, "Hessian", run, in_place=False)

    @property
    def _work(self) -> int:
        return self.selection.size * self.outputs.shape[:-1].numel()

    @property
    def graph_bytes(self) -> int:
        """Bytes that the kept graph holds beyond parameters and buffers, each storage once."""
        return graph_bytes(self._grads, self._network.module)

    @property
    def footprint(self) -> Footprint:
        """What is held beyond the inputs, the gradient twice (on the graph, and detached), and what a product takes.

        A pass goes through the forward's part of the graph and then the backward's, whose cotangents wait for each
        other: seven tenths of the graph are alive at one time (measured over convolutions, residuals and attention).
        """
        graph = footprint(self._grads, self._network.module, self._inputs).held
        held = graph + 2 * self.vector_bytes
        return Footprint(held, max(graph * 7 // 10, 5 * self.vector_bytes // 2), 2.5, not self._in_turn())

    def release(self) -> None:
        """Drop the graph; outputs, loss and gradient stay."""
        self._released = True
        self._grads, self._replayed = [], None
