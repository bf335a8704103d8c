"""How gradients pass through operators that autograd cannot look into: products, solves and estimated scalars.

Gradients reach vectors, right-hand sides, damping and scalar factors; never the parameters of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, product: Product, adjoint: Product) -> Tensor:
        ctx.product, ctx.adjoint = product, adjoint
        return product(V.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return linear_map(grads[0].contiguous(), ctx.adjoint, ctx.product), None, None


def linear_map(V: Tensor, product: Product, adjoint: Product) -> Tensor:
    """`product(V)`, a map linear in V, with `adjoint` as its derivative; differentiable any number of times."""
    if not (torch.is_grad_enabled() and V.requires_grad):
        return product(V)
    result: Tensor = _LinearMap.apply(V, product, adjoint)  # type: ignore[assignment]
    return result


class _ImplicitSolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, X: Tensor, adjoint_solve: Product) -> Tensor:
        ctx.adjoint_solve = adjoint_solve
        return X.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return -ctx.adjoint_solve(grads[0].contiguous()), None, None


def implicit_solution(residual: Tensor, X: Tensor, adjoint_solve: Product) -> Tensor:
    """The solution X of `residual(X) = A X − B = 0`, with the gradients of the implicit function theorem.

    Args:
        residual: `A @ X − B`, computed with autograd on, X detached: it carries A's and B's dependencies.
        X: The solution found.
        adjoint_solve: `G → A⁻ᵀ G`.
    """
    if not residual.requires_grad:
        return X
    result: Tensor = _ImplicitSolution.apply(residual, X, adjoint_solve)  # type: ignore[assignment]
    return result


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`, whose own value does not matter."""
    return value + (surrogate - surrogate.detach()) if surrogate.requires_grad else value
