"""`with untouched(model): …` asserts that nothing of the user's was changed, also when the block raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def _state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, m in model.named_modules(remove_duplicate=False):
        state[f"{path}: mode"] = m.training
        state[f"{path}: attributes"] = sorted(vars(m))
        for name in _HOOKS:
            state[f"{path}: {name}"] = (id(getattr(m, name)), list(getattr(m, name) or ()))
        for kind, tensors in (("parameter", m._parameters), ("buffer", m._buffers)):
            for key, t in tensors.items():
                state[f"{path}.{key} {kind}"] = None if t is None else _tensor(t)
    state["random state"] = torch.get_rng_state().tolist()
    state["default dtype"] = torch.get_default_dtype()
    state["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    cuda = torch.backends.cuda
    state["kernels"] = (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    return state


def _tensor(t: Tensor) -> tuple[Any, ...]:
    grad = None if t.grad is None else (id(t.grad), t.grad.tolist())
    return id(t), t.data_ptr(), t._version, t.dtype, t.requires_grad, grad, id(t._backward_hooks), t.tolist()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Compare everything of the model, and the global state, before and after."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
        assert not changed, f"changed: {changed}"
