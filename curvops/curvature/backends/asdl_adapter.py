"""ASDL (distribution `asdfghjkl`, module `asdl`): its layers' statistics as ours; every quirk of it in here.

It hooks a copy of the model (`sandbox`) and is told what to propagate by our likelihoods. So class weights, ignored
targets, label smoothing and Bernoulli targets count, which its own loops do not know; sampled targets come from
`curvops.nets.draws`, not from the global generator; and an exception in its middle, which leaves `requires_grad` off,
does so on the copy.

What it gets wrong in silence, and what happens here instead (checked on 0.1a4):

* Parameters that it has no rule for (other layers, raw ones, those of attention) are lost, and vectors come out too
  short. A module that runs twice is paired with its last input. A weight used beside its module, or registered at two
  places, loses that use. All are refused by name.
* `groups` and `padding_mode` of convolutions are ignored (dilation and `padding="same"` fail): refused.
* Embeddings have a row per token in place of one per datum, in float32: refused.
* Rows of a layer that sees a datum at several positions are taken for data. Here they are summed per datum, as its own
  `batch_gradient(batch_size=)` does.
* Its diagonal of such layers drops the products of different positions, and so does that of convolutions with large
  kernels and few positions. Here the squares of its per-example gradients are taken.
* Normalisations read their input off their output, (y − bias) / weight: wrong where a weight is zero, or a later layer
  works in place; BatchNorm1d knows no positions. Such things show in numbers: before anything is returned, the
  gradients of a batch's first three data are compared with autograd, parameter by parameter; and those of all data,
  where the operations do not show that each row keeps its place.
* Its KFAC has no "reduce", and its A no average: refused, and scaled here.
* Its Hessian's diagonal is double backward over parameters named `weight` and `bias`: others are refused.
* 0.1a5 dropped an argument that laplace-torch needs; versions but 0.1a4 are refused.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from curvops.curvature.backends.foreign import (
    first_line,
    plain,
    quiet,
)
from curvops.curvature.backends.layers import (
    Owner,
    irregular,
    module_text,
    owners,
    require_only_uses,
)
from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.matrixfree.cotangents import Columns
from curvops.errors import CurvopsError, UnsupportedError, UnsupportedLayerError
from curvops.extras import require as require_extra
from curvops.nets.forward import take
from curvops.nets.jacobians import close
from curvops.nets.order import example_strides
from curvops.nets.parameters import ParameterSelection, unwrap

WANTED = "0.1a4"

ROWS = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
FACTORS = (nn.Linear, nn.Conv2d)
_PROBE = 3
"""Data that its gradients are compared on with autograd's."""

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference from autograd there, relative to the parameter's largest entry."""

COLUMNS = 64
"""Cotangents that one forward serves."""

NATIVE = "use GGNInterface, EFInterface or HessianInterface"


def library() -> Any:
    """The package.

    Raises:
        MissingExtraError: It is not installed.
        UnsupportedError: Another version is.
    """
    with quiet():  # it scripts functions when imported, which is deprecated
        asdl = require_extra("asdl", "asdl")
    found = importlib.metadata.version("asdfghjkl")
    if found != WANTED:
        raise UnsupportedError(
            f"asdfghjkl {found} is installed, and {WANTED} is wanted (0.1a5 dropped the batch_size of batch_gradient); "
            f"run: pip install 'asdfghjkl=={WANTED}', or {NATIVE}"
        )
    return asdl


def provenance() -> str:
    """`asdl 0.1a4`."""
    return f"asdl {WANTED}"


# -------------------------------------------------------------------- pre-flight


def known_layers(
    model: nn.Module, selection: ParameterSelection, kinds: tuple[type[nn.Module], ...], what: str, way_out: str
) -> list[Owner]:
    """The layer of each selected parameter, all of which ASDL has right formulas for as far as their types tell.

    Raises:
        UnsupportedLayerError: One is not of these kinds, is tied, or is used in a way that ASDL does not see.
    """
    chosen = {id(p) for p in selection.tensors}
    for path, module in unwrap(model).named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in chosen:
            raise UnsupportedLayerError(
                f"{provenance()} gives the embedding {module_text(path, module)} a row per token in place of one per "
                f"datum, in float32; {way_out}"
            )
    found = owners(model, selection, kinds, provenance(), way_out, what)
    for owner in found:
        module = _module(model, owner)
        complaint = _complaint(module)
        if complaint is not None:
            raise UnsupportedLayerError(
                f"parameter {owner.name!r} belongs to {module_text(owner.path, module)}, which {complaint} "
                f"({provenance()}); {way_out}"
            )
    return found


def _module(model: nn.Module, owner: Owner) -> nn.Module:
    """The user's module that owns a parameter."""
    return unwrap(model).get_submodule(owner.path)


def _complaint(module: nn.Module) -> str | None:
    kind = next(k for k in (*ROWS, nn.Module) if isinstance(module, k))
    if is_parametrized(module) or "weight" not in module._parameters:
        return "computes its weight, which it does not differentiate through"
    if type(module).forward is not kind.forward:
        return f"has a forward of its own, which it takes for that of {kind.__name__}"
    if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
        return "lacks a weight or a bias, from which it restores the input"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return f"has groups={module.groups}, which it ignores"
        if tuple(module.dilation) != (1, 1):
            return f"has dilation={tuple(module.dilation)}, which it does not unfold"
        if module.padding_mode != "zeros":
            return f"has padding_mode={module.padding_mode!r}, which it takes for zeros"
        if module.padding == "same":
            return 'has padding="same", which it does not unfold'
    return None


def touched(model: nn.Module, selection: ParameterSelection) -> tuple[ParameterSelection, Tensor | None]:
    """The parameters that flat indices reach, and where the indices point in these; None for all of them."""
    if selection.indices is None:
        return selection, None
    offsets = torch.tensor(selection.offsets, device=selection.device)
    which = torch.bucketize(selection.indices, offsets, right=True) - 1
    reached = which.unique()
    inner = ParameterSelection(model, [selection.names[i] for i in reached.tolist()])
    shifts = torch.zeros_like(offsets)
    shifts[reached] = torch.tensor(inner.offsets, device=selection.device) - offsets[reached]
    return inner, selection.indices + shifts[which]


# -------------------------------------------------------------------- per-example gradients


class Examples:
    """Per-example gradients `uᵀ J_n` of one batch by ASDL's rules for layers, certified before they are used.

    Args:
        model: The user's module.
        selection: The parameters that count.
        x: Inputs of one batch.
        f: Its outputs, detached.
        way_out: What to use instead.

    Raises:
        UnsupportedLayerError: A layer that ASDL gets wrong; named.

    Cost: a forward and three backward passes over three data; nothing is kept. Two backward passes more over all,
    where the operations leave open which rows are whose.
    """

    def __init__(
        self, model: nn.Module, selection: ParameterSelection, x: Any, f: Tensor, *, way_out: str = NATIVE
    ) -> None:
        self.selection, self.entries = touched(model, selection)
        self.x, self.f, self.way_out = plain(x), f, way_out
        self.library = library()
        self.owners = known_layers(model, self.selection, ROWS, "per-example gradients", way_out)
        self.outputs = Outputs(model, self.selection)
        self.modules = [self.outputs.module.get_submodule(owner.path) for owner in self.owners]
        self._apart: set[nn.Module] = set()  # whose diagonal is not that of its per-example gradients
        self._certify()

    def visit(self, start: int, stop: int, u: Tensor, use: Callable[[Tensor], object]) -> None:
        """Compute the gradients of data `start … stop`, cotangent by cotangent.

        Args:
            start, stop: Which data.
            u: `(b, *event, K)`, K cotangents for each of them.
            use: Called K times with gradients `(b, P)`, which it may keep.
        """

        def each(context: Any) -> None:
            rows = [self._rows(context, i, stop - start) for i in range(len(self.owners))]
            like = self.selection.tensors[0]
            parts = [
                like.new_zeros(stop - start, size) if row is None else row
                for row, size in zip(rows, self.selection.sizes, strict=True)
            ]
            full = torch.cat(parts, 1)
            use(full if self.entries is None else full[:, self.entries])

        with self.hooked(self.library.operations.OP_BATCH_GRADS) as context:
            f = self._forward(start, stop, context)
            if f.requires_grad and self._open(f, context):
                self._compare(context, f)
            self._propagate(context, f, u, each)

    def rows(self, start: int, stop: int, u: Tensor) -> Float[Tensor, "b R P"]:
        """Gradients of data `start … stop` for cotangents `(b, R, *event)`."""
        found: list[Tensor] = []
        self.visit(start, stop, u.movedim(1, -1), found.append)
        return torch.stack(found, 1)

    def squares(self, start: int, stop: int, u: Tensor) -> Tensor:
        """`Σ (uᵀ J)²` over data `start … stop` and K cotangents `(b, *event, K)`, `(P,)`."""
        names = self.library.operations
        apart = [(module, names.OP_BATCH_GRADS) for module in self._apart]
        sums: list[Tensor | None] = [None] * len(self.owners)

        def each(context: Any) -> None:
            for i, module in enumerate(self.modules):
                rows = self._rows(context, i, stop - start) if module in self._apart else None
                if rows is not None:
                    square = rows.square().sum(0)
                    before = sums[i]
                    sums[i] = square if before is None else before + square

        with self.hooked(names.OP_COV_DIAG, *apart) as context:
            f = self._forward(start, stop, context)
            settled = not self._apart or not self._open(f, context)
            self._propagate(context, f, u, each)
            for i, (owner, module) in enumerate(zip(self.owners, self.modules, strict=True)):
                if module not in self._apart:
                    sums[i] = (context.cov_diag(module) or {}).get(owner.role)
        if not settled:
            self.visit(start, stop, u[..., :0], lambda _: None)  # compares rows with autograd
        like = self.selection.tensors[0]
        parts = [
            like.new_zeros(size) if total is None else total.reshape(-1)
            for total, size in zip(sums, self.selection.sizes, strict=True)
        ]
        full = torch.cat(parts)
        return full if self.entries is None else full[self.entries]

    def factors(self, columns: Columns) -> list[tuple[Tensor | None, Tensor | None]]:
        """A, averaged over data and positions, and B, summed, of each parameter's layer; None where nothing reaches it.

        The bias of a layer that has one shares its factors.
        """
        names = self.library.operations
        with self.hooked(names.OP_COV_KRON, names.OP_SAVE_INPUTS) as context:
            f = self._forward(0, len(self.f), context)
            for piece in columns.chunks(COLUMNS):
                self._propagate(context, f, piece, lambda _: None, keep=True)
            found: list[tuple[Tensor | None, Tensor | None]] = []
            for module in self.modules:
                pair, inputs = context.cov_kron(module) or {}, context.in_data(module)
                A, B = pair.get("A"), pair.get("B")
                if A is not None:  # sums over rows, of convolutions averaged over positions
                    A = _symmetric(A) / (inputs[-1].shape[:-1].numel() if isinstance(module, nn.Linear) else len(f))
                found.append((A, None if B is None else _symmetric(B)))
        return found

    def positioned(self) -> list[str]:
        """Paths of the layers that see a datum at several positions, as far as rows tell."""
        return [owner.path for owner, module in zip(self.owners, self.modules, strict=True) if module in self._apart]

    def step(self, budget: int, *, diagonal: bool = False) -> int:
        """How many data at once keep their gradients within the budget."""
        sizes = [
            size
            for size, module in zip(self.selection.sizes, self.modules, strict=True)
            if not diagonal or module in self._apart
        ]
        return max(1, min(len(self.f), budget // max(1, 4 * sum(sizes) * self.f.element_size())))

    @contextmanager
    def hooked(self, *rules: Any) -> Iterator[Any]:
        """ASDL's hooks on the copy."""
        for module in self.modules:
            module._is_full_backward_hook = None  # the user's hooks are not on the copy, and ASDL's are of the old kind
        with self.outputs.network.differentiable(), quiet(), self.library.extend(self.outputs, *rules) as context:
            yield context

    def _forward(self, start: int, stop: int, context: Any = None) -> Tensor:
        """f of data `start … stop`, attached; under `context` each layer must have run once, and on these data."""
        f = self.outputs(take(self.x, start, stop, len(self.f)))
        if not close(f.detach().to(self.f.dtype), self.f[start:stop]):
            raise UnsupportedError(
                f"an example's outputs depend on the other examples, which {provenance()} takes apart; {self.way_out}"
            )
        for owner, module in zip(self.owners, self.modules, strict=True):
            inputs = [] if context is None else context.in_data(module) or []
            if [len(given) for given in inputs] not in ([], [stop - start]):
                raise UnsupportedLayerError(
                    f"module {module_text(owner.path, module)} ran on {' and '.join(str(len(t)) for t in inputs)} rows "
                    f"for {stop - start} data, and {provenance()} takes rows for data; {self.way_out}"
                )
        return f

    def _open(self, f: Tensor, context: Any) -> bool:
        """Whether operations and shapes leave open that layers' rows hold the data in order."""
        size = len(f)
        inputs = [given for module in self.modules for given in context.in_data(module) or []]
        return size > 1 and (example_strides(f) is None or any(size in given.shape[1:-1] for given in inputs))

    def _propagate(
        self, context: Any, f: Tensor, u: Tensor, each: Callable[[Any], object], *, keep: bool = False
    ) -> None:
        for k in range(u.shape[-1]):
            if f.requires_grad:
                pulled(f, self.outputs.selected, u[..., k], keep=keep or k + 1 < u.shape[-1])
            each(context)
            context.clear_batch_grads()

    def _rows(self, context: Any, i: int, size: int) -> Tensor | None:
        """`(size, entries)` of one parameter: positions of a datum are summed."""
        rows = (context.batch_grads(self.modules[i]) or {}).get(self.owners[i].role)
        return None if rows is None else rows.reshape(size, -1, self.selection.sizes[i]).sum(1)

    def _certify(self) -> None:
        """Compare with autograd on the first data, under irregular cotangents, weighted so that rows cannot swap."""
        size = min(len(self.f), _PROBE)
        x = take(self.x, 0, size, len(self.f))
        with self.outputs.network.differentiable():
            self._forward(0, size)
        require_only_uses(self.outputs, x, self.owners, provenance(), self.way_out)
        try:
            with self.hooked(self.library.operations.OP_BATCH_GRADS) as context:
                f = self._forward(0, size, context)
                if f.requires_grad:
                    self._compare(context, f)
        except CurvopsError:
            raise
        except Exception as error:  # Its rules run into shapes that they were not written for, in any way.
            raise UnsupportedError(
                f"{provenance()} fails on this model ({first_line(error)}); {self.way_out}"
            ) from error

    def _compare(self, context: Any, f: Tensor) -> None:
        """Compare with autograd under irregular cotangents, weighted so that rows cannot swap."""
        size, u = len(f), irregular(f, 0)
        weights = 1.0 + torch.arange(size, dtype=self.selection.dtype, device=f.device)
        pulled(f, self.outputs.selected, u, keep=True)
        rows = [self._rows(context, i, size) for i in range(len(self.owners))]
        counts = [self._count(context, i) for i in range(len(self.owners))]
        context.clear_batch_grads()
        weighted = u * weights.reshape(-1, *[1] * (u.dim() - 1))
        wanted = pulled(f, self.outputs.selected, weighted, keep=True)
        context.clear_batch_grads()
        largest = max((float(gradient.abs().max()) for gradient in wanted if gradient is not None), default=0.0)
        for owner, module, row, count, gradient in zip(self.owners, self.modules, rows, counts, wanted, strict=True):
            like = getattr(module, owner.role)
            gradient = torch.zeros_like(like) if gradient is None else gradient
            found = torch.zeros_like(like) if row is None else (weights @ row).reshape(like.shape)
            # A gradient may vanish but for rounding, as that of a bias in front of a normalisation does.
            tolerance = _TOLERANCES[self.selection.dtype] * max(float(gradient.abs().max()), 0.01 * largest)
            if not bool(((found - gradient).abs() <= tolerance).all()):
                raise UnsupportedLayerError(
                    f"{provenance()} departs from autograd at parameter {owner.name!r} of "
                    f"{module_text(owner.path, module)} (for normalisations: a weight of zero, positions, or a layer "
                    "behind it that works in place; for all layers: examples that the forward puts in another order); "
                    f"{self.way_out}"
                )
            if count != size or isinstance(module, nn.Conv2d):
                self._apart.add(module)

    def _count(self, context: Any, i: int) -> int:
        rows = (context.batch_grads(self.modules[i]) or {}).get(self.owners[i].role)
        return 0 if rows is None else len(rows)


def pulled(f: Tensor, tensors: list[nn.Parameter], u: Tensor, *, keep: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `⟨u, f⟩`; the hooks on the way see those of the layers' outputs."""
    return torch.autograd.grad(f, tensors, u.to(f.dtype).contiguous(), retain_graph=keep, allow_unused=True)


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.T) / 2
