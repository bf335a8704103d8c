"""Networks in which the examples of a batch depend on each other: found out, and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from curvops.errors import UnsupportedError
from curvops.nets.forward import Inputs, Network, take
from curvops.nets.jacobians import close

_Seen = list[tuple[str, list[Tensor], list[Tensor]]]
"""For each call, in the order in which calls end: path of the module, tensors in, tensors out."""


class DependentExamplesError(UnsupportedError):
    """An example's outputs depend on the other examples of its batch."""


def require_independent(network: Network, x: Inputs, size: int, few: Tensor, of_whole: Tensor, start: int = 0) -> None:
    """Raise unless a few examples have the same outputs in less company as in the whole batch.

    Args:
        network, x, size: The network and the batch, to name the module that mixes; up to two forwards, on failure only.
        few: Outputs of some examples, without the others.
        of_whole: Outputs of the same examples among all.
        start: Where in the batch they begin.

    Raises:
        DependentExamplesError: They differ.
    """
    if close(few, of_whole):
        return
    found = _mixing_module(network, x, size, start, start + len(few))
    where = "the model" if found is None else found
    raise DependentExamplesError(
        f"an example's outputs depend on the other examples of its batch (the same example alone gives other outputs): "
        f"{where} mixes them, so that per-example derivatives do not exist. Look there for statistics over the batch "
        "axis, or take the matrix-free operators (GGN, Hessian), which differentiate the batch as a whole"
    )


def _mixing_module(network: Network, x: Inputs, size: int, start: int, stop: int) -> str | None:
    """The innermost module that makes different outputs of the same inputs, for a few examples and among all of them.

    None where that cannot be told.
    """
    try:
        alone, together = _watched(network, take(x, start, stop, size)), _watched(network, x)
    except Exception:  # what is looked for is a better message, and no second error should hide the first
        return None
    modules = dict(network.module.named_modules())
    for (path, a_in, a_out), (other, b_in, b_out) in zip(alone, together, strict=False):
        if path != other:
            return None
        part = slice(start, stop)
        if _agree(_rows(a_in, b_in, part, size)) and not _agree(_rows(a_out, b_out, part, size)):
            return f"module {path or '(the model itself)'!r} ({type(modules[path]).__name__})"
    return None


def _watched(network: Network, x: Inputs) -> _Seen:
    """One forward with what went through every module; the hooks are gone afterwards."""
    seen: _Seen = []

    def note(path: str, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((path, list(_tensors((args, kwargs))), list(_tensors(output))))

    with ExitStack() as stack:
        for path, module in network.module.named_modules():

            def hook(m: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                note(path, args, kwargs, output)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        network.evaluate(x)
    return seen


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _rows(alone: list[Tensor], together: list[Tensor], part: slice, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs that should be equal: those of a few examples, and their rows among all; others cannot be compared."""
    return [
        (a, b[part])
        for a, b in zip(alone, together, strict=False)
        if a.dim() > 0
        and a.dim() == b.dim()
        and len(a) == part.stop - part.start
        and len(b) == size
        and a.shape[1:] == b.shape[1:]
    ]


def _agree(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    return all(close(a, b) if a.is_floating_point() else bool((a == b).all()) for a, b in pairs)
