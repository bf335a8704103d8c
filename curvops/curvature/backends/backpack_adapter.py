"""BackPACK: its passes over the layers of a copy of the model; every quirk of it in here.

What it gets wrong in silence or cannot do, and what happens here instead (checked on 1.7.1):

* It leaves hooks and attributes on the model, and a global list of them: it only gets to see a copy, and its globals
  are put back. Modules that work in place break its hooks: the copy's do not.
* Its losses know neither class weights nor ignored targets, and draw from the global generator. What is propagated here
  is the root of Λ of our likelihoods (or our draws, those of `co.MCFisher`), by a loss module of our own, so that no
  global random state is read or changed.
* It follows derivatives from module to module by the addresses of their outputs; functional code and residual sums lose
  or mix them, mostly with an unrelated error. At every module that it passes, what it carries is compared with
  autograd's gradient of the same pass, and what does not agree is refused by name.
* Tied parameters and modules that run twice overwrite each other's results, layers whose rows are not the data are
  squared wrongly, `padding="same"` and padding modes are ignored: refused by name, before.
* Its factors of convolutions add A over the positions, whose gradients B has summed already: too large by the number of
  positions. The factors here are made of its unfolded inputs and its propagated roots by the rule of `co.KFAC`, which
  also covers layers on sequences, that it refuses.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.foreign import ForeignProduct, Multiply, first_line, named_version, plain, quiet
from curvops.curvature.backends.layers import (
    Owner,
    error_of_rows,
    module_text,
    owners,
    refuse_ignored_targets,
    require_only_uses,
)
from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.objective import Objective
from curvops.errors import CurvopsError, UnsupportedError, UnsupportedLayerError
from curvops.memory import columns_within
from curvops.nets import draws
from curvops.nets.batches import Batch
from curvops.nets.forward import Inputs
from curvops.nets.jacobians import close
from curvops.nets.parameters import ParameterSelection, unwrap

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FACTORISED = (nn.Linear, *CONVOLUTIONS)
LAYERS = (
    nn.Linear,
    *CONVOLUTIONS,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Embedding,
)
"""Layers whose parameters it knows, and whose results the tests compare with oracles."""

NATIVE_ROWS = "use GGNInterface, EFInterface or functorch_jacobians()"
NATIVE_DIAGONAL = "use diag() of GGNInterface or EFInterface, or full(), which has no such limits"
NATIVE_KRON = "use kron() of GGNInterface or EFInterface, or co.KFAC"

_WANTED = ((1, 7), (2, 0))
_turn = threading.RLock()
"""Its active extensions are global."""


def provenance() -> str:
    """`backpack 1.7.1`, without importing it.

    Raises:
        UnsupportedError: A version that the adapter does not know.
    """
    name = named_version("backpack", "backpack-for-pytorch")
    found = tuple(int(part) for part in name.split()[1].split(".")[:2] if part.isdigit())
    if not _WANTED[0] <= found < _WANTED[1]:
        raise UnsupportedError(
            f"{name} is installed, and its adapter knows 1.7 and later versions of 1; run: "
            "pip install 'backpack-for-pytorch>=1.7,<2', or use the native GGNInterface, EFInterface"
        )
    return name


@lru_cache(maxsize=1)
def library() -> SimpleNamespace:
    """Its parts, imported at first need, and ours that derive from them."""
    with quiet():
        core = importlib.import_module("backpack")
        context = importlib.import_module("backpack.context")
        extensions = importlib.import_module("backpack.extensions")
        module_extension = importlib.import_module("backpack.extensions.module_extension")
        products = importlib.import_module("backpack.hessianfree.ggnvp")
        hbp = importlib.import_module("backpack.extensions.secondorder.hbp")
        conv = importlib.import_module("backpack.utils.conv")

    class Root(module_extension.ModuleExtension):  # type: ignore[misc, name-defined]
        """Starts the propagation with given columns."""

        def backpropagate(self, ext: Any, module: Any, g_inp: Any, g_out: Any, bpQuantities: Any) -> Tensor:
            return module.columns

    class LinearFactors(hbp.linear.HBPLinear):  # type: ignore[misc, name-defined]
        def weight(self, ext: Any, module: Any, g_inp: Any, g_out: Any, backproped: Tensor) -> Any:
            g = backproped.flatten(2, -2) if backproped.dim() > 3 else backproped.unsqueeze(2)
            a = module.input0.flatten(1, -2) if module.input0.dim() > 2 else module.input0.unsqueeze(1)
            return _factors(a, g, ext.approx)

        def bias(self, ext: Any, module: Any, g_inp: Any, g_out: Any, backproped: Tensor) -> Any:
            return self.weight(ext, module, g_inp, g_out, backproped)[:1]

    def convolution(dimensions: int) -> Any:
        class ConvolutionFactors(getattr(hbp, f"conv{dimensions}d").__dict__[f"HBPConv{dimensions}d"]):  # type: ignore[misc]
            def weight(self, ext: Any, module: Any, g_inp: Any, g_out: Any, backproped: Tensor) -> Any:
                unfolded = conv.unfold_input(module, module.input0)
                return _factors(unfolded.transpose(1, 2), backproped.flatten(3).transpose(2, 3), ext.approx)

            def bias(self, ext: Any, module: Any, g_inp: Any, g_out: Any, backproped: Tensor) -> Any:
                return self.weight(ext, module, g_inp, g_out, backproped)[:1]

        return ConvolutionFactors()

    factors = {nn.Linear: LinearFactors(), **{kind: convolution(n + 1) for n, kind in enumerate(CONVOLUTIONS)}}
    return SimpleNamespace(
        run=core.backpack, extend=core.extend, cleanup=core.memory_cleanup, context=context.CTX, root=Root(),
        factors=factors, BatchGrad=extensions.BatchGrad, SumGradSquared=extensions.SumGradSquared,
        DiagGGN=_followed(extensions.DiagGGNExact), KFLR=_followed(extensions.KFLR),
        product=products.ggn_vector_product_from_plist,
    )  # fmt: skip


def _factors(a: Tensor, g: Tensor, approx: str) -> list[Tensor]:
    """B and A of one layer, from inputs a `(N, T, I)` and propagated columns g `(V, N, T, O)`; see `KFAC`."""
    if approx == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    a = a.flatten(0, 1)
    return [torch.einsum("vnto,vntp->op", g, g), a.T @ a / max(len(a), 1)]


# -------------------------------------------------------------------- products


class BackPackProduct(ForeignProduct):
    """A curvature `Σ Jᵀ Λ J` over one batch by BackPACK's `hessianfree` products, column by column on one graph."""

    def _library(self) -> str:
        return provenance()

    def _connect(self, outputs: Outputs, batch: Batch, f: Tensor) -> Multiply:
        product = library().product
        output = outputs(plain(batch.x))
        loss = self._loss(batch, f)(output, batch.y)
        shapes, sizes = self.objective.selection.shapes, list(self.objective.selection.sizes)

        def multiply(V: Tensor) -> Tensor:
            columns = []
            for v in V.unbind(1):
                pieces = [piece.reshape(shape) for piece, shape in zip(v.split(sizes), shapes, strict=True)]
                result = product(loss, output, outputs.selected, pieces)
                columns.append(torch.cat([piece.reshape(-1) for piece in result]))
            return torch.stack(columns, 1) if columns else V

        return multiply


# -------------------------------------------------------------------- rows of Jacobians


def fill_rows(
    model: nn.Module, selection: ParameterSelection, x: Inputs, f: Tensor, cotangents: Tensor | None, result: Tensor
) -> Tensor:
    """Rows `uᵀ J_n` of every example by `BatchGrad`, one backward for each of the R cotangents.

    Args:
        model: The user's module.
        selection: The parameters that count.
        x: Inputs of one batch.
        f: Outputs there.
        cotangents: `(B, R, *event)`, or None for all unit vectors of an example's outputs.
        result: Where the rows go, `(B, R, P)`.

    Raises:
        UnsupportedLayerError: A layer that BackPACK does not know or gets wrong; named.
    """
    by = provenance()
    found = _owners(model, selection, LAYERS, "per-example gradients", NATIVE_ROWS)
    outputs = _copy(model, selection)
    x = plain(x)
    with _extended(outputs, [outputs.module.get_submodule(owner.path) for owner in found], NATIVE_ROWS):
        f_copy = _same_outputs(outputs, x, f)
        if not f_copy.requires_grad:
            return result.zero_()
        wrong = None
        for r in range(result.shape[1]):
            u = _unit(f, r) if cotangents is None else cotangents[:, r].reshape(f.shape)
            with library().run(library().BatchGrad(), retain_graph=True):
                torch.autograd.grad(f_copy, outputs.selected, u, retain_graph=True, allow_unused=True)
            pieces = [_taken(p, "grad_batch") for p in outputs.selected]
            sizes = {len(piece) for piece in pieces if piece is not None}
            if sizes - {len(f)}:
                wrong = f"has gradients of {max(sizes)} examples for {len(f)}"
                break
            result[:, r] = selection.join_rows(pieces, len(f))
        wrong = wrong or error_of_rows(result, f_copy, outputs, selection, cotangents)
    if wrong is not None:
        require_only_uses(Outputs(model, selection), x, found, by, NATIVE_ROWS)
        raise UnsupportedLayerError(f"{by} {wrong} of {type(model).__name__}; {NATIVE_ROWS}")
    return result


def _unit(f: Tensor, r: int) -> Tensor:
    u = torch.zeros_like(f)
    u.flatten(1)[:, r] = 1.0
    return u


# -------------------------------------------------------------------- diagonals and factors


class LayerRun:
    """BackPACK's passes over the layers of one batch.

    Args:
        objective: The negative log-likelihood of one batch.
        cotangents: The columns that are propagated.
        kron: Whether Kronecker factors are wanted, not a diagonal.

    Raises:
        UnsupportedLayerError: A parameter of a layer that BackPACK does not know or gets wrong; named.
    """

    def __init__(self, objective: Objective, cotangents: Cotangents, *, kron: bool = False) -> None:
        self.objective, self.cotangents = objective, cotangents
        self.by, self.way_out = provenance(), NATIVE_KRON if kron else NATIVE_DIAGONAL
        kinds, what = (FACTORISED, "Kronecker factors") if kron else (LAYERS, "diagonals")
        self.owners = _owners(objective.model, objective.selection, kinds, what, self.way_out)
        if kron:
            refuse_ignored_targets(objective, self.by, self.way_out)
            for owner in self.owners:
                layer: Any = objective.network.module.get_submodule(owner.path)
                if getattr(layer, "groups", 1) > 1:
                    raise UnsupportedLayerError(
                        f"module {module_text(owner.path, layer)} has groups={layer.groups}, of which {self.by} has no "
                        f"factors; {self.way_out}"
                    )

    def diagonal(self) -> Tensor:
        """`Σ_kn (Jᵀ u_kn)²`, `(P,)`. Cost: one forward and R backward passes; those of `require_only_uses`."""
        first_order = self.cotangents.fisher == "empirical"
        kind = library().SumGradSquared if first_order else library().DiagGGN
        selection = self.objective.selection
        totals = [torch.zeros(size, dtype=selection.dtype, device=selection.device) for size in selection.sizes]
        for values in self._passes(kind, first_order):
            for total, value in zip(totals, values, strict=True):
                if value is not None:
                    total += value.reshape(-1)
        return selection.gather(torch.cat(totals))

    def factors(self, approx: str) -> list[tuple[Tensor | None, Tensor | None]]:
        """B (sum) and A (mean; None of biases) of every parameter; None where the outputs do not depend on it."""
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.owners)
        for values in self._passes(library().KFLR, False, approx):
            for i, value in enumerate(values):
                if value is not None:
                    before = found[i][0]
                    B = value[0] if before is None else before + value[0]
                    found[i] = B, (value[1] if len(value) > 1 else None)
        return found

    def _passes(self, kind: Any, first_order: bool, approx: str = "expand") -> Iterator[list[Any]]:
        """What an extension leaves on each parameter, for one chunk of columns after the other."""
        objective = self.objective
        objective.watch.check()
        ((batch, f),) = objective.evaluate()
        x = plain(batch.x)
        require_only_uses(Outputs(objective.model, objective.selection), x, self.owners, self.by, self.way_out)
        with torch.no_grad():
            columns = self.cotangents.of(objective.needed_likelihood(), f, batch)
        outputs, root = _copy(objective.model, objective.selection), _Columns()
        paths = {id(m): path for path, m in outputs.module.named_modules() if not any(m.children())}
        leaves = [m for m in outputs.module.modules() if id(m) in paths]
        touched = [outputs.module.get_submodule(o.path) for o in self.owners] if first_order else [*leaves, root]
        with _extended(outputs, touched, self.way_out):
            f_copy = _same_outputs(outputs, x, f)
            if not f_copy.requires_grad:
                return
            for S in columns.chunks(1 if first_order else self._step(leaves, columns.count)):
                root.set(S)
                extension = kind() if first_order else _extension(kind, paths, root, approx, self.by, self.way_out)
                with library().run(extension, retain_graph=True):
                    torch.autograd.grad(root(f_copy), outputs.selected, retain_graph=True, allow_unused=True)
                yield [_taken(p, extension.savefield) for p in outputs.selected]

    def _step(self, leaves: Iterable[Any], count: int) -> int:
        """Columns whose transients fit into a quarter of the budget."""
        ran: list[Any] = [m for m in leaves if isinstance(getattr(m, "output", None), Tensor)]
        sizes = [m.output.numel() for m in ran]
        weights = [m.output.shape[0] * m.weight.numel() for m in ran if type(m) in CONVOLUTIONS]
        per_column = (4 * sum(sizes) + max(weights, default=0)) * self.objective.selection.dtype.itemsize
        return columns_within(self.objective.budget() // 4, self.objective.selection.device, max(per_column, 1), count)


class _Columns(nn.modules.loss._Loss):
    """⟨Σ_v w_v S_v, f⟩ for the columns S `(V, *f.shape)` and irregular weights w: its pass carries all columns, and
    autograd one combination of them."""

    def set(self, S: Tensor) -> None:
        """Columns `(*f.shape, V)`; a single one has the weight 1."""
        self.columns = S.movedim(-1, 0).contiguous()
        if len(self.columns) == 1:
            self.weights = S.new_ones(1)
            return
        position = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.weights = draws.gaussians(0, position, 3, len(self.columns), device=S.device)[0].to(S.dtype)

    def combined(self, carried: Tensor) -> Tensor:
        """`Σ_v w_v carried_v`."""
        return torch.einsum("v,v...->...", self.weights, carried)

    def forward(self, f: Tensor) -> Tensor:
        return (f * self.combined(self.columns)).sum()


def _followed(kind: Any) -> Any:
    """An extension that compares what it carries with autograd's gradient, at every module that it comes to."""

    class Followed(kind):
        paths: dict[int, str]
        approx: str
        columns: _Columns
        words: tuple[str, str]

        def __call__(self, module: Any, g_inp: Any, g_out: Any) -> None:
            if module is not self.columns and g_out[0] is not None:
                self._compare(module, g_out[0])
            try:
                super().__call__(module, g_inp, g_out)
            except CurvopsError:
                raise
            except Exception as error:
                unknown = "does not have an extension" in str(error)
                raise self._refusal(
                    module, "has no rule for" if unknown else f"fails ({first_line(error)}) at"
                ) from error

        def _compare(self, module: Any, gradient: Tensor) -> None:
            key = module.output.data_ptr()
            carried = self.saved_quantities.retrieve_quantity(key, False)
            shape = (len(self.columns.columns), *module.output.shape)
            if carried is None or carried.numel() != torch.Size(shape).numel():
                raise self._refusal(module, "loses the derivative on its way, through code that is no module, to")
            if carried.shape != shape:  # a view between two modules, which the comparison judges
                carried = self.saved_quantities.retrieve_quantity(key, True).reshape(shape)
                self.saved_quantities.save_quantity(key, carried, self.accumulate_backpropagated_quantities)
            if not close(self.columns.combined(carried), gradient):
                raise self._refusal(
                    module, "carries a wrong derivative to: it also goes another way, as in a residual sum,"
                )

        def _refusal(self, module: Any, what: str) -> UnsupportedLayerError:
            by, way_out = self.words
            where = module_text(self.paths.get(id(module), "?"), module)
            return UnsupportedLayerError(f"{by} {what} module {where}; {way_out}")

    return Followed


def _extension(kind: Any, paths: dict[int, str], root: _Columns, approx: str, by: str, way_out: str) -> Any:
    extension = kind()
    extension.set_module_extension(_Columns, library().root)
    extension.paths, extension.columns, extension.approx = paths, root, approx
    extension.words = by, way_out
    if hasattr(extension, "get_ea_strategy"):
        for layer, factors in library().factors.items():
            extension.set_module_extension(layer, factors, overwrite=True)
    return extension


# -------------------------------------------------------------------- the copy, and what is refused


def _owners(
    model: nn.Module, selection: ParameterSelection, kinds: tuple[type[nn.Module], ...], what: str, way_out: str
) -> list[Owner]:
    """The layers of the selected parameters, each of a kind and with settings that BackPACK gets right."""
    by = provenance()
    found = owners(model, selection, kinds, by, way_out, what)
    modules = dict(unwrap(model).named_modules())
    for owner in found:
        layer = modules[owner.path]
        complaint = _complaint(layer, kinds)
        if complaint is not None:
            raise UnsupportedLayerError(f"module {module_text(owner.path, layer)} {complaint} ({by}); {way_out}")
    return found


def _complaint(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Which settings BackPACK ignores or gets wrong."""
    if type(layer) not in kinds:
        return "is a subclass, whose own forward it would not know of"
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.padding_mode != "zeros":
            return f"has padding_mode={layer.padding_mode!r}, which it takes for zeros"
        if isinstance(layer.padding, str):
            return f"has padding={layer.padding!r}, which it does not unfold"
        if any(layer.output_padding):
            return f"has output_padding={layer.output_padding}, which it does not unfold"
    if isinstance(layer, nn.Embedding):
        if layer.padding_idx is not None:
            return "has a padding_idx, whose row it would let count"
        if layer.weight.dtype != torch.get_default_dtype():
            return f"has dtype {layer.weight.dtype}, and it makes its lookups in {torch.get_default_dtype()}"
    return None


def _copy(model: nn.Module, selection: ParameterSelection) -> Outputs:
    """The copy, without traces of an `extend` by the user, and without work in place, which breaks backward hooks."""
    outputs = Outputs(model, selection)
    for module in outputs.module.modules():
        vars(module).pop("_backpack_extend", None)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return outputs


@contextmanager
def _extended(outputs: Outputs, modules: Iterable[nn.Module], way_out: str) -> Iterator[None]:
    """BackPACK's hooks on some modules of the copy, one run at a time; its globals are put back.

    Raises:
        UnsupportedLayerError: BackPACK fails.
    """
    context = library().context
    with _turn, outputs.network.differentiable(), quiet(), _random_state_kept():
        before, context.hook_handles = context.hook_handles, []
        modules = list(modules)
        try:
            for module in modules:
                library().extend(module)
            yield
        except (CurvopsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedLayerError(
                f"{provenance()} fails on {type(outputs.module).__name__} ({first_line(error)}); {way_out}"
            ) from error
        finally:
            context.remove_hooks()
            context.hook_handles = before
            for module in modules:
                library().cleanup(module)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Its rule for average pooling builds a convolution, whose initial weights it draws only to overwrite them."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _same_outputs(outputs: Outputs, x: Any, f: Tensor) -> Tensor:
    """The copy's outputs with their graph, which are the model's."""
    f_copy = outputs(x)
    if not close(f_copy.detach(), f):
        raise UnsupportedError(
            f"the copy of {type(outputs.module).__name__} that {provenance()} works on has other outputs than the "
            "model (does code around a module rely on its working in place?); use the native GGNInterface, EFInterface"
        )
    return f_copy


def _taken(p: nn.Parameter, name: str) -> Any:
    """What BackPACK left on a parameter of the copy, removed; None where it left nothing."""
    return vars(p).pop(name, None)
