"""The spectral density of an operator.

None                 Lanczos quadrature by products with A
`FunctionSpace()`    the same by the n x n Gram matrix of a curvature BᵀB, n ≤ P, whose other P − n eigenvalues are 0
`Eigh()`             all eigenvalues, of the smaller of the two dense matrices
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from curvops.errors import NotPositiveDefiniteError, UnsupportedError
from curvops.linalg.probes import resolve_seed
from curvops.linalg.spectrum import Spectrum, exact_spectrum
from curvops.linalg.spectrum import spectrum as lanczos_spectrum
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.routes.plan import (
    EIGH,
    Plan,
    counted,
    dense_is_affordable,
    dense_need,
    lanczos_need,
    product,
    refuse_method,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator


def plan(
    A: LinearOperator,
    probes: int,
    steps: int,
    method: methods.Method | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Plan:
    """The plan for `A.spectrum(probes, steps, method)`."""

    def run() -> Spectrum:
        return spectrum(A, probes, steps, method, generator=generator, progress=progress)

    def need() -> Need:
        if isinstance(method, methods.FunctionSpace):  # the Gram matrix, whose own verb holds it against the budget
            return Need()
        if isinstance(method, methods.Eigh):
            return dense_need(A, EIGH) if A._holds_tensors() or _gram(A) is None else Need()
        return lanczos_need(A, probes, min(steps, A.shape[0]))

    reason = "probes · steps products, then any number of questions"
    return Plan("stochastic Lanczos quadrature", reason, run, need=need)


def spectrum(
    A: LinearOperator,
    probes: int,
    steps: int,
    method: methods.Method | None,
    *,
    generator: torch.Generator | None,
    progress: bool,
) -> Spectrum:
    """See `LinearOperator.spectrum`."""
    if isinstance(method, methods.Eigh):
        return _of_eigenvalues(A)
    matmat, size, bound = product(A), A.shape[0], None
    if isinstance(method, methods.FunctionSpace):
        gram = _gram(A)
        if gram is None:
            raise UnsupportedError(
                f"spectrum: FunctionSpace() needs a curvature BᵀB (GGN, MCFisher, EmpiricalFisher, or a multiple) with "
                f"no more rows than its P = {A.shape[0]:,}; got {A!r}. Leave method out, or use Eigh()."
            )
        with torch.no_grad():
            G = gram._dense_kept()
        matmat, size, bound = G.__matmul__, G.shape[0], 0.0
    elif method is not None:
        raise refuse_method("spectrum", method, "FunctionSpace", "Eigh")
    return lanczos_spectrum(
        matmat, size, probes=probes, steps=min(steps, size), lower_bound=_lower_bound(A) if bound is None else bound,
        seed=resolve_seed(generator), dtype=A.dtype, device=A.device, progress=progress, zeros=A.shape[0] - size,
    )  # fmt: skip


def _gram(A: LinearOperator) -> LinearOperator | None:
    """The Gram matrix where it is no larger than A."""
    gram = A._gram()
    return gram if gram is not None and gram.shape[0] <= A.shape[0] else None


def _of_eigenvalues(A: LinearOperator) -> Spectrum:
    spent = counted(A)
    gram = None if A._holds_tensors() else _gram(A)
    with torch.no_grad():
        values = torch.linalg.eigvalsh(A.to_dense() if gram is None else gram._dense_kept())
    zeros = A.shape[0] - len(values)
    return exact_spectrum(values, lower_bound=A.lower_bound, zeros=zeros, matvecs=spent()[0])


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
    """What `explain("spectrum")` says, of the verb's defaults."""
    A._require_symmetric("spectrum")
    return plan(A, 10, 64)
