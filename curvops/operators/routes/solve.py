"""Which algorithm solves `A x = b`.

structure with a closed form            exact
tensors held, affordable                dense Cholesky, eigendecomposition where singular; LU where not symmetric
positive semidefinite                   conjugate gradients
symmetric                               MINRES
small                                   dense LU
anything else                           refused, with the door to SciPy's GMRES
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, NumericalWarning, ShapeError, UnsupportedError
from curvops.linalg import dense
from curvops.linalg.minres import minres
from curvops.linalg.results import SolveReport, settle
from curvops.operators import methods
from curvops.operators.autograd import implicit_solution
from curvops.operators.dense import Dense
from curvops.operators.functionspace import function_space
from curvops.operators.routes.plan import (
    Plan,
    counted,
    dense_is_affordable,
    dense_need,
    dense_reason,
    product,
    refuse_method,
    vectors,
)
from curvops.operators.routes.preconditioning import solve_cg

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Solution = tuple[Tensor, SolveReport]


def plan(A: LinearOperator, method: methods.Method | None, columns: int = 1) -> Plan:
    """The plan for `A.solve(b, method)`; its `run` takes b as columns, as many as announced."""
    if method is not None:
        return _plan_given(A, method, columns)
    closed_form = A._exact("solve")
    if closed_form:
        return _direct(A, closed_form, "closed form of the structure", A._solve)
    if A._holds_tensors() and dense_is_affordable(A):
        return _dense(A, dense_reason(A))
    if A.is_psd:
        return _iterative(A, methods.CG(), "positive semidefinite and matrix-free", columns)
    if A.is_symmetric:
        return _iterative(A, methods.MINRES(), "symmetric, not known to be positive semidefinite", columns)
    if dense_is_affordable(A):
        return _dense(A, dense_reason(A))
    raise UnsupportedError(
        f"solve: {A!r} is not symmetric, has no closed form and is too large for a dense LU; use "
        f"scipy.sparse.linalg.gmres or lsmr on A.to_scipy()."
    )


def _plan_given(A: LinearOperator, method: methods.Method, columns: int) -> Plan:
    reason = "asked for"
    if isinstance(method, methods.CG):
        if not A.is_symmetric:
            raise UnsupportedError(
                f"solve: CG needs a symmetric operator; {A!r} is not known to be. Use LU() or GMRES."
            )
        return _iterative(A, method, reason, columns)
    if isinstance(method, methods.MINRES):
        A._require_symmetric("solve by MINRES")
        return _iterative(A, method, reason, columns)
    if isinstance(method, methods.Cholesky):
        A._require_symmetric("solve by Cholesky")
        return _direct(A, "dense Cholesky", reason, lambda B: _by_cholesky(A, B), dense=True)
    if isinstance(method, methods.Eigh):
        A._require_symmetric("solve by Eigh")
        return _direct(
            A, "dense eigendecomposition", reason, lambda B: _dense_copy(A)._spectral()._solve(B), dense=True
        )
    if isinstance(method, methods.LU):
        return _direct(A, "dense LU", reason, lambda B: torch.linalg.solve(A.to_dense(), B), dense=True)
    if isinstance(method, methods.FunctionSpace):
        dual = function_space(A)
        assert dual is not None
        return _direct(A, dual.algorithm("solve"), reason, dual.solve)
    raise refuse_method("solve", method, "CG", "MINRES", "Cholesky", "Eigh", "LU", "FunctionSpace")


def _dense(A: LinearOperator, reason: str) -> Plan:
    name = "dense Cholesky" if A.is_symmetric else "dense LU"
    return _direct(A, name, reason, lambda B: _dense_copy(A)._solve(B), dense=True)


def _dense_copy(A: LinearOperator) -> Dense:
    return Dense(A.to_dense(), is_symmetric=A.is_symmetric)


def _by_cholesky(A: LinearOperator, B: Tensor) -> Tensor:
    L, jitter = dense.cholesky(A.to_dense())
    if jitter:
        warnings.warn(
            f"Cholesky of {A!r} succeeded only with {jitter:.2g} added to the diagonal, which is rounding of its "
            f"largest eigenvalue; the reported residual is that of the operator without it.",
            NumericalWarning,
            stacklevel=5,
        )
    return dense.solve_cholesky(L, B)


def _direct(
    A: LinearOperator, name: str, reason: str, solver: Callable[[Tensor], Tensor], *, dense: bool = False
) -> Plan:
    """A factorisation's answer, held to the residual of an iterative one, with a step of refinement if need be."""

    def run(B: Tensor) -> Solution:
        spent = counted(A)
        rtol = methods.SOLVE_RTOL[A.dtype]
        try:
            X = solver(B)
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefiniteError(
                f"solve: {A!r} is singular ({error}); add a diagonal, or use scipy.sparse.linalg.lsmr on A.to_scipy()."
            ) from None
        with torch.no_grad():
            residual = _relative_residual(A, X.detach(), B.detach())
            missed = not bool((residual <= rtol).all())
            correction = solver((B - A._apply(X)).detach()) if missed and bool(torch.isfinite(residual).all()) else None
        note = ""
        if correction is not None:
            X, note = X + correction, "; refined once"
            with torch.no_grad():
                residual = _relative_residual(A, X.detach(), B.detach())
                missed = not bool((residual <= rtol).all())
        if missed:
            note += f"; the relative residual is {float(residual.max()):.2g}, above {rtol:g}, for rounding in {A.dtype}"
        matvecs, seconds = spent()
        report = SolveReport(
            algorithm=name,
            reason=reason + note,
            matvecs=matvecs,
            seconds=seconds,
            residual=residual,
            converged=not missed,
        )
        settle(X, report, "raise", _DIRECT_ADVICE)
        return X, report

    return Plan(name, reason, run, need=(lambda: dense_need(A)) if dense else None)


_DIRECT_ADVICE = "Solve in float64 (A.to(torch.float64)), add a diagonal, or take the x that this error carries."


def _iterative(A: LinearOperator, method: methods.CG | methods.MINRES, reason: str, columns: int) -> Plan:
    name = type(method).__name__

    def run(B: Tensor) -> Solution:
        X, report = _certified(A, method, B.detach(), reason)
        settle(X, report, method.on_failure, _ADVICE[name])
        if torch.is_grad_enabled() and (B.requires_grad or A._requires_grad()):
            # A refined X is float64 beside a float32 operator; its gradients are of the operator's precision.
            residual = A._apply(X.to(A.dtype)) - B
            X = implicit_solution(residual, X, lambda G: _certified_or_raise(A, method, G.to(A.dtype)).to(A.dtype))
        return X, report

    held = _SOLVER_VECTORS[name] * columns
    return Plan(name, reason, run, need=lambda: A._product_need(columns).beside(vectors(A, held)))


_SOLVER_VECTORS = {"CG": 7, "MINRES": 10}
"""Vectors a column: right-hand side as given and scaled, iterate and best iterate, recurrences, answer."""

_ADVICE = {
    "CG": "Raise max_iters or rtol, give a preconditioner (Nystrom()), use Cholesky() if P allows, or "
    'on_failure="warn" to take the best x.',
    "MINRES": "Raise max_iters or rtol, add a diagonal, use Eigh() if P allows, or "
    'on_failure="warn" to take the best x.',
}


def _certified_or_raise(A: LinearOperator, method: methods.CG | methods.MINRES, G: Tensor) -> Tensor:
    X, report = _certified(A, method, G.detach(), "gradient of a solve")
    settle(X, report, method.on_failure, _ADVICE[type(method).__name__])
    return X


def _certified(A: LinearOperator, method: methods.CG | methods.MINRES, B: Tensor, reason: str) -> Solution:
    rtol = methods.SOLVE_RTOL[A.dtype] if method.rtol is None else method.rtol
    x0 = None if method.x0 is None else A._columns(method.x0.detach(), A.shape[1])
    if x0 is not None and x0.shape != B.shape:
        raise ShapeError(f"solve: x0 has {x0.shape[1]} columns and b has {B.shape[1]}; expected the same.")
    if isinstance(method, methods.MINRES):
        X, report = minres(product(A), B, rtol=rtol, max_iters=method.max_iters, x0=x0)
    else:
        X, report = solve_cg(A, method, B, rtol=rtol, x0=x0)
    return X, _with_reason(report, reason)


def _with_reason(report: SolveReport, reason: str) -> SolveReport:
    return replace(report, reason=f"{reason}; {report.reason}" if report.reason else reason)


def _relative_residual(A: LinearOperator, X: Tensor, B: Tensor) -> Tensor:
    norms = B.norm(dim=0)
    return (B - A._apply(X)).norm(dim=0) / torch.where(norms == 0, 1.0, norms)
