"""Oracles: slow, obviously right, and independent of everything in curvops.

Each follows its definition with loops over data, outputs and parameters, in plain autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFn = Callable[[Tensor, Tensor], Tensor]


def outputs(model: nn.Module, x: Any) -> Tensor:
    """f, attached to the graph."""
    takes_keywords = isinstance(x, Mapping) and set(x) <= set(inspect.signature(model.forward).parameters)
    with sdpa_kernel(SDPBackend.MATH):
        f = model(**x) if takes_keywords else model(x)
    return f if isinstance(f, Tensor) else f.logits


def one(x: Any, i: int) -> Any:
    """Datum i of a batch, as a batch of one."""
    return {k: v[i : i + 1] for k, v in x.items()} if isinstance(x, Mapping) else x[i : i + 1]


def length(x: Any) -> int:
    """Number of data."""
    return len(next(iter(x.values()))) if isinstance(x, Mapping) else len(x)


def parameters(model: nn.Module, params: Any = None) -> list[nn.Parameter]:
    """The parameters that `params` selects (for flat indices: all trainable ones; see `columns`)."""
    if isinstance(params, str):
        chosen = {id(p) for p in model.last_layer.parameters()}  # type: ignore[union-attr]
        return [p for p in model.parameters() if p.requires_grad and id(p) in chosen]
    if isinstance(params, list):
        return [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and any(n == q or n.startswith(f"{q}.") for q in params)
        ]
    return [p for p in model.parameters() if p.requires_grad]


def columns(params: Any) -> Any:
    """Which of the flat entries count."""
    return params if isinstance(params, Tensor) else slice(None)


def nll(likelihood: str, weight: Tensor | None = None, ignore_index: int = -100) -> LossFn:
    """−log p(y | f) without constants, summed over the data and positions."""
    if likelihood == "regression":
        return lambda f, y: 0.5 * ((f - y) ** 2).sum()
    if likelihood == "binary":
        return lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    return lambda f, y: F.cross_entropy(
        f.reshape(-1, f.shape[-1]), y.reshape(-1), weight=weight, ignore_index=ignore_index, reduction="sum"
    )


def problem_nll(problem: Any, dtype: torch.dtype = torch.float64) -> LossFn:
    """The loss of a `curvops.testing.problems.Problem`."""
    return nll(problem.likelihood, problem.weight(dtype))


def gradient(scalar: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """Gradient as one flat vector; zeros where the scalar does not depend on a tensor."""
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(t).reshape(-1) for t in tensors])
    grads = torch.autograd.grad(scalar, tensors, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(grads, tensors, strict=True)]
    )


def jacobian(model: nn.Module, x: Any, params: Any = None) -> Tensor:
    """`(B, C, P)` or `(B, T, C, P)`: a row for every output by one backward each, one datum at a time."""
    tensors = parameters(model, params)
    blocks = []
    for i in range(length(x)):
        f = outputs(model, one(x, i))
        rows = torch.stack([gradient(entry, tensors) for entry in f.reshape(-1)])
        blocks.append(rows.reshape(*f.shape, -1))
    return torch.cat(blocks).detach()[..., columns(params)]


def output_hessian(loss: LossFn, f: Tensor, y: Tensor) -> Tensor:
    """`(f.numel(), f.numel())` Hessian of the loss of one datum in its output, by double backward."""
    f = f.detach().requires_grad_()
    g = gradient(loss(f, y), [f], create_graph=True)
    return torch.stack([gradient(entry, [f]) for entry in g]).detach()


def ggn(model: nn.Module, loss: LossFn, x: Any, y: Tensor, params: Any = None) -> Tensor:
    """Σ_n J_nᵀ Λ_n J_n, `(P, P)`."""
    J = jacobian(model, x, params)
    f = outputs(model, x).detach()
    total = J.new_zeros(J.shape[-1], J.shape[-1])
    for i in range(len(f)):
        J_i = J[i].reshape(-1, J.shape[-1])
        total += J_i.T @ output_hessian(loss, f[i : i + 1], y[i : i + 1]) @ J_i
    return total


def empirical_fisher(
    model: nn.Module, loss: LossFn, x: Any, y: Tensor, params: Any = None, datum: str = "token"
) -> Tensor:
    """Σ ∇log p ∇log pᵀ over the data, and over the positions of a sequence unless `datum="example"`, `(P, P)`."""
    J = jacobian(model, x, params)
    f = outputs(model, x).detach()
    total = J.new_zeros(J.shape[-1], J.shape[-1])
    for i in range(len(f)):
        f_i = f[i : i + 1].clone().requires_grad_()
        r = gradient(loss(f_i, y[i : i + 1]), [f_i]).reshape(f[i].shape)
        if f.ndim == 3 and datum == "token":
            pieces = [J[i, t].T @ r[t] for t in range(f.shape[1])]
        else:
            pieces = [J[i].reshape(-1, J.shape[-1]).T @ r.reshape(-1)]
        for g in pieces:
            total += torch.outer(g, g)
    return total


def mc_fisher(model: nn.Module, x: Any, pseudo_gradients: Sequence[Tensor], params: Any = None) -> Tensor:
    """Mean over the samples of Σ_tokens Jᵀ g gᵀ J, for given draws g of the outputs' shape, `(P, P)`."""
    J = jacobian(model, x, params)
    total = J.new_zeros(J.shape[-1], J.shape[-1])
    for g in pseudo_gradients:
        for J_n, g_n in zip(J.flatten(0, -3), g.reshape(-1, g.shape[-1]), strict=True):
            v = J_n.T @ g_n
            total += torch.outer(v, v) / len(pseudo_gradients)
    return total


def hessian(model: nn.Module, loss: LossFn, x: Any, y: Tensor, params: Any = None, *, together: bool = False) -> Tensor:
    """Hessian of the summed loss, `(P, P)`, row by row by double backward (never `torch.func.hessian`).

    One datum at a time, or all in one graph: `together`, for many data.
    """
    tensors = parameters(model, params)
    total = 0.0
    for x_i, y_i in [(x, y)] if together else [(one(x, i), y[i : i + 1]) for i in range(length(x))]:
        g = gradient(loss(outputs(model, x_i), y_i), tensors, create_graph=True)
        total = total + torch.stack([gradient(entry, tensors) for entry in g]).detach()
    return torch.as_tensor(total)[columns(params)][:, columns(params)]


def gradients(model: nn.Module, loss: LossFn, x: Any, y: Tensor, params: Any = None) -> Tensor:
    """`(B, P)` gradient of the loss of each datum (summed over its positions)."""
    tensors = parameters(model, params)
    rows = [gradient(loss(outputs(model, one(x, i)), y[i : i + 1]), tensors) for i in range(length(x))]
    return torch.stack(rows).detach()[:, columns(params)]


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, or ‖a − b‖ where b = 0."""
    norm = float(b.norm())
    return float((a - b).norm()) / (norm if norm > 0 else 1.0)
