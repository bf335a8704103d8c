"""Curvatures of the form `Σ Jᵀ Λ J`, and the generalised Gauss–Newton matrix.

v → J v → Λ J v → Jᵀ Λ J v ,  batch by batch, on a kept graph
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from curvops.curvature.matrixfree.base import Cache, DataOperator
from curvops.curvature.matrixfree.forms import Form, HessianForm
from curvops.curvature.objective import Objective, Options
from curvops.memory import Need, in_turn
from curvops.nets.batches import Batch
from curvops.nets.graph import Footprint
from curvops.nets.products import Linearisation
from curvops.operators.base import LinearOperator


@dataclass(frozen=True)
class LinearPiece:
    """One batch: the Jacobian's products and the form on its outputs."""

    linearisation: Linearisation
    form: Form

    @property
    def outputs(self) -> Tensor:
        """f, detached."""
        return self.linearisation.outputs

    @property
    def graph_bytes(self) -> int:
        """Bytes that the graphs hold; the adjoint's, where no product has built it, at as much again at most."""
        return self.linearisation.graph_bytes * (1 if self.linearisation.has_adjoint else 2)

    @property
    def footprint(self) -> Footprint:
        """What the graphs hold and what a product takes; an adjoint that is not built yet as much again at most."""
        found = self.linearisation.footprint
        return found if self.linearisation.has_adjoint else found._replace(held=2 * found.held)

    @property
    def on_tape(self) -> bool | None:
        """Whether its products are replayed; None before it is known."""
        return self.linearisation.on_tape

    def release(self) -> None:
        """Drop the graphs."""
        self.linearisation.release()


class GaussNewton(DataOperator):
    """`Σ over data of Jᵀ Λ J`; a subclass says what Λ is by `_form`."""

    function_space_size: int | None = None
    """Rows of B in `BᵀB`, once a forward has told them."""

    def _form(self, batch: Batch, f: Tensor) -> Form:
        """Λ on the batch's outputs f."""
        raise NotImplementedError

    def _rows(self, outputs: tuple[int, ...]) -> int:
        """Rows of function space per datum, whose outputs have the shape `(C,)` or `(T, C)`."""
        raise NotImplementedError

    def _build(self, batch: Batch) -> LinearPiece:
        linearisation = Linearisation(self.objective.network, self.objective.selection, batch.x)
        self.objective.check(linearisation.outputs, batch.y)
        with torch.no_grad():
            return LinearPiece(linearisation, self._form(batch, linearisation.outputs))

    def _product(self, V: Tensor) -> Tensor:
        return self._sum(V, lambda piece, W: piece.linearisation.sandwich(W, piece.form.product))

    def _dense(self) -> Tensor:
        from curvops.curvature.matrixfree.layerdense import dense_from_layers

        dense = dense_from_layers(self)
        return super()._dense() if dense is None else dense

    def _dense_need(self) -> Need:
        """From the layers' factors a block of the largest parameter beside the matrix; else as products take."""
        largest = max(self.objective.selection.sizes, default=0)
        rows, itemsize = self.shape[0], self.dtype.itemsize
        return in_turn([Need((rows**2 + largest**2) * itemsize), self._product_need(1)])

    def _explain_dense(self) -> str:
        return f"from the layers' factors, or {super()._explain_dense()} where those cost less"

    def _factor(self) -> LinearOperator | None:
        from curvops.curvature.matrixfree.jacobian import Factor

        return Factor(self) if self.is_psd else None

    def _gram(self) -> LinearOperator | None:
        from curvops.curvature.matrixfree.gram import GramOf

        return GramOf(self) if self.is_psd else None

    def _weighs_parameters(self) -> bool:
        from curvops.curvature.matrixfree.layerdense import factors_are_cheap

        return factors_are_cheap(self)

    def _weighted_gram(self, weights: Tensor) -> Tensor | None:
        from curvops.curvature.matrixfree.layerdense import gram_from_layers

        return gram_from_layers(self, self.objective.budget(), weights)


class GGN(GaussNewton):
    """The generalised Gauss–Newton matrix `Σ Jᵀ Λ J` (Schraudolph 2002), P x P, summed over the data.

    Λ is the Hessian of −log p(y | f) in the outputs: I for regression, diag(p) − ppᵀ for classification, σ(1−σ) for
    binary targets. For these likelihoods it equals the Fisher information matrix.

    Args:
        model: The network, in eval mode where it has BatchNorm or Dropout.
        likelihood: "regression", "classification", "binary", a loss module with `reduction="sum"`, or a `Likelihood`.
        data: One batch `(x, y)` (a tuple), a Mapping, or a re-iterable of batches (a list, a DataLoader).
        cache: "auto" keeps linearisations within the memory budget, True all, False none.
        options: `params`, `dict_key_x`, `dict_key_y`, `num_data`, `memory_budget`, `progress`, `snapshot`; see
            `curvops.curvature.objective.Objective`.

    Cost: building reads the parameters once; the first product costs about three gradients, each further one about one
    and a half.

    Example:
        >>> import torch, curvops as co
        >>> model = torch.nn.Linear(3, 2).double()
        >>> data = (torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
        >>> co.GGN(model, "classification", data)
        GGN(P=8, N=5, classification)
    """

    def __init__(
        self, model: nn.Module, likelihood: Any, data: Any, *, cache: Cache = "auto", **options: Unpack[Options]
    ) -> None:
        self._begin(Objective(model, likelihood, data, **options), cache=cache)

    def _begin(self, objective: Objective, *, cache: Cache = "auto", **facts: Any) -> None:
        super()._begin(objective, cache=cache, is_psd=objective.needed_likelihood().is_convex)

    def _form(self, batch: Batch, f: Tensor) -> Form:
        return HessianForm(self.objective.needed_likelihood(), f, batch.y)

    def _rows(self, outputs: tuple[int, ...]) -> int:
        *positions, C = outputs
        return math.prod(positions) * self.objective.needed_likelihood().rank(C)
