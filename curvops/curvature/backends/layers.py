"""Which layer owns each selected parameter, and proof that the layer's calls are all there is to it.

Libraries that factorise layer by layer see a parameter only through hooks on its module. What they would lose in
silence is refused here by name: parameters outside the layers they know, tied ones, modules called twice, uses beside
the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.sandbox import Outputs
from curvops.errors import UnsupportedLayerError
from curvops.nets import draws
from curvops.nets.jacobians import close
from curvops.nets.parameters import ParameterSelection, unwrap


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
    model: nn.Module, selection: ParameterSelection, kinds: tuple[type[nn.Module], ...], library: str, way_out: str
) -> list[Owner]:
    """The owner of each selected parameter, in the selection's order.

    Args:
        model: The user's module.
        selection: The parameters that count.
        kinds: Layers that the library factorises.
        library: Its name, for the message.
        way_out: What to use instead.

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
                f"parameter {name!r} is tied ({where}), and {library} keeps the factors of one place only; {way_out}"
            )
        ((path, role, module),) = places
        if not isinstance(module, kinds) or role not in ("weight", "bias"):
            known = ", ".join(kind.__name__ for kind in kinds)
            raise UnsupportedLayerError(
                f"parameter {name!r} belongs to {path or '(the model itself)'!r} ({type(module).__name__}), and "
                f"{library} has Kronecker factors for {known} only; {way_out}"
            )
        result.append(Owner(name, path, role))
    return result


def require_only_uses(outputs: Outputs, x: Any, found: list[Owner], library: str, way_out: str) -> None:
    """Refuse parameters whose gradient is not that of one call of their module.

    Args:
        outputs: The copy of the model; hooks are set on it and removed.
        x: Inputs of one batch.
        found: The owners of the selected parameters, in their order.
        library, way_out: As in `owners`.

    Raises:
        UnsupportedLayerError: A module runs more than once, or a parameter is used beside its module.

    Cost: one forward and one backward, and those of the layers once more.
    """
    inputs: dict[str, list[Tensor]] = {owner.path: [] for owner in found}
    gradients: dict[str, Tensor] = {}
    handles = [
        outputs.module.get_submodule(path).register_forward_hook(_note(path, inputs, gradients)) for path in inputs
    ]
    try:
        with outputs.network.differentiable():
            f = outputs(x)
            # Irregular cotangents, so that no sum over data, positions or outputs cancels.
            u = draws.gaussians(0, torch.zeros(1, dtype=torch.int64, device=f.device), 0, f.numel())
            grads = torch.autograd.grad(f, outputs.selected, u.reshape(f.shape).to(f.dtype), allow_unused=True)
            for owner, gradient in zip(found, grads, strict=True):
                layer = outputs.module.get_submodule(owner.path)
                _require_only_use(
                    owner, layer, inputs[owner.path], gradients.get(owner.path), gradient, library, way_out
                )
    finally:
        for handle in handles:
            handle.remove()


def _note(path: str, inputs: dict[str, list[Tensor]], gradients: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[path].append(given[0].detach())
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
    kind = type(layer).__name__
    if len(inputs) > 1:
        raise UnsupportedLayerError(
            f"module {owner.path!r} ({kind}) runs {len(inputs)} times in one forward, and {library} would count its "
            f"factors {len(inputs)} times over; {way_out}"
        )
    if gradient is None:  # the output does not depend on it: no curvature, and none is what the library finds
        return
    expected = torch.zeros_like(gradient)
    if inputs and output_gradient is not None:
        local = type(layer).forward(layer, inputs[0])
        (expected,) = torch.autograd.grad(local, getattr(layer, owner.role), output_gradient)
    if not close(expected, gradient):
        raise UnsupportedLayerError(
            f"parameter {owner.name!r} is used beside the calls of its module {owner.path!r} ({kind}), and {library} "
            f"would not see that; {way_out}"
        )
