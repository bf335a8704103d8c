"""Dense curvatures the slow way: one backward per output, one double backward per parameter, in float64.

Shares the data and the forward with the operators, and none of their products, so that it can judge them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.objective import Objective
from curvops.nets.batches import Batch
from curvops.nets.forward import Inputs, take

MAX_PARAMETERS = 2500
MAX_ROWS = 50_000
# Data per graph: a row's backward costs as much as its graph has data, though only one of them is asked about.
_GROUP = 32


def too_large(parameters: int, rows: int) -> str | None:
    """Why the dense check is skipped, as a sentence; None where it is made.

    Args:
        parameters: P.
        rows: Outputs of the network over all data, N·C.
    """
    if parameters <= MAX_PARAMETERS and rows <= MAX_ROWS:
        return None
    return (
        f"not compared with dense matrices: P = {parameters:,} and N·C = {rows:,}, and the comparison is made up to "
        f"P = {MAX_PARAMETERS:,} and N·C = {MAX_ROWS:,}."
    )


def dense_ggn(objective: Objective) -> Float[Tensor, "P P"]:
    """`Σ Jᵀ Λ J` in float64, summed over the data. N·C backwards, O(N·C·P²) operations."""
    objective = _double(objective)
    assert objective.likelihood is not None
    total = _square_of_zeros(objective)
    for f, y, J in _jacobians(objective):
        Lambda = _output_hessian(objective, f, y)
        total += torch.einsum("bip,biq->pq", J, Lambda @ J)
    return (total + total.T) / 2


def dense_jacobian_gram(objective: Objective) -> Float[Tensor, "P P"]:
    """`Σ Jᵀ J` in float64. N·C backwards, O(N·C·P²) operations."""
    objective = _double(objective)
    total = _square_of_zeros(objective)
    for _, _, J in _jacobians(objective):
        total += torch.einsum("bip,biq->pq", J, J)
    return total


def dense_hessian(objective: Objective) -> Float[Tensor, "P P"]:
    """The exact Hessian of `Σ −log p` in float64. P double backwards over the data."""
    objective = _double(objective)
    assert objective.likelihood is not None
    total = _square_of_zeros(objective)
    parameters = objective.selection.tensors
    for batch in objective.batches():
        with torch.enable_grad(), objective.network.differentiable():
            f = objective.network(batch.x, parameters)
            g = _gradient(objective.likelihood.loss(f, batch.y), parameters, create_graph=True)
            total += torch.stack([_gradient(entry, parameters) for entry in g])
        objective.observe(batch, f.detach())
    return (total + total.T) / 2


def _double(objective: Objective) -> Objective:
    return objective.to(torch.float64, torch.device("cpu"))


def _square_of_zeros(objective: Objective) -> Tensor:
    return torch.zeros(objective.selection.size, objective.selection.size, dtype=torch.float64)


def _jacobians(objective: Objective) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`(f, y, J)` of a few data at a time, J `(B, outputs per datum, P)`."""
    parameters = objective.selection.tensors
    for batch in objective.batches():
        outputs = []
        for x, y in _groups(batch):
            with torch.enable_grad(), objective.network.differentiable():
                f = objective.network(x, parameters)
                rows = torch.stack([_gradient(entry, parameters) for entry in f.reshape(-1)])
            outputs.append(f.detach())
            yield f.detach(), y, rows.reshape(len(y), -1, rows.shape[1])
        objective.observe(batch, torch.cat(outputs))


def _groups(batch: Batch) -> Iterator[tuple[Inputs, Tensor]]:
    size = len(batch.y)
    for start in range(0, size, _GROUP):
        stop = min(start + _GROUP, size)
        yield take(batch.x, start, stop, size), batch.y[start:stop]


def _output_hessian(objective: Objective, f: Tensor, y: Tensor) -> Tensor:
    """Λ `(B, n, n)` of each datum's n outputs by double backward; the data do not mix in the loss."""
    assert objective.likelihood is not None
    with torch.enable_grad():
        f = f.requires_grad_()
        (g,) = torch.autograd.grad(objective.likelihood.loss(f, y), f, create_graph=True)
        columns = [
            torch.autograd.grad(entry, f, retain_graph=True)[0].flatten(1) if entry.requires_grad else None
            for entry in g.flatten(1).sum(0)
        ]
    zeros = torch.zeros_like(f).flatten(1)
    return torch.stack([zeros if column is None else column for column in columns], 2).detach()


def _gradient(scalar: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """Flat gradient; zero in the parameters that the scalar does not depend on."""
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    gradients = torch.autograd.grad(scalar, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([part.flatten() for part in parts])
