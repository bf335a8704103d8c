"""Exact diagonals from rows: `diag(Σ Jᵀ S S ᵀ J)` is the sum of squares of the rows `Sᵀ J`, one example after another.

Nothing of size B x C x P is held: examples come in chunks within the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree.base import DataOperator
from curvops.curvature.objective import Objective
from curvops.memory import columns_within
from curvops.nets.batches import Batch
from curvops.nets.jacobians import DEFAULT_BYTES, example_rows
from curvops.nets.likelihood import Likelihood
from curvops.operators.deferred import Deferred
from curvops.operators.diagonal import Diagonal

Root = Callable[[Batch, Tensor], tuple[Tensor, Tensor | None]]
"""`(batch, f) → (S, signs)`: Λ = S diag(signs) Sᵀ per datum and position, S `(B[, T], C, R)`, signs `(B[, T], R)`."""


def deferred_diagonal(curvature: DataOperator, build: Callable[[], Tensor], *, is_psd: bool) -> Deferred:
    """A diagonal operator whose entries `(P,)` `build` computes at first need.

    Args:
        curvature: The operator whose diagonal it is; its network is watched for changes until then.
        build: Computes the entries.
        is_psd: Whether no entry can be negative.
    """
    return Deferred(
        lambda: Diagonal(build()),
        Diagonal,
        curvature.shape,
        curvature.dtype,
        curvature.device,
        label=f"{curvature.shape[0]:,}",
        watch=curvature,
        is_symmetric=True,
        is_psd=is_psd,
        layout=curvature.layout,
        memory_budget=curvature.memory_budget,
    )


def diagonal_of_rows(objective: Objective, root: Root) -> Float[Tensor, " P"]:
    """`diag(Σ Jᵀ S diag(signs) Sᵀ J)`, `(P,)`, summed over the data.

    Args:
        objective: Network, parameters and data.
        root: What S is.

    Cost: one forward, and R (or T·R) backward passes over each example.
    """
    objective.watch.check()
    network, selection = objective.network, objective.selection
    total = torch.zeros(selection.size, dtype=selection.dtype, device=selection.device)
    for batch, f in objective.evaluate():
        with torch.no_grad():
            S, signs = root(batch, f)
        for cotangents, weights in _cotangents(S, signs, objective.budget() // 4):
            budget = min(DEFAULT_BYTES, objective.budget() // 4)
            for start, rows, _ in example_rows(network, selection, batch.x, cotangents, f=f, byte_budget=budget):
                squares = rows.square()
                if weights is not None:
                    squares = squares * weights[start : start + len(rows), :, None]
                total += squares.sum((0, 1))
    return total


def diagonal_of_columns(curvature: DataOperator) -> Float[Tensor, " P"]:
    """The diagonal `(P,)` read off all P columns. Cost: P products."""
    size = curvature.shape[0]
    d = torch.zeros(size, dtype=curvature.dtype, device=curvature.device)
    step = columns_within(
        curvature.objective.budget() // 4, curvature.device, 4 * size * d.element_size(), min(size, 256)
    )
    try:
        for start in range(0, size, step):
            where = torch.arange(start, min(start + step, size), device=d.device)
            columns = torch.arange(len(where), device=d.device)
            unit = torch.zeros(size, len(where), dtype=d.dtype, device=d.device)
            unit[where, columns] = 1.0
            d[where] = curvature._apply(unit)[where, columns]
    finally:
        curvature.release()
    return d


def hessian_root(likelihood: Likelihood, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """S and signs of ∇²_f(−log p), by closed form, or by eigendecomposition where it is indefinite."""
    if likelihood.is_convex:
        return likelihood.output_hessian_sqrt(f, y), None
    values, vectors = torch.linalg.eigh(likelihood.output_hessian(f, y))
    return vectors * values.abs().sqrt().unsqueeze(-2), values.sign()


def _cotangents(S: Tensor, signs: Tensor | None, budget: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The columns of S as cotangents `(B, R, *event)` with their signs `(B, R)`; of sequences some positions a time."""
    if S.dim() == 3:
        yield S.transpose(1, 2), signs
        return
    B, T, C, R = S.shape
    step = columns_within(budget, S.device, B * R * T * C * S.element_size(), T)
    for start in range(0, T, step):
        here = range(start, min(start + step, T))
        cotangents = S.new_zeros(B, len(here), R, T, C)
        for row, t in enumerate(here):
            cotangents[:, row, :, t] = S[:, t].transpose(1, 2)
        weights = None if signs is None else signs[:, here.start : here.stop].flatten(1)
        yield cotangents.flatten(1, 2), weights
