"""Algorithms as frozen values, to be passed as `method=`; there are no global settings.

A field left at None takes the default of the operator's dtype and of the verb. `on_failure="warn"` turns the
`ConvergenceError` of a missed target into a `NumericalWarning`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from curvops.linalg.results import OnFailure

SOLVE_RTOL = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative residual that an iterative solve reaches by default, per dtype, in the worst column."""


@dataclass(frozen=True)
class Method:
    """Base of every method value: checks the fields that all of them share."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            if name in ("rtol", "atol") and not value > 0:
                raise ValueError(f"{type(self).__name__}({name}={value}): expected a number above 0.")
            if name in ("probes", "steps", "rank", "max_iters") and not (type(value) is int and value >= 1):
                raise ValueError(f"{type(self).__name__}({name}={value}): expected a whole number of at least 1.")
            if name == "on_failure" and value not in ("raise", "warn"):
                raise ValueError(f'{type(self).__name__}(on_failure={value!r}): expected "raise" or "warn".')

    def __str__(self) -> str:
        """The value as the user would write it, defaults left out."""
        given = (f for f in fields(self) if getattr(self, f.name) is not f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={_short(getattr(self, f.name))}' for f in given)})"


@dataclass(frozen=True)
class CG(Method):
    """Conjugate gradients on all right-hand sides at once, for positive (semi)definite operators.

    Attributes:
        rtol: Relative residual ‖b − Ax‖/‖b‖ of the worst column; 1e-6 in float64, 1e-4 in float32 by default.
        max_iters: Iterations at most.
        preconditioner: None, "auto", `Nystrom(rank)`, or any operator with an exact `solve`.
        x0: Starting point of b's shape.
        refine: Take residuals from a float64 twin of parameters and data (for float32 operators).
    """

    rtol: float | None = None
    max_iters: int | None = None
    preconditioner: Any = None
    x0: Tensor | None = None
    refine: bool = False
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class MINRES(Method):
    """Minimal residuals (Paige and Saunders 1975) for symmetric operators, indefinite ones too."""

    rtol: float | None = None
    max_iters: int | None = None
    x0: Tensor | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class Cholesky(Method):
    """Dense Cholesky factorisation; the jitter that rounding made necessary, if any, is reported."""


@dataclass(frozen=True)
class Eigh(Method):
    """Dense symmetric eigendecomposition."""


@dataclass(frozen=True)
class LU(Method):
    """Dense LU factorisation, for operators that are not symmetric."""


@dataclass(frozen=True)
class FunctionSpace(Method):
    """Woodbury and the determinant lemma through the Gram operator `B Bᵀ` of a curvature `BᵀB` with a diagonal."""


@dataclass(frozen=True)
class SLQ(Method):
    """Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017), with a Gauss/Gauss–Radau bracket.

    With `probes` and `steps` and no target, runs exactly those and reports its half-width.
    """

    probes: int | None = None
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    generator: torch.Generator | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class Lanczos(Method):
    """`f(A) v` from the Krylov space of v; with `steps`, exactly that depth at most."""

    steps: int | None = None
    rtol: float | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class Hutchinson(Method):
    """Random ±1 probes for traces and diagonals (Hutchinson 1989; Bekas, Kokiopoulou and Saad 2007)."""

    probes: int | None = None
    rtol: float | None = None
    generator: torch.Generator | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class XTrace(Method):
    """Leave-one-out trace estimator (Epperly, Tropp and Webber 2024)."""

    probes: int | None = None
    rtol: float | None = None
    generator: torch.Generator | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class XDiag(Method):
    """Leave-one-out diagonal estimator (Epperly, Tropp and Webber 2024)."""

    probes: int | None = None
    rtol: float | None = None
    generator: torch.Generator | None = None
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class PerturbAndSolve(Method):
    """Samples of N(0, A⁻¹) as `A⁻¹(Bᵀε₁ + D^½ε₂)` for `A = BᵀB + D` (Papandreou and Yuille 2010)."""

    rtol: float = 1e-2
    on_failure: OnFailure = "raise"


@dataclass(frozen=True)
class Nystrom(Method):
    """Randomised Nyström preconditioner (Frangella, Tropp and Udell 2023); rank grown when None."""

    rank: int | None = None
    generator: torch.Generator | None = None


MethodName = Literal["auto"]


def _short(value: Any) -> str:
    return f"<{tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)
