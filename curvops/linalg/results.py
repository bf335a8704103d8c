"""What the algorithms say of their answers: frozen reports, eigenpairs, and the one place where a miss becomes loud."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvops.errors import ConvergenceError, NumericalWarning

OnFailure = Literal["raise", "warn"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Which algorithm answered, at what cost, and why it was chosen.

    Attributes:
        algorithm: Name of the algorithm that ran.
        matvecs: Products with the operator, counted in columns.
        seconds: Wall-clock time.
        reason: Why this algorithm, and what limited it.
        converged: Whether the target was met (exact routes: True).
    """

    algorithm: str
    matvecs: int = 0
    seconds: float = 0.0
    reason: str = ""
    converged: bool = True


@dataclass(frozen=True, kw_only=True)
class SolveReport(Report):
    """Report of a linear solve.

    Attributes:
        iterations: Iterations of the slowest column (0 for direct solves).
        residual: `(K,)` true relative residuals ‖b − Ax‖/‖b‖, recomputed at the end; `()` for a single vector.
        attainable: Smallest relative residual that the storage's rounding allows, `2u‖A‖‖x‖/‖b‖`; None where not
            estimated.
    """

    iterations: int = 0
    residual: Tensor = field(default_factory=lambda: torch.zeros(()))
    attainable: float | None = None

    @property
    def worst_residual(self) -> float:
        """Largest relative residual over the columns."""
        return float(self.residual.max()) if self.residual.numel() else 0.0


@dataclass(frozen=True, kw_only=True)
class EstimateReport(Report):
    """Report of a number (or a vector of numbers) with its uncertainty.

    Attributes:
        value: The estimate; float, or a tensor for a diagonal.
        stderr: Monte-Carlo standard error of `value` (0 for exact routes).
        bracket: `(low, high)` between which quadrature puts the mean over the probes used; equal ends where exact.
        half_width: t₀.₉₇₅(m−1)·stderr + ½·(high − low): value ± half_width is the claim.
        probes: Number of random probe vectors.
        steps: Lanczos steps per probe.
        seed: Seed of the probes; None for exact routes or where a generator was given.
        gradient_stderr: `(*inputs) → ` standard error of the value's gradient with respect to each of the tensors
            `inputs`, of their shapes; None where the gradient is exact or none was asked.
    """

    value: Any = None
    stderr: Any = 0.0
    bracket: tuple[Any, Any] = (None, None)
    half_width: Any = 0.0
    probes: int = 0
    steps: int = 0
    seed: int | None = None
    gradient_stderr: Callable[..., tuple[Tensor, ...]] | None = field(default=None, repr=False, compare=False)

    def carried(self, value: Any, factor: float) -> EstimateReport:
        """The report of a number, or of numbers, that contain `factor` times the reported one and nothing else random.

        Args:
            value: The number, a float or a tensor.
            factor: What the reported number was multiplied with.
        """
        if isinstance(value, Tensor):
            value = value.detach() if value.dim() else float(value.detach())
        offset = value - factor * self.value
        low, high = self.bracket
        ends = (None, None)
        if low is not None:
            first, second = offset + factor * low, offset + factor * high
            ends = (first, second) if factor > 0 else (second, first)
        scale = abs(factor)
        return replace(self, value=value, stderr=scale * self.stderr, half_width=scale * self.half_width, bracket=ends)

    @staticmethod
    def exact(value: Any, algorithm: str, reason: str = "", matvecs: int = 0, seconds: float = 0.0) -> EstimateReport:
        """Report of a number without uncertainty."""
        return EstimateReport(
            algorithm=algorithm, reason=reason, value=value, bracket=(value, value), matvecs=matvecs, seconds=seconds
        )


@dataclass(frozen=True)
class Eigenpairs:
    """`values` (k,) ascending, `vectors` (P, k) orthonormal, `residuals` (k,) ‖A v − λ v‖₂."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def __iter__(self) -> Any:
        return iter((self.values, self.vectors, self.residuals))


def settle(value: Any, report: Report, on_failure: OnFailure, advice: str) -> None:
    """Raise `ConvergenceError` (or warn) unless the report says that the target was met.

    Args:
        value: Best value found, carried by the error.
        report: Report whose `converged` decides.
        on_failure: "raise" or "warn".
        advice: What the user can do about it; appended to the report's reason.
    """
    if report.converged:
        return
    message = f"{report.algorithm}: {report.reason} {advice}".strip()
    if on_failure == "warn":
        warnings.warn(message, NumericalWarning, stacklevel=4)
        return
    raise ConvergenceError(message, value, report)
