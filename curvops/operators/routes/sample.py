"""Which algorithm draws from N(0, A⁻¹).

structure with a closed form                    a root of A⁻¹, exact
curvature BᵀB + D, n < P small                  function space (Matheron's rule), exact
tensors held or P small                         dense Cholesky, exact
curvature BᵀB + D, D positive                   perturb and solve: A z = Bᵀε₁ + D^½ε₂, CG from the prior draw
positive definite                               A^-½ ε by Lanczos
anything else                                   refused
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import UnsupportedError
from curvops.linalg.results import Report, settle
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import definite_cholesky
from curvops.operators.diagonal import diagonal_of
from curvops.operators.functionspace import function_space
from curvops.operators.routes import function
from curvops.operators.routes.definiteness import indefinite
from curvops.operators.routes.plan import (
    Plan,
    chosen_at_run,
    counted,
    dense_is_affordable,
    dense_need,
    dense_reason,
    refuse_method,
    resolvable,
    vectors,
)
from curvops.operators.routes.preconditioning import solve_cg

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Noise = Callable[[int], Tensor]
"""`rows → (rows, n)` independent standard normal numbers, new at every call."""

_LANCZOS_RTOL = 1e-3
"""Error of a draw by Lanczos, relative to its length: far below what any number of draws can tell."""

_DRAW_VECTORS = 10
"""Vectors a draw: those of CG, the perturbation, the noise and the start; the preconditioner's sketch comes on top."""

_ADVICE = 'Give a larger rtol or damping, or on_failure="warn" to take the draws with the residuals reported.'


def plan(A: LinearOperator, method: methods.Method | None, draws: int = 1) -> Plan:
    """The plan for so many draws; its `run` takes a source of noise and returns `(P, n)` and a report."""
    A._require_symmetric("sample")
    if method is not None:
        return _plan_given(A, method, draws)
    closed_form = A._exact("sample")
    if closed_form:
        return _exact(A, closed_form, "closed form of the structure", lambda noise: A._inverse_root(noise(A.shape[0])))
    dual = function_space(A, must=False) if not A._holds_tensors() else None
    if dual is not None and dual.known_rows is None:
        return chosen_at_run(dual, "sample", lambda: plan(A, None, draws))
    if dual is not None and dual.is_affordable() and dual.rows < A.shape[0]:
        return _exact(A, dual.algorithm("sample"), f"n = {dual.rows:,} < P = {A.shape[0]:,}", dual.sample, dual.need)
    if dense_is_affordable(A):
        return _cholesky(A, dense_reason(A))
    if has_factors(A):
        return _perturb(A, methods.PerturbAndSolve(), "a sum of curvatures with factors and a positive diagonal", draws)
    return _lanczos(A, methods.Lanczos(), "positive definite and matrix-free", draws)


def _plan_given(A: LinearOperator, method: methods.Method, draws: int) -> Plan:
    reason = "asked for"
    if isinstance(method, methods.Cholesky):
        return _cholesky(A, reason)
    if isinstance(method, methods.PerturbAndSolve):
        if not has_factors(A):
            raise UnsupportedError(
                f"PerturbAndSolve() needs a sum of curvatures with factors (GGN, MCFisher, EmpiricalFisher, Kronecker, "
                f"low rank) and a positive diagonal; got {A!r}. Use Lanczos() or Cholesky()."
            )
        return _perturb(A, method, reason, draws)
    if isinstance(method, methods.FunctionSpace):
        dual = function_space(A)
        assert dual is not None
        return _exact(A, dual.algorithm("sample"), reason, dual.sample, dual.need)
    if isinstance(method, methods.Lanczos | methods.Eigh):
        return _lanczos(A, method, reason, draws)
    raise refuse_method("sample", method, "Cholesky", "Eigh", "FunctionSpace", "PerturbAndSolve", "Lanczos")


def _exact(
    A: LinearOperator,
    name: str,
    reason: str,
    draw: Callable[[Noise], Tensor],
    need: Callable[[], Need] | None = None,
) -> Plan:
    def run(noise: Noise) -> tuple[Tensor, Report]:
        spent = counted(A)
        Z = draw(noise)
        matvecs, seconds = spent()
        return Z, Report(algorithm=name, reason=reason, matvecs=matvecs, seconds=seconds)

    return Plan(name, reason, run, need=need)


def _cholesky(A: LinearOperator, reason: str) -> Plan:
    def draw(noise: Noise) -> Tensor:
        operator, _ = resolvable(A)
        L = definite_cholesky(operator.to_dense())
        E = noise(A.shape[0]).to(L.dtype)
        return torch.linalg.solve_triangular(L.T, E, upper=True).to(A.dtype)

    return _exact(A, "dense Cholesky", reason, draw, lambda: dense_need(A))


def _lanczos(
    A: LinearOperator,
    method: methods.Lanczos | methods.Eigh,
    reason: str,
    draws: int,
    established: float | None = None,
) -> Plan:
    bound = A.lower_bound if established is None else established
    if isinstance(method, methods.Lanczos) and (bound is None or bound <= 0):
        return indefinite(A, "sample", reason, lambda found, why: _lanczos(A, method, why, draws, found))
    if isinstance(method, methods.Lanczos) and method.steps is None and method.rtol is None:
        method = replace(method, rtol=_LANCZOS_RTOL)
    inner = function.plan_power(A, -0.5, method, bound, draws)
    return Plan(inner.algorithm, reason, lambda noise: inner.run(noise(A.shape[0])), need=inner.need)


def _perturb(A: LinearOperator, method: methods.PerturbAndSolve, reason: str, draws: int) -> Plan:
    def run(noise: Noise) -> tuple[Tensor, Report]:
        spent = counted(A)
        B, X0 = _perturbation(A, noise)
        X, report = solve_cg(A, methods.CG(preconditioner="auto"), B, rtol=method.rtol, x0=X0)
        matvecs, seconds = spent()
        report = replace(
            report, algorithm="PerturbAndSolve", matvecs=matvecs, seconds=seconds, reason=f"{reason}; {report.reason}"
        )
        settle(X, report, method.on_failure, _ADVICE)
        return X, report

    def need() -> Need:
        return A._product_need(draws).beside(vectors(A, _DRAW_VECTORS * draws), grows=True)

    return Plan("PerturbAndSolve", reason, run, need=need)


def has_factors(A: LinearOperator) -> bool:
    """Whether a vector of covariance A can be drawn term by term, one term being a positive diagonal."""
    if isinstance(A, BlockDiagonal):
        return all(has_factors(block) for block in A.blocks)
    terms = _terms(A)
    diagonals = [term for term in terms if diagonal_of(term) is not None]
    positive = any(term.lower_bound is not None and term.lower_bound > 0 for term in diagonals)
    return positive and all(
        diagonal_of(term) is not None or term._factor() is not None or (term._has_spectral() and term.is_psd)
        for term in terms
    )


def _perturbation(A: LinearOperator, noise: Noise) -> tuple[Tensor, Tensor]:
    """Columns b of covariance A, and the draws from the diagonal term alone that start CG."""
    if isinstance(A, BlockDiagonal):
        pairs = [_perturbation(block, noise) for block in A.blocks]
        return torch.cat([B for B, _ in pairs]), torch.cat([start for _, start in pairs])
    B, start = None, None
    for term in _terms(A):
        d = diagonal_of(term)
        factor = None if d is not None else term._factor()
        if d is not None:
            share = d.sqrt()[:, None] * noise(len(d))
            if bool((d > 0).all()):
                start = share / d[:, None]
        elif factor is not None:
            share = factor._rapply(noise(factor.shape[0]))
        else:
            share = term._spectral()._power(0.5)._matmat(noise(term.shape[0]))
        B = share if B is None else B + share
    assert B is not None
    assert start is not None
    return B, start


def _terms(A: LinearOperator) -> tuple[LinearOperator, ...]:
    from curvops.operators.composites import Sum

    return A.terms if isinstance(A, Sum) else (A,)
