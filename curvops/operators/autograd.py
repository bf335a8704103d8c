"""How gradients pass through operators that autograd cannot look into: products, solves and estimated scalars.

Gradients reach vectors, right-hand sides, damping and scalar factors; never the parameters of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return -ctx.adjoint_solve(grads[0].contiguous()), None, None


def implicit_solution(residual: Tensor, X: Tensor, adjoint_solve: Product) -> Tensor:
    """The solution X of `residual(X) = A X − B = 0`, with the gradients of the implicit function theorem, once.

    Args:
        residual: `A @ X − B`, computed with autograd on, X detached: it carries A's and B's dependencies.
        X: The solution found.
        adjoint_solve: `G → A⁻ᵀ G`.
    """
    if not residual.requires_grad:
        return X
    result: Tensor = _ImplicitSolution.apply(residual, X, adjoint_solve)  # type: ignore[assignment]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`, whose own value does not matter; once differentiable."""
    if not surrogate.requires_grad:
        return value
    result: Tensor = _WithGradient.apply(value, surrogate)  # type: ignore[assignment]
    return result


class _Estimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Tensor, value: Tensor, weights: Callable[[], Tensor]) -> Tensor:
        ctx.weights = weights
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weights = ctx.weights()
        return grads[0].to(weights.dtype) * weights, None, None


def estimate_with_gradient(value: Tensor, products: Tensor, weights: Callable[[], Tensor]) -> Tensor:
    """`value` with the gradient of `(weights() · products).sum()`; the weights are found in the backward pass.

    Args:
        value: The estimate, 0-dim.
        products: What carries the dependence on damping and factors.
        weights: Of the shape of `products`; constants.
    """
    if not products.requires_grad:
        return value
    result: Tensor = _Estimate.apply(products, value, weights)  # type: ignore[assignment]
    return result
