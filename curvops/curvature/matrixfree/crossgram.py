"""Inner products between the rows of two curvatures' factors, layer by layer: what a predictive needs of a posterior.

    R A⁻¹ Rᵀ = R D⁻¹ Rᵀ − VᵀV ,    V = L⁻¹ B D⁻¹ Rᵀ ,    L Lᵀ = I + B D⁻¹ Bᵀ        for A = BᵀB + D and test rows R

No solve with A and no vector of P entries, where the layers give the inner products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.matrixfree.jacobian import Jacobian
from curvops.curvature.matrixfree.layerdense import Side, own_blocks, sides_from_layers, tile
from curvops.operators.base import LinearOperator
from curvops.operators.composites import Scaled
from curvops.operators.functionspace import FunctionSpaceForm


def functional_covariance(
    J: Jacobian, form: FunctionSpaceForm, *, joint: bool = False
) -> Float[Tensor, "N E E"] | Float[Tensor, "M M"] | None:
    """`J A⁻¹ Jᵀ`: its blocks `(N, C, C)`, one per datum, or with `joint` all of it, `(N·C, N·C)`.

    Args:
        J: The Jacobian over the test data, in the parameters of A, in their order.
        form: A in function space.
        joint: Between all data.

    Returns:
        None where the layers' factors do not give the inner products, or D is not constant on each parameter.

    Cost: one pass over each data set, N_train·N_test(Σ I + C² Σ O) operations, and n² for each of the N·C test rows.
    """
    weights = form.weights()
    root, curvature = _unscaled(form.curvature)
    if weights is None or curvature is None:
        return None
    test = sides_from_layers(J.curvature, J.curvature.objective.budget())
    train = None if test is None else sides_from_layers(curvature, curvature.objective.budget())
    if test is None or train is None or test[0].groups.keys() != train[0].groups.keys():
        return None
    with torch.no_grad():
        weights = weights.expand(len(curvature.objective.selection.sizes)) if weights.dim() == 0 else weights
        whitened = [form.whitened(_cross(train, side, weights) * root) for side in test]
        if joint:
            V = torch.cat(whitened, 1)
            return _all(test, weights) - V.T @ V
        blocks = []
        for side, V in zip(test, whitened, strict=True):
            F = V.reshape(len(V), *side.size).permute(1, 2, 0)  # (B, K, n)
            blocks.append(own_blocks(side, weights) - F @ F.transpose(1, 2))
        return torch.cat(blocks)


def _unscaled(operator: LinearOperator) -> tuple[Tensor | float, GaussNewton | None]:
    """`(√c, A)` of `c A` for a curvature A."""
    if isinstance(operator, Scaled):
        root, inner = operator._root(), operator.operator
    else:
        root, inner = 1.0, operator
    return root, inner if isinstance(inner, GaussNewton) else None


def _cross(train: Sequence[Side], test: Side, weights: Tensor) -> Tensor:
    return torch.cat([tile(side, test, weights) for side in train])


def _all(sides: Sequence[Side], weights: Tensor) -> Tensor:
    return torch.cat([torch.cat([tile(one, two, weights) for two in sides], 1) for one in sides])
