"""What other libraries ask of a matrix and a matrix-free operator has to work for: batches, entries, a root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError
from curvops.operators import Closure, Dense, LinearOperator
from curvops.operators.dense import definite_cholesky
from curvops.operators.routes.plan import dense_is_affordable

Verb = Callable[[LinearOperator, Tensor], Tensor]

_BLOCK = 1024
"""Columns of the identity multiplied together where entries are read off products."""


def folded(operator: LinearOperator, rhs: Tensor, verb: Verb) -> Tensor:
    """`verb(operator, ·)` of a batch `(*batch, N, K)`, all of its columns at once."""
    batch, columns = rhs.shape[:-2], rhs.shape[-1]
    result = verb(operator, rhs.movedim(-2, 0).reshape(rhs.shape[-2], -1))
    return result.reshape(result.shape[0], *batch, columns).movedim(0, -2)


def places(index: Any, size: int, device: torch.device) -> Tensor | None:
    """Rows or columns as a vector of positions; None for all of them."""
    if isinstance(index, slice) and index == slice(None):
        return None
    every = torch.arange(size, device=device)
    return every[index]


def entries(operator: LinearOperator, rows: Tensor, columns: Tensor) -> Tensor:
    """`A[rows, columns]`, read off the products with the fewer of the different columns or rows."""
    if len(rows) and torch.equal(rows, columns) and operator._exact("diagonal"):
        return operator.diagonal()[rows]
    (few_rows, _), (few, place) = (part.unique(return_inverse=True) for part in (rows, columns))
    if len(few_rows) < len(few):
        return entries(operator.T, columns, rows)
    blocks = []
    for block in few.split(_BLOCK):
        unit = torch.zeros(operator.shape[1], len(block), dtype=operator.dtype, device=operator.device)
        unit[block, torch.arange(len(block), device=operator.device)] = 1.0
        start = len(blocks) * _BLOCK
        here = ((place >= start) & (place < start + len(block))).nonzero()[:, 0]
        blocks.append((here, (operator @ unit)[rows[here], place[here] - start]))
    if not blocks:
        return torch.zeros(0, dtype=operator.dtype, device=operator.device)
    return torch.cat([values for _, values in blocks])[torch.cat([here for here, _ in blocks]).argsort()]


def exact_diagonal(operator: LinearOperator) -> Tensor:
    if operator._exact("diagonal") or dense_is_affordable(operator):
        return operator.diagonal()
    every = torch.arange(operator.shape[0], device=operator.device)
    return entries(operator, every, every)


def root(operator: LinearOperator) -> LinearOperator:
    """R, square, with `R Rᵀ = A`."""
    if operator._exact("function") and not isinstance(operator, Dense) and operator._has_spectral():
        return operator._spectral()._power(0.5)
    if dense_is_affordable(operator):
        M = operator.to_dense()
        try:
            return Dense(definite_cholesky(M), is_symmetric=False)
        except NotPositiveDefiniteError:  # singular, or indefinite: the symmetric root tells, and refuses the latter
            return Dense(Dense(M, is_symmetric=True)._spectral()._power(0.5).to_dense())
    return Closure(
        operator.sqrt_matvec, operator.shape, dtype=operator.dtype, device=operator.device, batched=True, is_psd=True,
        name="root",
    )  # fmt: skip
