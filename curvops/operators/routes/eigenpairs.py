"""Eigenpairs of an operator: dense where that is cheaper, otherwise ARPACK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from curvops.linalg import eigenpairs
from curvops.linalg.results import Eigenpairs, OnFailure, Report, settle
from curvops.operators.routes.plan import Plan, dense_is_affordable, product

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


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
    options: dict[str, Any] = {"sigma": sigma, "solve": None if sigma is None else (A - _shift(A, sigma)).solve}
    pairs, report = eigenpairs.eigsh(
        product(A), A.shape[0], k, which=which, tol=rtol,
        max_iters=max_iters, generator=generator, dtype=A.dtype, device=A.device, progress=progress, **options,
    )  # fmt: skip
    settle(pairs, report, on_failure, 'Ask for fewer pairs, raise max_iters, or on_failure="warn" to take those found.')
    return pairs, report


def describe(A: LinearOperator) -> Plan:
    """What `explain("eigsh")` says; the number of pairs decides between the two."""
    A._require_symmetric("eigsh")
    small = "dense eigendecomposition when k is close to P, otherwise " if dense_is_affordable(A) else ""
    return Plan(f"{small}ARPACK (scipy.sparse.linalg.eigsh)", "residuals recomputed, multiplicities completed", eigsh)


def _shift(A: LinearOperator, sigma: float) -> LinearOperator:
    from curvops.operators.diagonal import Identity

    return Identity(A.shape[0], A.dtype, A.device, sigma)
