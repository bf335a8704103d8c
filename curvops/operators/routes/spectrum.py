"""The spectral density of an operator, by Lanczos quadrature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from curvops.errors import NotPositiveDefiniteError
from curvops.linalg.probes import resolve_seed
from curvops.linalg.spectrum import Spectrum
from curvops.linalg.spectrum import spectrum as lanczos_spectrum
from curvops.operators.routes.plan import Plan, dense_is_affordable, product

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


def spectrum(
    A: LinearOperator, probes: int, steps: int, *, generator: torch.Generator | None, progress: bool
) -> Spectrum:
    """See `LinearOperator.spectrum`."""
    return lanczos_spectrum(
        product(A), A.shape[0], probes=probes, steps=min(steps, A.shape[0]), lower_bound=_lower_bound(A),
        seed=resolve_seed(generator), dtype=A.dtype, device=A.device, progress=progress,
    )  # fmt: skip


def _lower_bound(A: LinearOperator) -> float | None:
    """What is proven of A, or 0 where its tensors have a closed form or a Cholesky that establishes definiteness."""
    if A.lower_bound is not None or not (A._holds_tensors() and dense_is_affordable(A)):
        return A.lower_bound
    try:
        with torch.no_grad():
            A.logdet()
    except NotPositiveDefiniteError:
        return None
    return 0.0


def describe(A: LinearOperator) -> Plan:
    """What `explain("spectrum")` says."""
    A._require_symmetric("spectrum")
    return Plan("stochastic Lanczos quadrature", "probes · steps products, then any number of questions", spectrum)
