"""Which layer owns each selected parameter, and proof that the layer's calls are all there is to it.

Libraries that factorise layer by layer see a parameter only through hooks on its module. What they would lose in
silence is refused here by name: parameters outside the layers they know, tied ones, modules called twice, uses beside
the module, layers whose rows are not the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.objective import Objective
from curvops.errors import UnsupportedError, UnsupportedLayerError
from curvops.nets import draws
from curvops.nets.categorical import Categorical
from curvops.nets.jacobians import close
from curvops.nets.parameters import ParameterSelection, unwrap
from curvops.operators.formula import size_text


@dataclass(frozen=True)
class Owner:
    """The layer of one selected parameter.

    Attributes:
        name: The parameter's name in the user's model.
        path: The module's path there.
        role: "weight" or "bias".
    """

    name: str
    path: str
    role: str


def owners(
    model: nn.Module,
    selection: ParameterSelection,
    kinds: tuple[type[nn.Module], ...],
    library: str,
    way_out: str,
    what: str = "Kronecker factors",
) -> list[Owner]:
    """The owner of each selected parameter, in the selection's order.

    Args:
        model: The user's module.
        selection: The parameters that count.
        kinds: Layers that the library factorises.
        library: Its name, for the message.
        way_out: What to use instead.
        what: What the library computes of these layers.

    Raises:
        UnsupportedLayerError: A parameter of another layer, or registered at two places.
    """
    found: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, module in unwrap(model).named_modules():
        for role, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((path, role, module))
    result = []
    for name, p in zip(selection.names, selection.tensors, strict=True):
        places = found[id(p)]
        if len(places) > 1:
            where = " and ".join(f"{path}.{role}".lstrip(".") for path, role, _ in places)
            raise UnsupportedLayerError(
                f"parameter {name!r} is tied ({where}), and {library} keeps the {what} of one place only; {way_out}"
            )
        ((path, role, module),) = places
        if not isinstance(module, kinds) or role not in ("weight", "bias"):
            known = ", ".join(kind.__name__ for kind in kinds)
            raise UnsupportedLayerError(
                f"parameter {name!r} belongs to {module_text(path, module)}, and {library} has {what} for {known} "
                f"only; {way_out}"
            )
        result.append(Owner(name, path, role))
    return result


def require_only_uses(outputs: Outputs, x: Any, found: list[Owner], library: str, way_out: str) -> None:
    """Refuse parameters whose gradient is not that of one call of their module, and calls whose rows are not the data.

    Args:
        outputs: The copy of the model; hooks are set on it and removed.
        x: Inputs of one batch.
        found: The owners of the selected parameters, in their order.
        library, way_out: As in `owners`.

    Raises:
        UnsupportedLayerError: A module runs more than once, a parameter is used beside its module, or the rows of a
            module's output mix or reorder the data.

    Cost: one forward and two backwards, and those of the layers once more.
    """
    inputs: dict[str, list[Tensor]] = {owner.path: [] for owner in found}
    gradients: dict[str, Tensor] = {}
    handles = [
        outputs.module.get_submodule(path).register_forward_hook(_note(path, inputs, gradients)) for path in inputs
    ]
    try:
        with outputs.network.differentiable():
            f = outputs(x)
            if not f.requires_grad:
                return
            # Irregular cotangents, so that no sum over data, positions or outputs cancels.
            u = irregular(f, 0)
            grads = torch.autograd.grad(f, outputs.selected, u, allow_unused=True, retain_graph=True)
            for owner, gradient in zip(found, grads, strict=True):
                layer = outputs.module.get_submodule(owner.path)
                _require_only_use(
                    owner, layer, inputs[owner.path], gradients.get(owner.path), gradient, library, way_out
                )
            before = dict(gradients)
            weights = 1.5 + irregular(f[:, 0, 0] if f.dim() == 3 else f[:, 0], 1).tanh()
            torch.autograd.grad(f, outputs.selected, u * _per_row(weights, u), allow_unused=True)
            for owner in found:
                layer = outputs.module.get_submodule(owner.path)
                _require_rows(
                    owner, layer, before.get(owner.path), gradients.get(owner.path), weights, library, way_out
                )
    finally:
        for handle in handles:
            handle.remove()


def error_of_rows(
    rows: Tensor, f: Tensor, outputs: Outputs, selection: ParameterSelection, cotangents: Tensor | None
) -> str | None:
    """Compare rows `uᵀ J_n` that a library computed with autograd: ⟨W, J⟩ = ∇⟨Wᵀu, f⟩ for irregular weights W.

    Args:
        rows: `(B, R, P)`.
        f: Outputs of the copy, attached to their graph.
        outputs: The copy.
        selection: The parameters that count.
        cotangents: u `(B, R, *event)`, or None for the unit vectors.

    Returns:
        What is wrong, or None. Wrong rows pass for a set of weights of measure zero.

    Cost: one backward.
    """
    W = irregular(rows[..., 0], 2)
    u = W if cotangents is None else torch.einsum("br,br...->b...", W, cotangents)
    grads = torch.autograd.grad(f, outputs.selected, u.reshape(f.shape), retain_graph=True, allow_unused=True)
    expected = selection.join_rows(list(grads), 1)[0]
    found = torch.einsum("br,brp->p", W, rows)
    if close(found, expected):
        return None
    distance = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(f.dtype).tiny))
    return f"departs from autograd by {distance:.1e} in the rows of the Jacobian"


def refuse_ignored_targets(objective: Objective, library: str, way_out: str) -> None:
    """Refuse ignored targets, where a library would count their data's inputs all the same.

    Raises:
        UnsupportedError: Some target is the likelihood's `ignore_index`.
    """
    likelihood = objective.likelihood
    targets = dict(objective.source.tensors())["y"]
    if isinstance(likelihood, Categorical) and bool((targets == likelihood.ignore_index).any()):
        raise UnsupportedError(
            f"some targets are ignored, and {library} would count their inputs all the same; {way_out}"
        )


def blocks_label(found: list[Owner], shapes: Sequence[torch.Size]) -> str:
    """The blocks `B ⊗ A` and `B` in one line, from shapes alone."""
    parts = [
        f"Kronecker({size_text([shape[0], shape[1:].numel()])})" if owner.role == "weight" else f"Dense({shape[0]})"
        for owner, shape in zip(found, shapes, strict=True)
    ]
    return f"{len(parts)}: {', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''}"


def module_text(path: str, module: nn.Module) -> str:
    """Path and type of a module, for messages."""
    return f"{path or '(the model itself)'!r} ({type(module).__name__})"


def irregular(like: Tensor, sample: int) -> Tensor:
    """Fixed numbers without a pattern, of a tensor's shape: no sum of them cancels by chance."""
    position = torch.zeros(1, dtype=torch.int64, device="cpu")
    numbers = draws.gaussians(0, position, sample, like.numel(), device=like.device)
    return numbers.reshape(like.shape).to(like.dtype)


def _per_row(weights: Tensor, like: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (like.dim() - 1))


def _note(path: str, inputs: dict[str, list[Tensor]], gradients: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[path].append(given[0].detach())
        if output.requires_grad:
            output.register_hook(lambda g: gradients.__setitem__(path, g.detach()))

    return hook


def _require_only_use(
    owner: Owner,
    layer: nn.Module,
    inputs: list[Tensor],
    output_gradient: Tensor | None,
    gradient: Tensor | None,
    library: str,
    way_out: str,
) -> None:
    module = module_text(owner.path, layer)
    if len(inputs) > 1:
        raise UnsupportedLayerError(
            f"module {module} runs {len(inputs)} times in one forward, and {library} would miscount it; {way_out}"
        )
    if gradient is None:  # the output does not depend on it: no curvature, and none is what the library finds
        return
    expected = torch.zeros_like(gradient)
    if inputs and output_gradient is not None:
        local = type(layer).forward(layer, inputs[0])
        (expected,) = torch.autograd.grad(local, getattr(layer, owner.role), output_gradient)
    if not close(expected, gradient):
        raise UnsupportedLayerError(
            f"parameter {owner.name!r} is used beside the calls of its module {module}, and {library} would not see "
            f"that; {way_out}"
        )


def _require_rows(
    owner: Owner,
    layer: nn.Module,
    gradient: Tensor | None,
    weighted: Tensor | None,
    weights: Tensor,
    library: str,
    way_out: str,
) -> None:
    if gradient is None or weighted is None:
        return
    if len(gradient) == len(weights) and close(gradient * _per_row(weights, gradient), weighted):
        return
    raise UnsupportedLayerError(
        f"module {module_text(owner.path, layer)} sees {len(gradient)} rows that are not the batch's {len(weights)} "
        f"data, one each and in order, and {library} takes rows for data; {way_out}, or keep the batch first in every "
        "layer"
    )
