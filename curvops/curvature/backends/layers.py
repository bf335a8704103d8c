"""Which layer owns each selected parameter, and proof that the layer's calls are all there is to it.

Libraries that factorise layer by layer see a parameter only through hooks on its module. What they would lose in
silence is refused here by name: parameters outside the layers they know, tied ones, modules called twice, uses beside
the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import UnsupportedLayerError
from curvops.nets.jacobians import close
from curvops.nets.parameters import ParameterSelection, unwrap


@dataclass
class Owner:
    """The layer of one selected parameter, and what went through it in one forward and backward.

    Attributes:
        name: The parameter's name in the user's model.
        path: The module's path there.
        role: "weight" or "bias".
        inputs: What each call was given.
        gradients: Loss gradients at each call's output, in the order in which backward passes met them.
    """

    name: str
    path: str
    role: str
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def forget(self) -> None:
        """Drop what was noted."""
        self.inputs.clear()
        self.gradients.clear()


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


@contextmanager
def witnessed(module: nn.Module, found: list[Owner]) -> Iterator[None]:
    """Note inputs and first output gradients of every owner's calls, by hooks on a private copy of the model."""
    handles: list[Any] = []

    def note(owner: Owner) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            owner.inputs.append(inputs[0].detach())
            output.register_hook(lambda g: owner.gradients.append(g.detach()) if not owner.gradients else None)

        return hook

    for owner in found:
        handles.append(module.get_submodule(owner.path).register_forward_hook(note(owner)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_only_use(module: nn.Module, owner: Owner, gradient: Tensor | None, library: str, way_out: str) -> None:
    """Refuse a parameter whose gradient is not that of one call of its module.

    Args:
        module: The copy of the model that `witnessed` watched.
        owner: What was noted.
        gradient: The parameter's own gradient in the first backward pass; None where the output does not use it.
        library: As in `owners`.
        way_out: As in `owners`.

    Raises:
        UnsupportedLayerError: The module ran more than once, or the parameter is used beside it.
    """
    layer = module.get_submodule(owner.path)
    calls = len(owner.inputs)
    if calls > 1:
        raise UnsupportedLayerError(
            f"module {owner.path!r} ({type(layer).__name__}) runs {calls} times in one forward, and {library} would "
            f"count its factors {calls} times over; {way_out}"
        )
    if gradient is None:
        return
    expected = torch.zeros_like(gradient)
    if calls and owner.gradients:
        parameter = getattr(layer, owner.role)
        with torch.enable_grad():
            local = type(layer).forward(layer, owner.inputs[0])
        (expected,) = torch.autograd.grad(local, parameter, owner.gradients[0])
    if not close(expected, gradient):
        raise UnsupportedLayerError(
            f"parameter {owner.name!r} is used beside the calls of its module {owner.path!r} "
            f"({type(layer).__name__}), and {library} would not see that; {way_out}"
        )
