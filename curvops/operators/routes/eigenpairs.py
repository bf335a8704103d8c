"""Which algorithm answers `eigsh`.

sigma, P small                      dense eigendecomposition: shift-invert would solve an indefinite system per step
P small, products with a network    ARPACK; dense once ARPACK has spent the P products of a dense copy
anything else                       ARPACK, with sigma on solves with A − σI
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.linalg import eigenpairs
from curvops.linalg.results import Eigenpairs, OnFailure, Report, settle
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.routes.plan import (
    EIGH,
    MAX_DENSE,
    Plan,
    counted,
    dense_is_affordable,
    dense_need,
    dense_reason,
    product,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_ADVICE = 'Ask for fewer pairs, raise max_iters, or on_failure="warn" to take those found.'
# Restarts that ARPACK gets where a dense copy is the way out: about P products, each restart takes some tens.
_PRODUCTS_PER_RESTART = 40
_INNER_RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}


def eigsh(
    A: LinearOperator,
    k: int,
    *,
    which: Any,
    sigma: float | None,
    rtol: float,
    max_iters: int | None,
    generator: torch.Generator | None,
    progress: bool,
    on_failure: OnFailure,
) -> tuple[Eigenpairs, Report]:
    """See `LinearOperator.eigsh`."""
    Plan("ARPACK", "", eigsh, need=lambda: need(A, k, sigma)).started(A, "eigsh")
    spent = counted(A)
    if sigma is not None and _dense_for_shift(A):
        return _dense(A, k, which, sigma, _shift_reason(A))
    dense_later = max_iters is None and not A._holds_tensors() and dense_is_affordable(A)
    if dense_later:
        max_iters = max(4, A.shape[0] // _PRODUCTS_PER_RESTART)
    pairs, report = eigenpairs.eigsh(
        product(A), A.shape[0], k, which=which, sigma=sigma, solve=None if sigma is None else _shifted_solve(A, sigma),
        tol=rtol, max_iters=max_iters, generator=generator, dtype=A.dtype, device=A.device, progress=progress,
    )  # fmt: skip
    if not report.converged and dense_later:
        before = spent()[0]
        pairs, report = _dense(
            A, k, which, sigma, f"ARPACK did not settle in {before:,} products ({report.reason}); {dense_reason(A)}"
        )
    matvecs, seconds = spent()
    report = replace(report, matvecs=matvecs, seconds=seconds)
    settle(pairs, report, on_failure, _ADVICE)
    return pairs, report


def describe(A: LinearOperator) -> Plan:
    """What `explain("eigsh")` says; which of its roads is taken depends on sigma and on the run."""
    A._require_symmetric("eigsh")
    dense = not A._holds_tensors() and dense_is_affordable(A)
    later = ", and a dense eigendecomposition where it does not settle within about P products" if dense else ""
    reason = f"residuals recomputed, multiplicities completed{later}"
    return Plan("ARPACK (scipy.sparse.linalg.eigsh)", reason, eigsh, need=lambda: need(A, 6, None))


def need(A: LinearOperator, k: int, sigma: float | None) -> Need:
    """ARPACK's Krylov vectors and four more, its pairs and their products, in float64."""
    if sigma is not None and _dense_for_shift(A):
        return dense_need(A, EIGH)
    entries = (eigenpairs.krylov_vectors(A.shape[0], k) + 4 + 2 * k) * A.shape[0]
    return A._product_need(k).beside(8 * entries)


def _dense(A: LinearOperator, k: int, which: Any, sigma: float | None, reason: str) -> tuple[Eigenpairs, Report]:
    spent = counted(A)
    with torch.no_grad():
        pairs = eigenpairs.dense_eigsh(A.to_dense(), k, which=which, sigma=sigma)
    matvecs, seconds = spent()
    return pairs, Report(algorithm="dense eigendecomposition", matvecs=matvecs, seconds=seconds, reason=reason)


def _dense_for_shift(A: LinearOperator) -> bool:
    return dense_is_affordable(A) and A.shape[0] <= MAX_DENSE


def _shift_reason(A: LinearOperator) -> str:
    return f"P = {A.shape[0]:,}: eigenvalues near sigma are cheaper from a dense copy than from solves with A − σI"


def _shifted_solve(A: LinearOperator, sigma: float) -> Any:
    from curvops.operators.diagonal import Identity

    shifted = A - Identity(A.shape[0], A.dtype, A.device, sigma)
    # The solves' errors become the eigenvectors': they are asked for more than a solve's default.
    method = None if shifted._exact("solve") else methods.MINRES(rtol=_INNER_RTOL[A.dtype])

    def solve(B: Tensor) -> Tensor:
        with torch.no_grad():
            return shifted.solve(B, method)

    return solve
