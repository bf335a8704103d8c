"""The Gaussian N(μ, A⁻¹) of a Laplace approximation: samples, densities, predictives and evidence from its precision.

log p(D) ≈ −loss − log_normaliser − ½ (μ−μ₀)ᵀ D (μ−μ₀) + ½ log det D − ½ log det A          (MacKay 1992)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree.crossgram import functional_covariance
from curvops.curvature.matrixfree.jacobian import Jacobian
from curvops.errors import NumericalWarning, ShapeError
from curvops.linalg.results import Report, SolveReport
from curvops.operators.base import LinearOperator, Scalar, verb
from curvops.operators.composites import Sum
from curvops.operators.diagonal import damping, diagonal_of
from curvops.operators.functionspace import FunctionSpaceForm, function_space
from curvops.operators.lowrank import LowRank
from curvops.operators.methods import Method
from curvops.operators.routes import sample
from curvops.operators.routes.plan import dense_is_affordable


class Gaussian:
    """N(mean, precision⁻¹) over the P parameters, never with a P x P tensor unless the precision is one.

    Args:
        mean: `(P,)`.
        precision: P x P symmetric positive definite operator, e.g. `GGN + δI`.
        generator: Source of the draws; None for a private one, seeded by the operating system. It advances, so that
            every call gives fresh samples.

    Raises:
        ShapeError: The mean and the precision do not fit.
    """

    def __init__(
        self, mean: Float[Tensor, " P"], precision: LinearOperator, generator: torch.Generator | None = None
    ) -> None:
        precision._require_symmetric("Gaussian")
        if not isinstance(mean, Tensor) or tuple(mean.shape) != (precision.shape[0],):
            raise ShapeError(
                f"Gaussian: the mean has shape {tuple(getattr(mean, 'shape', ()))}, expected ({precision.shape[0]},) "
                f"for the precision {precision!r}."
            )
        precision._columns(mean, precision.shape[0])
        self.mean, self.precision = mean, precision
        self.generator = _fresh_generator() if generator is None else generator
        _warn_of_missing_mass(precision)

    def __repr__(self) -> str:
        return f"Gaussian(P={self.precision.shape[0]:,}, precision={self.precision!r})"

    # ---------------------------------------------------------------- samples

    def sample(self, n: int = 1, method: Method | None = None, *, return_report: bool = False) -> Any:
        """n draws, `(n, P)`; with `return_report`, and the report of how.

        Args:
            n: Number of draws, made in one block.
            method: `Cholesky`, `Eigh`, `FunctionSpace`, `PerturbAndSolve(rtol)` or `Lanczos(steps)`; None to choose
                (see `explain`).

        Raises:
            NotPositiveDefiniteError: The precision is not positive definite, or not known to be.
            ConvergenceError: The iterative route did not reach its target.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"sample(n={n}): expected a whole number of at least 1.")
        deviations, report = self._deviations(n, method)
        samples = self.mean + deviations.T
        return (samples, report) if return_report else samples

    def explain(self) -> str:
        """Which algorithm `sample` would use, and why."""
        return self.precision.explain("sample")

    # ---------------------------------------------------------------- densities

    def log_prob(self, x: Float[Tensor, "*n P"], *, return_report: bool = False) -> Any:
        """log N(x; mean, precision⁻¹), 0-dim for `(P,)` and `(n,)` for `(n, P)`."""
        rows = x.unsqueeze(0) if x.dim() == 1 else x
        deviations = (rows - self.mean).T
        quadratic = self.precision.quadratic_form(deviations)
        logdet, report = self.precision.logdet(return_report=True)
        value = 0.5 * logdet - 0.5 * self.precision.shape[0] * math.log(2 * math.pi) - 0.5 * quadratic
        value = value[0] if x.dim() == 1 else value
        return (value, report.carried(value, 0.5)) if return_report else value

    def log_evidence(
        self,
        loss: Scalar,
        prior_precision: Scalar | Mapping[str, Scalar],
        prior_mean: Scalar = 0.0,
        log_normaliser: Scalar = 0.0,
        *,
        method: Method | None = None,
        return_report: bool = False,
    ) -> Any:
        """Laplace's log evidence with the prior N(prior_mean, D⁻¹), a 0-dim tensor.

        Args:
            loss: Σ −log p(y | f) without constants at the mean, what `full` returns.
            prior_precision: D: a scalar, a `(P,)` tensor, or a dict of them by parameter name. It should be what the
                precision was damped with.
            prior_mean: Scalar or `(P,)`.
            log_normaliser: Constants left out of the loss (`likelihood.log_normaliser(n, C)`).
            method: How log det A is found; None to choose.

        Raises:
            ConvergenceError: log det A was estimated and its target not met.
        """
        D = damping(prior_precision, self.precision)
        logdet, report = self.precision.logdet(method, return_report=True)
        distance = D.quadratic_form(self.mean - prior_mean)
        value = -loss - log_normaliser - 0.5 * distance + 0.5 * D.logdet() - 0.5 * logdet
        value = torch.as_tensor(value)
        return (value, report.carried(value, -0.5)) if return_report else value

    def marginal_variance(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """diag(A⁻¹), `(P,)`; exact where structure or size allow, otherwise estimated to 5 % by solves."""
        return self.precision.inverse().diagonal(method, return_report=return_report)

    # ---------------------------------------------------------------- predictive

    @verb
    def predictive(
        self, J: Jacobian, samples: int | None = None, *, joint: bool = False, return_report: bool = False
    ) -> Any:
        """Mean `(N, C)` and covariance `(N, C, C)` of the linearised network's outputs, without observation noise.

        Args:
            J: `Jacobian(model, data)` at the mean; over its data the outputs are predicted.
            samples: Estimate the covariance from so many draws instead of solving for it.
            joint: The covariance between all outputs of all data, `(N·C, N·C)`, rows in the order of the data.
            return_report: Return `(mean, covariance, report)`: a `SolveReport` where solves were iterated.

        For sequences the outputs of a datum are its T·C entries: `(N, T, C)` and `(N, T·C, T·C)`. Never an N x C x P
        tensor: rows of J come in chunks that fit into the memory budget.

        Cost: in function space one factorisation and, where the layers give inner products of gradients, no vector of
            P entries; otherwise N·C solves, on one factorisation where there is one; with `samples`, that many draws
            and products.
        """
        if not isinstance(J, Jacobian):
            raise ShapeError(f"predictive: got {type(J).__name__}, expected a Jacobian(model, data).")
        if J.shape[1] != self.precision.shape[0]:
            raise ShapeError(f"predictive: {J!r} has {J.shape[1]} columns, expected {self.precision.shape[0]}.")
        mean = J.outputs
        if samples is not None:
            covariance, report = self._sampled_covariance(J, len(mean), samples, joint)
        else:
            with torch.no_grad():
                covariance, report = self._solved_covariance(J, mean.numel(), joint)
        return (mean, covariance, report) if return_report else (mean, covariance)

    @verb
    def functional_covariance(self, rows: Float[Tensor, "*n P"], *, return_report: bool = False) -> Any:
        """`R A⁻¹ Rᵀ` of given rows R, `(n, P)` → `(n, n)` or `(b, n, P)` → `(b, n, n)`; differentiable.

        Args:
            rows: Such as Jacobians of a few data.
            return_report: Return `(covariance, report)`.
        """
        size = self.precision.shape[0]
        if not isinstance(rows, Tensor) or rows.dim() not in (2, 3) or rows.shape[-1] != size:
            given = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ShapeError(f"functional_covariance: got rows {given}, expected (n, {size}) or (b, n, {size}).")
        columns = rows.reshape(-1, size).T
        Z, report = self._solver(max(2, columns.shape[1]), self._dual())(columns)
        covariance = rows @ Z.T.reshape(rows.shape).transpose(-1, -2)
        covariance = (covariance + covariance.transpose(-1, -2)) / 2
        return (covariance, report) if return_report else covariance

    # ---------------------------------------------------------------- inside

    @verb
    def _deviations(self, n: int, method: Method | None) -> Any:
        def noise(rows: int) -> Tensor:
            device = self.generator.device
            draw = torch.randn(rows, n, generator=self.generator, dtype=self.precision.dtype, device=device)
            return draw.to(self.precision.device)

        with torch.no_grad():
            return sample.plan(self.precision, method, n).started(self.precision, "sample")(noise)

    def _sampled_covariance(self, J: Jacobian, count: int, samples: int, joint: bool) -> tuple[Tensor, Report]:
        deviations, report = self._deviations(samples, None)
        F = J @ deviations
        F = F if joint else F.reshape(count, -1, samples)
        return F @ F.transpose(-1, -2) / samples, report

    def _solved_covariance(self, J: Jacobian, columns: int, joint: bool) -> tuple[Tensor, Report]:
        began, A = time.perf_counter(), self.precision
        dual = self._dual()
        covariance = None if dual is None else functional_covariance(J, dual, joint=joint)
        if dual is not None and covariance is not None:
            name, reason = dual.algorithm("solve"), f"n = {dual.rows:,} < P = {A.shape[0]:,}; inner products by layers"
            report: Report = Report(algorithm=name, reason=reason)
        else:
            solve = self._solver(columns, dual)
            blocks, reports = [], []
            for rows in J.row_blocks():
                count, event, size = rows.shape
                Z, found = solve(rows.reshape(-1, size).T)
                reports.append(found)
                blocks.append(J @ Z if joint else torch.einsum("brp,pbs->brs", rows, Z.reshape(size, count, event)))
            covariance, report = torch.cat(blocks, 1 if joint else 0), _worst(reports)
        covariance = (covariance + covariance.transpose(-1, -2)) / 2
        return covariance, replace(report, seconds=time.perf_counter() - began)

    def _dual(self) -> FunctionSpaceForm | None:
        """The precision in function space, where that is the road."""
        A = self.precision
        dual = function_space(A, must=False) if not A._holds_tensors() else None
        return dual if dual is not None and dual.is_affordable() and dual.rows < A.shape[0] else None

    def _solver(self, columns: int, dual: FunctionSpaceForm | None) -> Callable[[Tensor], tuple[Tensor, Report]]:
        """`B → A⁻¹ B`, factorised once where that is cheaper than solving afresh for each block."""
        A = self.precision
        closed_form = A._exact("solve")
        if closed_form:
            return lambda B: (A._solve(B), Report(algorithm=closed_form))
        if dual is not None:
            return lambda B: (dual.solve(B), Report(algorithm=dual.algorithm("solve")))
        if dense_is_affordable(A) and columns > 1:
            from curvops.operators.dense import Dense

            copy = Dense(A.to_dense(), is_symmetric=True)
            return lambda B: (copy._solve(B), Report(algorithm="dense Cholesky"))
        return lambda B: A.solve(B, return_report=True)

    def _watched(self) -> Iterator[LinearOperator]:
        return self.precision._watched()


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _worst(reports: Sequence[Report]) -> Report:
    """One report for all blocks: the residuals of every column, products and iterations added up."""
    last = reports[-1]
    if not isinstance(last, SolveReport):
        return last
    solves = [report for report in reports if isinstance(report, SolveReport)]
    return replace(
        last,
        residual=torch.cat([report.residual.reshape(-1) for report in solves]),
        iterations=max(report.iterations for report in solves),
        matvecs=sum(report.matvecs for report in solves),
    )


def _warn_of_missing_mass(precision: LinearOperator) -> None:
    """A truncated curvature leaves the prior where mass was cut off; say so where what was cut off may matter."""
    if not isinstance(precision, Sum):
        return
    kept = [term for term in precision.terms if isinstance(term, LowRank) and term.captured is not None]
    diagonals = [d for d in map(diagonal_of, precision.terms) if d is not None]
    if not kept or not diagonals:
        return
    smallest, delta = float(kept[0]._spectral().values.min()), float(diagonals[0].detach().max())
    if kept[0].captured < 1.0 and smallest > delta:  # type: ignore[operator]
        warnings.warn(
            f"the low-rank curvature keeps eigenvalues down to {smallest:.3g}, above the prior precision {delta:.3g}: "
            f"directions of curvature between the two were cut off and are given the prior's variance; raise the rank.",
            NumericalWarning,
            stacklevel=3,
        )
