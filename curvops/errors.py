"""Every exception and warning of curvops. Each message says what was given, what was expected, and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvops.linalg.results import Report


class CurvopsError(Exception):
    """Root of every error that curvops raises on purpose."""


class ShapeError(CurvopsError, ValueError):
    """A tensor of the wrong shape, dtype or device reached an operator."""


class DataError(CurvopsError, ValueError):
    """The data, the targets or the parameters cannot carry a curvature (empty, NaN, out of range, exhausted)."""


class NonDeterministicDataError(DataError):
    """A second pass over the data or the model did not repeat the first."""


class ConvergenceError(CurvopsError, RuntimeError):
    """An iteration or an estimator stopped short of its target.

    Attributes:
        value: The best value found, of the shape that the verb would have returned.
        report: The `SolveReport` or `EstimateReport` that says how far it came.
    """

    def __init__(self, message: str, value: Any = None, report: Report | None = None) -> None:
        super().__init__(message)
        self.value = value
        self.report = report


class NotPositiveDefiniteError(CurvopsError, ArithmeticError):
    """Positive definiteness was needed and is not known, or was disproved."""


class UnsupportedError(CurvopsError, NotImplementedError):
    """Something curvops does not do; the message names the class or call that does."""


class UnsupportedLayerError(UnsupportedError):
    """A layer that the chosen method cannot differentiate or factorise."""


class StaleOperatorError(CurvopsError, RuntimeError):
    """Parameters, buffers, data or modes changed since the operator was built."""


class MemoryBudgetError(CurvopsError, MemoryError):
    """A computation would need more memory than the budget allows."""


class MissingExtraError(CurvopsError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


class NumericalWarning(UserWarning):
    """A number is less certain than asked for, and says so."""


class PerformanceWarning(UserWarning):
    """A computation took a slower road than the one expected."""
