"""Quadratic forms Λ on the outputs of one batch, which make a curvature `Jᵀ Λ J` of a Jacobian.

Each has `product` (`U → Λ U` on outputs), and, as Λ = S Sᵀ with one block of S per datum and position, `push`
(`u → S u`) and `pull` (`U → Sᵀ U`) between outputs and the rows of function space. Outputs come as `(*f.shape, K)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from curvops.nets.likelihood import Likelihood


class Form(Protocol):
    """A positive semidefinite form on a batch's outputs."""

    def product(self, U: Tensor) -> Tensor:
        """`Λ U`."""
        ...

    def push(self, u: Tensor) -> Tensor:
        """`S u`: `(rows, K)` → outputs."""
        ...

    def pull(self, U: Tensor) -> Tensor:
        """`Sᵀ U`: outputs → `(rows, K)`."""
        ...


class IdentityForm:
    """Λ = I: the Jacobian itself; one row per output."""

    def __init__(self, f: Tensor) -> None:
        self._shape = f.shape

    def product(self, U: Tensor) -> Tensor:
        return U

    def push(self, u: Tensor) -> Tensor:
        return u.reshape(*self._shape, u.shape[1])

    def pull(self, U: Tensor) -> Tensor:
        return U.reshape(-1, U.shape[-1])


class RootForm:
    """Λ = S Sᵀ from S `(B[, T], C, R)`: R rows per datum and position."""

    def __init__(self, S: Tensor) -> None:
        self._S = S

    def product(self, U: Tensor) -> Tensor:
        return self._S @ (self._S.transpose(-1, -2) @ U)

    def push(self, u: Tensor) -> Tensor:
        rows = u.reshape(*self._S.shape[:-2], self._S.shape[-1], u.shape[1])
        return self._S @ rows

    def pull(self, U: Tensor) -> Tensor:
        rows = self._S.transpose(-1, -2) @ U
        return rows.reshape(-1, U.shape[-1])


class HessianForm:
    """Λ = ∇²_f of the likelihood's loss, whose product has a closed form; its root is made when a row is asked for."""

    def __init__(self, likelihood: Likelihood, f: Tensor, y: Tensor) -> None:
        self._likelihood, self._f, self._y = likelihood, f, y
        self._root: RootForm | None = None
        self._apply: Callable[[Tensor], Tensor] | None = None

    def product(self, U: Tensor) -> Tensor:
        apply = self._apply
        if apply is None:
            apply = self._apply = self._likelihood.output_hessian_map(self._f, self._y)
        return apply(U)

    def push(self, u: Tensor) -> Tensor:
        return self._rooted().push(u)

    def pull(self, U: Tensor) -> Tensor:
        return self._rooted().pull(U)

    def _rooted(self) -> RootForm:
        if self._root is None:
            self._root = RootForm(self._likelihood.output_hessian_sqrt(self._f, self._y))
        return self._root


class ExampleForm:
    """Λ = g gᵀ per example, g summed over its positions after the Jacobian: one row per example."""

    def __init__(self, g: Tensor) -> None:
        self._g = g

    def product(self, U: Tensor) -> Tensor:
        return self.push(self.pull(U))

    def push(self, u: Tensor) -> Tensor:
        shape = (self._g.shape[0], *([1] * (self._g.dim() - 1)), u.shape[1])
        return self._g.unsqueeze(-1) * u.reshape(shape)

    def pull(self, U: Tensor) -> Tensor:
        return torch.einsum("bk,bkm->bm", self._g.flatten(1), U.flatten(1, -2))
