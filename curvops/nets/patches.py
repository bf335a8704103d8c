"""What must be switched for a network to be differentiated twice, each switch put back on the way out.

PyTorch's fastest kernels (flash attention, the fused transformer path, cuDNN and oneDNN recurrences, EmbeddingBag) have
no second derivative, that of weight norm a wrong one, and reentrant checkpoints cut the graph without a word. Inside
`differentiable` the plain kernels run instead, and such a checkpoint is refused; nothing of the user's is altered.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from curvops.errors import UnsupportedError, UnsupportedLayerError


class PlainKernels(TorchFunctionMode):
    """EmbeddingBag (sum, mean) as lookup + reduction; lookups with dense gradients; weight norm by its formula.

    EmbeddingBag has neither forward-mode nor second derivatives; `sparse=True` gives gradients that do not
    differentiate again; `scale_grad_by_freq=True` gives gradients that are no derivative. The fused weight norm (over
    the first or last axis) takes its norms for constants in the second derivative, which is 7–70 % off (PyTorch 2.13
    to 2.15; `torch.autograd.gradgradcheck` refuses it), and has no forward-mode derivative.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding_bag:
            return _embedding_bag(*args, **kwargs)
        if func is nn.functional.embedding:
            return _embedding(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise UnsupportedLayerError(_MAX_NORM)
    return nn.functional.embedding(input, weight, padding_idx)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if mode not in ("sum", "mean"):
        raise UnsupportedLayerError(f"EmbeddingBag(mode={mode!r}) has no second derivative; use 'sum' or 'mean'")
    if max_norm is not None:
        raise UnsupportedLayerError(_MAX_NORM)
    if input.ndim == 2:
        bags, per_bag = input.shape
        bag_of = torch.arange(bags, device=input.device).repeat_interleave(per_bag)
        input = input.reshape(-1)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.reshape(-1)
    else:
        if offsets is None:
            raise ValueError("embedding_bag: offsets has to be a 1D Tensor but got None")
        starts = offsets[:-1] if include_last_offset else offsets
        bags = starts.numel()
        positions = torch.arange(input.numel(), device=input.device)
        # Bag of entry i: the last start at or before it (an empty bag shares its start with the next one).
        bag_of = torch.searchsorted(starts.contiguous(), positions, right=True) - 1
    rows = nn.functional.embedding(input, weight, padding_idx)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != (padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx)
        rows = rows * counted.unsqueeze(-1)
    total = rows.new_zeros(bags, weight.shape[1]).index_add(0, bag_of, rows)
    if mode == "sum":
        return total
    count = rows.new_zeros(bags).index_add(0, bag_of, counted.to(rows.dtype))
    return total / count.clamp(min=1).unsqueeze(-1)


_MAX_NORM = "an embedding with max_norm rewrites its weights in the forward; renormalise once and set max_norm=None"


def needs_plain_kernels(modules: Iterable[nn.Module]) -> bool:
    """Whether some module of a model runs a kernel that `PlainKernels` replaces (weight norm: or may run it)."""
    return any(
        isinstance(m, nn.EmbeddingBag)
        or (isinstance(m, nn.Embedding) and (m.sparse or m.scale_grad_by_freq or m.max_norm is not None))
        or isinstance(m, ParametrizationList)
        or any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values())
        for m in modules
    )


def has_recurrence(modules: Iterable[nn.Module]) -> bool:
    """Whether some module of a model may run a fused recurrent kernel."""
    return any(isinstance(m, nn.RNNBase) for m in modules)


def recording() -> AbstractContextManager[Any]:
    """Autograd on and autocast off, whatever the caller's `no_grad`, `inference_mode` or `autocast` says."""
    lowered = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    # Entering a mode that is on already costs more than to ask.
    return _recording(lowered) if lowered or torch.is_inference_mode_enabled() else torch.enable_grad()


@contextmanager
def _recording(lowered: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in lowered:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def differentiable(*, recurrent: bool = False, plain: bool = False, fused: bool = False) -> Iterator[None]:
    """Kernels with second derivatives, autograd on, autocast off; all put back on the way out.

    Args:
        recurrent: Switch the fused cuDNN and oneDNN recurrences off.
        plain: Intercept the kernels of `PlainKernels`.
        fused: Leave attention its fused kernels, which have first derivatives only.

    Raises:
        UnsupportedError: within, at a checkpoint with `use_reentrant=True`. Its backward needs `.backward()`, and where
            none of its inputs requires a gradient it drops its parameters from the graph: a curvature of zero.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # Nothing can be compiled unless dynamo was imported, and importing it takes seconds.
    compiles = "torch._dynamo" in sys.modules
    with (
        recording(),
        nullcontext() if fused else sdpa_kernel(SDPBackend.MATH),
        _plain_recurrence() if recurrent else nullcontext(),
        PlainKernels() if plain else nullcontext(),
        _reentrance_refused(),
        torch.compiler.set_stance("force_eager") if compiles else nullcontext(),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


class _Watched(threading.local):
    """Whether this thread is inside `differentiable`; another thread may train with checkpoints meanwhile."""

    depth = 0


_watched = _Watched()


class _Guard:
    """Stands for `torch.utils.checkpoint.CheckpointFunction`, which only reentrant checkpoints use."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind

    def apply(self, *args: Any) -> Any:
        if _watched.depth > 0:
            raise UnsupportedError(
                "the model uses reentrant activation checkpointing, which autograd.grad cannot enter; "
                "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        return self.behind.apply(*args)


@contextmanager
def _reentrance_refused() -> Iterator[None]:
    checkpoints = sys.modules.get("torch.utils.checkpoint")
    if checkpoints is None:
        yield
        return
    held = checkpoints.CheckpointFunction
    _watched.depth += 1
    try:
        checkpoints.CheckpointFunction = _Guard(held)  # type: ignore[attr-defined]
        yield
    finally:
        checkpoints.CheckpointFunction = held  # type: ignore[attr-defined]
        _watched.depth -= 1


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    # The public `flags` contexts would also reset the user's benchmark, determinism and TF32 choices.
    cudnn, onednn = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_cudnn_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch._C._set_cudnn_enabled(cudnn)
        torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Backward hooks of the given tensors silenced: a user's `register_hook` must not rewrite a Jacobian."""
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        for t, _ in hooked:
            t._backward_hooks = None
        yield
    finally:
        for t, hooks in hooked:
            t._backward_hooks = hooks


@contextmanager
def without_backward_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Backward hooks of modules silenced while the graph is built, so that they never enter it."""
    hooked = [
        (m, m._backward_hooks, m._backward_pre_hooks) for m in modules if m._backward_hooks or m._backward_pre_hooks
    ]
    try:
        for m, hooks, pre_hooks in hooked:
            m._backward_hooks, m._backward_pre_hooks = type(hooks)(), type(pre_hooks)()
        yield
    finally:
        for m, hooks, pre_hooks in hooked:
            m._backward_hooks, m._backward_pre_hooks = hooks, pre_hooks


@contextmanager
def tracked_only(modules: Iterable[nn.Module], selected: Sequence[Tensor]) -> Iterator[None]:
    """Parameters outside the selection without `requires_grad`, so that the graph keeps nothing for their sake."""
    keep = {id(t) for t in selected}
    owned = (p for m in modules for p in m._parameters.values())
    paused = [p for p in owned if p is not None and id(p) not in keep and p.requires_grad]
    try:
        for p in paused:
            p.requires_grad_(False)
        yield
    finally:
        for p in paused:
            p.requires_grad_(True)


@contextmanager
def substituted(model: nn.Module, old: Sequence[Tensor], new: Sequence[Tensor]) -> Iterator[None]:
    """Parameters replaced by other tensors wherever the model registers them.

    `torch.func.functional_call` leaves its own tensors on a module registered under two names; here every module is
    visited once, and what it held is put back, whatever happens.
    """
    instead = {id(a): b for a, b in zip(old, new, strict=True)}
    held = [(m, dict(m._parameters)) for m in model.modules() if any(id(p) in instead for p in m._parameters.values())]
    flat = [(m, m._flat_weights) for m, _ in held if isinstance(m, nn.RNNBase)]
    try:
        for m, parameters in held:
            for key, p in parameters.items():
                if id(p) in instead:
                    m._parameters[key] = instead[id(p)]  # type: ignore[assignment]
        for m, weights in flat:
            m._flat_weights = [instead.get(id(w), w) for w in weights]  # type: ignore[misc]
        yield
    finally:
        for m, parameters in held:
            m._parameters.update(parameters)
        for m, weights in flat:
            m._flat_weights = weights
