"""Curvatures of one batch by ASDL: squares and products of its gradients, its KFAC, its double backward.

What it is kept from getting wrong is told in `asdl_adapter`, through which everything here goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.asdl_adapter import (
    COLUMNS,
    FACTORS,
    NATIVE,
    ROWS,
    Examples,
    known_layers,
    library,
    provenance,
    touched,
)
from curvops.curvature.backends.foreign import (
    ForeignProduct,
    Multiply,
    NegativeLogLikelihood,
    first_line,
    plain,
    quiet,
    require_entries,
)
from curvops.curvature.backends.layers import Owner, blocks_label, refuse_ignored_targets
from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.errors import CurvopsError, UnsupportedError, UnsupportedLayerError
from curvops.memory import require
from curvops.nets.batches import Batch
from curvops.nets.jacobians import close
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import LinearOperator
from curvops.operators.dense import Dense
from curvops.operators.kronecker import Kronecker

_NATIVE_KRON = "use kron() of GGNInterface or EFInterface, or co.KFAC"

# -------------------------------------------------------------------- diagonals and products


def squared(objective: Objective, cotangents: Cotangents) -> Tensor:
    """`diag(Σ Jᵀ Λ J)` `(P,)` of one batch, from the columns of Λ's root. Cost: a forward and R backward passes."""
    objective.watch.check()
    selection = objective.selection
    ((batch, f),) = objective.evaluate()
    examples = Examples(objective.model, selection, batch.x, f)
    columns = cotangents.of(objective.needed_likelihood(), f, batch)
    total = torch.zeros(selection.size, dtype=selection.dtype, device=selection.device)
    step = examples.step(objective.budget() // 4, diagonal=True)
    for start in range(0, len(f), step):
        stop = min(start + step, len(f))
        for piece in columns.chunks(COLUMNS):
            total += examples.squares(start, stop, piece[start:stop])
    return total


class AsdlProduct(ForeignProduct):
    """GGN, MC Fisher or EF over one batch: `Σ_kn g_kn (g_knᵀ v)` with ASDL's per-example gradients g of Λ's columns k.

    They are kept where a quarter of the memory budget holds them, and computed again in each product where not.
    """

    def _library(self) -> str:
        return provenance()

    def _known_trouble(self) -> str | None:
        try:
            model, selection = self.objective.model, self.objective.selection
            known_layers(model, touched(model, selection)[0], ROWS, "per-example gradients", "")
        except UnsupportedLayerError as error:
            return str(error).rstrip("; ")
        if Cotangents.like(self.native) is None:
            return f"{provenance()} is given the columns of a root of Λ, and this likelihood has none"
        return None

    def _connect(self, outputs: Outputs, batch: Batch, f: Tensor) -> Multiply:
        objective, selection, cotangents = self.objective, self.objective.selection, Cotangents.like(self.native)
        assert cotangents is not None
        try:
            examples = Examples(objective.model, selection, batch.x, f)
        except UnsupportedError as error:
            raise _Declined(str(error).partition(f"; {NATIVE}")[0]) from error
        with torch.no_grad():
            columns = cotangents.of(objective.needed_likelihood(), f, batch)
        entries = columns.count * len(f) * selection.size
        kept: Tensor | None = None  # (K·B, P)

        def gradients(use: Callable[[Tensor], object]) -> None:
            step = examples.step(objective.budget() // 4)
            for start in range(0, len(f), step):
                for piece in columns.chunks(COLUMNS):
                    examples.visit(start, min(start + step, len(f)), piece[start : start + step], use)

        def multiply(full: Tensor) -> Tensor:
            nonlocal kept
            V = selection.gather(full)
            if kept is None and entries * f.element_size() <= objective.budget() // 4:
                found: list[Tensor] = []
                gradients(found.append)
                kept = torch.cat(found)
            if kept is not None:
                return selection.scatter(kept.T @ (kept @ V))
            total = torch.zeros_like(V)
            gradients(lambda rows: total.add_(rows.T @ (rows @ V)))
            return selection.scatter(total)

        return multiply


class _Declined(Exception):
    """ASDL is not right on this model: curvops' own products answer."""


# -------------------------------------------------------------------- the Hessian


class AsdlHessianProduct(ForeignProduct):
    """The Hessian over one batch, whose products ASDL's `HessianMaker` computes by double backward, one by one."""

    def _library(self) -> str:
        return provenance()

    def _connect(self, outputs: Outputs, batch: Batch, f: Tensor) -> Multiply:
        asdl = library()
        maker = _hessian_maker(outputs, self._loss(batch, f), batch, None)

        def multiply(V: Tensor) -> Tensor:
            columns = []
            for column in V.unbind(1):
                maker.forward_and_backward(hvp=True, vec=asdl.ParamVector(outputs.selected, column))
                columns.append(maker.model.hvp.get_flatten_vector().detach())
            return torch.stack(columns, 1) if columns else torch.zeros_like(V)

        return multiply


def hessian_diagonal(objective: Objective) -> Tensor:
    """The diagonal `(P,)` of the Hessian of one batch by `HessianMaker`, layer by layer.

    One entry of each parameter is compared with a product by curvops.

    Raises:
        UnsupportedLayerError: A parameter that is no layer's `weight` or `bias`, which ASDL loses.
        MemoryBudgetError: The block of a layer, all of which ASDL computes, is past the memory budget.

    Cost: a backward pass per entry; memory of the largest layer squared.
    """
    way_out = "use diag() of HessianInterface, or full()"
    objective.watch.check()
    selection, entries = touched(objective.model, objective.selection)
    places = _places(objective.network.module, selection, way_out)
    _require_blocks(places, selection, objective.budget())
    ((batch, _),) = objective.evaluate()
    outputs = Outputs(objective.model, selection)
    maker = _hessian_maker(outputs, NegativeLogLikelihood(objective), batch, library().SHAPE_DIAG)
    try:
        with outputs.network.differentiable(), quiet():
            maker.forward_and_backward()
        parts = [getattr(outputs.module.get_submodule(path).hessian.diag, role).detach() for path, role in places]
    except CurvopsError:
        raise
    except Exception as error:  # It wants every parameter in the graph, and a tensor at every `weight`.
        raise UnsupportedError(f"{provenance()} fails on this model ({first_line(error)}); {way_out}") from error
    found = sum(part.numel() for part in parts)
    require_entries(found, selection.full_size, "the Hessian's diagonal", provenance(), way_out)
    diagonal = torch.cat([part.reshape(-1) for part in parts])
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor(selection.sizes)).to(diagonal.device)
    if entries is not None:
        diagonal, owner = diagonal[entries], owner[entries]
    probes = torch.stack([torch.where(owner == i, diagonal.abs(), -1).argmax() for i in owner.unique()])
    native = Hessian.of(objective)
    for at in probes.split(COLUMNS):
        units = nn.functional.one_hot(at, len(diagonal)).to(diagonal.dtype).T
        if not close(diagonal[at], native._product(units)[at, torch.arange(len(at), device=at.device)]):
            raise UnsupportedError(f"{provenance()}'s diagonal of the Hessian departs from double backward; {way_out}")
    native.release()
    return diagonal


def _require_blocks(places: list[tuple[str, str]], selection: ParameterSelection, budget: int) -> None:
    blocks: dict[str, int] = {}
    for (path, _), size in zip(places, selection.sizes, strict=True):
        blocks[path] = blocks.get(path, 0) + size
    path, largest = max(blocks.items(), key=lambda entry: entry[1])
    require(
        largest**2 * selection.dtype.itemsize, budget, selection.device,
        f"{provenance()}'s Hessian of layer {path!r}, {largest:,} x {largest:,},",
        "Use diag() of HessianInterface, or full().",
    )  # fmt: skip


def _hessian_maker(outputs: Outputs, loss: nn.Module, batch: Batch, shape: str | None) -> Any:
    asdl = library()
    maker = asdl.HessianMaker(outputs, asdl.HessianConfig(hessian_shapes=[] if shape is None else [shape]))
    maker.setup_loss_call(loss, maker.setup_model_call(outputs, plain(batch.x)), batch.y)
    return maker


def _places(model: nn.Module, selection: ParameterSelection, way_out: str) -> list[tuple[str, str]]:
    """Path and role of each selected parameter where ASDL finds it; the first of several."""
    found: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        for role in ("weight", "bias"):
            if (p := module._parameters.get(role)) is not None:
                found.setdefault(id(p), (path, role))
    for name, p in zip(selection.names, selection.tensors, strict=True):
        if id(p) not in found:
            raise UnsupportedLayerError(
                f"parameter {name!r} is no layer's weight or bias, and {provenance()} computes the Hessian's diagonal "
                f"of those only; {way_out}"
            )
    return [found[id(p)] for p in selection.tensors]


# -------------------------------------------------------------------- Kronecker factors


class KroneckerFactors:
    """KFAC of one batch by ASDL, as blocks in the order of the parameters.

    Args:
        objective: The negative log-likelihood of one batch.
        cotangents: What is propagated backward.
        approx: "expand", or "reduce" where the layers see each datum at one position.
        total: N, the number of data in all.
        scale: Factor on B.

    Raises:
        UnsupportedLayerError: A layer that ASDL loses or gets wrong; named.
    """

    def __init__(self, objective: Objective, cotangents: Cotangents, approx: str, total: int, scale: float) -> None:
        self.objective, self.cotangents, self.approx = objective, cotangents, approx
        self.total, self.scale = total, scale
        model, selection = objective.model, objective.selection
        self.owners = known_layers(model, selection, FACTORS, "Kronecker factors", _NATIVE_KRON)
        refuse_ignored_targets(objective, provenance(), _NATIVE_KRON)
        for owner in self.owners:
            if approx == "reduce" and isinstance(objective.network.module.get_submodule(owner.path), nn.Conv2d):
                _refuse_reduce(owner.path)

    def blocks(self) -> list[LinearOperator]:
        """`B ⊗ A` for weights, `B` for biases. Cost: a forward and R backward passes (T·R of sequences)."""
        objective = self.objective
        objective.watch.check()
        ((batch, f),) = objective.evaluate()
        examples = Examples(objective.model, objective.selection, batch.x, f, way_out=_NATIVE_KRON)
        columns = self.cotangents.of(objective.needed_likelihood(), f, batch)
        if self.approx == "reduce":
            for path in examples.positioned():
                _refuse_reduce(path)
        shapes = objective.selection.shapes
        return [
            self._block(owner, shape, *factors)
            for owner, shape, factors in zip(self.owners, shapes, examples.factors(columns), strict=True)
        ]

    def _block(self, owner: Owner, shape: torch.Size, A: Tensor | None, B: Tensor | None) -> LinearOperator:
        # A layer that the output does not depend on has no factors, and no curvature.
        like = self.objective.selection.tensors[0]
        B = like.new_zeros(shape[0], shape[0]) if B is None else B * self.scale
        if owner.role == "bias":
            return Dense(B, is_psd=True)
        size = shape[1:].numel()
        A = like.new_zeros(size, size) if A is None else A * (self.objective.num_data or 0) / self.total
        return Kronecker(Dense(B, is_psd=True), Dense(A, is_psd=True))

    def label(self) -> str:
        """The blocks in one line, from shapes alone."""
        return blocks_label(self.owners, self.objective.selection.shapes)


def _refuse_reduce(path: str) -> None:
    raise UnsupportedLayerError(
        f'layer {path!r} sees a datum at several positions, and {provenance()} knows kfac_approx="expand" only; '
        f"{_NATIVE_KRON}"
    )
