"""What the lean layers share: adjoints recorded at a cotangent of zero, which differentiate once and no further.

A layer's function hands its `backward` to a second function, the adjoint, where a graph is asked for; the adjoint's
`backward` is the layer's tangent map. Input and weight are constants there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvops.errors import UnsupportedError


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a layer on these tensors may run as a function of ours: dense, of one dtype, on a graph, and unhooked.

    Checkpointing and offloading intercept what is saved, and run the forward again where no mode reaches: inside the
    engine. Both times PyTorch's own layer must run, so that both save the same.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    present = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided for t in present)
    return plain and any(t.requires_grad for t in present) and len({t.dtype for t in present}) == 1


def constants(ctx: Any) -> Sequence[Any]:
    """What was saved, cut off the graph; reading it checks that nobody has written to it since."""
    if not torch.is_grad_enabled():
        return ctx.saved_tensors  # nothing is recorded, so there is nothing to cut
    return [None if t is None else t.detach() for t in ctx.saved_tensors]


def unviewed(y: Tensor) -> Tensor:
    """The same memory as no view: autograd lets nobody write to a view that a function of ours has made."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros that take the memory of one number."""
    return like.new_zeros(1).expand(shape)


def plus(a: Tensor | None, b: Tensor) -> Tensor:
    """The sum, where a None stands for nothing."""
    return b if a is None else a + b


def batched(*tensors: Tensor | None) -> bool:
    """Whether a vectorised pass is running: then tensors are not written to, since not all need have its columns."""
    for t in tensors:  # noqa: SIM110  (three times as fast as any(), on the way of every product)
        if t is not None and torch._C._functorch.is_batchedtensor(t):  # type: ignore[attr-defined]
            return True
    return False


def once() -> None:
    """Refuse to record a third derivative."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "this graph is for products with a Jacobian and differentiates no further; take HessianProduct for second "
            "derivatives"
        )


def no_further() -> None:
    """Refuse to record a third derivative."""
    if torch.is_grad_enabled():
        raise UnsupportedError("this graph is for Hessian products and differentiates no further")
