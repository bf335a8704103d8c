"""Diagonals of curvatures, exact: `diag(Σ Jᵀ Λ J) = Σ_kn (Jᵀ u_kn)²`, squared before the examples are summed.

Without weight sharing the squares of a layer's gradients are `(Σ_k g_k²) (a²)ᵀ`: one matrix product for all columns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.fisher import Datum
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective, Options
from curvops.linalg.results import EstimateReport
from curvops.nets.squares import SquareSums
from curvops.operators.base import LinearOperator
from curvops.operators.deferred import Deferred
from curvops.operators.diagonal import Diagonal
from curvops.operators.formula import size_text
from curvops.operators.methods import Hutchinson, XDiag


class _DataDiagonal(Deferred):
    """A diagonal `(P, P)` computed from the data at first need."""

    def __init__(self, objective: Objective, watch: LinearOperator, *, is_psd: bool) -> None:
        P = objective.selection.size
        super().__init__(
            None, Diagonal, (P, P), objective.selection.dtype, objective.selection.device,
            label=size_text([P]), watch=watch, is_symmetric=True, is_psd=is_psd, layout=objective.layout,
            memory_budget=objective.memory_budget,
        )  # fmt: skip
        self.objective = objective


class _GaussNewtonDiagonal(_DataDiagonal):
    @classmethod
    def of(cls, objective: Objective, cotangents: Cotangents) -> Self:
        """The diagonal over an objective that is already there."""
        diagonal = cls.__new__(cls)
        diagonal._begin(objective, cotangents)
        return diagonal

    def _begin(self, objective: Objective, cotangents: Cotangents) -> None:
        objective.needed_likelihood()
        _DataDiagonal.__init__(self, objective, cotangents.operator(objective), is_psd=True)
        self.cotangents = cotangents

    def _built(self) -> LinearOperator:
        exact = self.cotangents.fisher == "exact"
        layers = LayerPass(self.objective, self.cotangents, stacked=exact, narrow=True)
        selection = self.objective.selection
        sums = SquareSums(selection.sizes, selection.tensors[0])
        with torch.no_grad():
            for step in layers:
                sums.add(step.factors, hold=step.hold)
                if step.last:
                    sums.flush()
        if layers.fallback:
            self.note = f"per-example rows for {', '.join(layers.fallback)}"
        return Diagonal(selection.gather(torch.cat(sums.values)))


class DiagonalGGN(_GaussNewtonDiagonal):
    """The diagonal of the GGN, or of a Monte-Carlo Fisher, summed over the data; never a B x C x P Jacobian.

    Args:
        model, likelihood, data, options: As for `GGN`.
        fisher: "exact", or "mc" for sampled targets, whose mean over draws is exact.
        num_samples: Samples per datum for "mc", averaged. In a sequence the positions' samples are pulled back
            together, which leaves the mean as it is.
        generator: Gives the seed of the samples when the operator is built (and so advances); None for seed 0.

    Cost: one forward, C backward passes through the activations alone, and one product per layer (Linear) or C of them
    (convolutions; with the inputs of those outputs alone that max pooling has chosen); T·C passes for sequences
    `(B, T, C)`. Memory O(activations · C), in chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        fisher: Literal["exact", "mc"] = "exact",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        if fisher == "empirical":
            raise ValueError('DiagonalGGN(fisher="empirical"): use DiagonalEF.')
        cotangents = Cotangents.chosen("DiagonalGGN", fisher, num_samples, generator)
        self._begin(Objective(model, likelihood, data, **options), cotangents)


class DiagonalEF(_GaussNewtonDiagonal):
    """The diagonal of the empirical Fisher, `Σ (∇log p)²`, summed over the data.

    Args:
        model, likelihood, data, options: As for `GGN`.
        datum: As for `EmpiricalFisher`.

    Cost: one forward, one backward through the activations (T of them for `datum="token"` and sequences), and one
    product per layer.
    """

    def __init__(
        self, model: nn.Module, likelihood: Any, data: Any, *, datum: Datum = "token", **options: Unpack[Options]
    ) -> None:
        cotangents = Cotangents.chosen("DiagonalEF", "empirical", datum=datum)
        self._begin(Objective(model, likelihood, data, **options), cotangents)


class DiagonalHessian(_DataDiagonal):
    """The diagonal of the Hessian: exact by columns where a dense copy is affordable, otherwise estimated to 5 %.

    Args:
        model, likelihood, data, options: As for `GGN`.
        method: `XDiag(…)` or `Hutchinson(…)` to estimate; None to choose.

    Attributes:
        report: `EstimateReport` of the diagonal, standard error per entry where estimated; None until computed.

    Cost: P Hessian-vector products if exact.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        method: XDiag | Hutchinson | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._begin(Objective(model, likelihood, data, **options), method)

    @classmethod
    def of(cls, objective: Objective, method: XDiag | Hutchinson | None = None) -> Self:
        """The diagonal over an objective that is already there."""
        diagonal = cls.__new__(cls)
        diagonal._begin(objective, method)
        return diagonal

    def _begin(self, objective: Objective, method: XDiag | Hutchinson | None) -> None:
        objective.needed_likelihood()
        self.hessian = Hessian.of(objective)
        _DataDiagonal.__init__(self, objective, self.hessian, is_psd=False)
        self.method = method
        self.report: EstimateReport | None = None

    def _built(self) -> LinearOperator:
        report: EstimateReport
        value, report = self.hessian.diagonal(self.method, return_report=True)
        self.hessian.release()
        self.report = report
        self.note = None if report.seed is None else f"estimated by {report.algorithm}"
        return Diagonal(value)
