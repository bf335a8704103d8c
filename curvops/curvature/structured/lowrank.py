"""Low-rank approximations of a curvature, with the fraction of the trace that they keep.

"lanczos"         the k largest eigenpairs, by ARPACK: the best approximation of its rank
"nystrom"         A Ω (Ωᵀ A Ω)⁻¹ Ωᵀ A from one block product: cheaper, a little less than the best, never above A
"function_space"  A = BᵀB has the eigenvectors Bᵀ v / √λ of the n x n Gram matrix B Bᵀ: exact for n ≤ rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.errors import NotPositiveDefiniteError, UnsupportedError
from curvops.linalg.nystrom import nystrom
from curvops.nets.mixing import DependentExamplesError
from curvops.nets.squares import SquareSums
from curvops.operators.base import LinearOperator
from curvops.operators.functionspace import MAX_ROWS
from curvops.operators.lowrank import LowRank

LowRankMethod = Literal["lanczos", "nystrom", "function_space"]

_FIRST = 16
"""Rank at which a search for a tolerance starts."""


@torch.inference_mode(False)  # what is made here is kept, for calls in every mode
@torch.no_grad()
def low_rank(
    H: LinearOperator,
    rank: int | None = None,
    tol: float | None = None,
    *,
    method: LowRankMethod | None = None,
    generator: torch.Generator | None = None,
) -> LowRank:
    """`U diag(s) Uᵀ ≈ H` for a positive semidefinite H, U orthonormal; `captured` is its share of the trace.

    Cutting mass off a precision is harmless where it is small beside δ. `Gaussian` warns of the other case.

    Args:
        H: The curvature.
        rank: Largest number of columns.
        tol: Keep as few columns as capture 1 − tol of the trace. Exactly one of `rank` and `tol` must be given.
        method: See the module's docstring; None takes the Gram matrix where it has no more rows than `rank` (or than
            8,192, for a tolerance), otherwise Lanczos.
        generator: Draws the test matrix of "nystrom"; None for seed 0.

    Raises:
        UnsupportedError: H is not known to be positive semidefinite, or has no Gram matrix where one is asked for.
        ValueError: Not exactly one of `rank` and `tol`, or one out of range.

    Cost: "lanczos" a few products per column, "nystrom" one, "function_space" the Gram matrix and its O(n³)
        eigendecomposition; a search for a tolerance doubles the rank until it is met.
    """
    P = H.shape[0]
    if (rank is None) == (tol is None):
        raise ValueError(f"low_rank(rank={rank}, tol={tol}): expected exactly one of them.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= P):
        raise ValueError(f"low_rank(rank={rank}): expected a whole number from 1 to {P}.")
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"low_rank(tol={tol}): expected a number in [0, 1), the share of the trace to cut off.")
    if not H.is_psd:
        raise UnsupportedError(
            f"low_rank needs an operator known to be positive semidefinite; {H!r} is not. Take a GGN or a Fisher "
            "matrix, or eigsh for the ends of an indefinite spectrum."
        )
    gram = H._gram()
    if method is None:
        most = MAX_ROWS if rank is None else rank
        method = "function_space" if gram is not None and gram.shape[0] <= most else "lanczos"
    if method == "function_space":
        values, vectors = _of_the_gram(H, gram)
        return _kept(H, values, vectors, float(values.sum()), rank, tol)
    if method not in ("lanczos", "nystrom"):
        raise ValueError(f'low_rank(method={method!r}): expected "lanczos", "nystrom" or "function_space".')
    trace = exact_trace(H)
    k = min(_FIRST, P) if rank is None else rank
    while True:
        values, U = _largest(H, k, generator) if method == "lanczos" else _sketched(H, k, generator)
        if tol is None or k == P or float(values.sum()) >= (1 - tol) * trace:
            return _kept(H, values, lambda n, U=U: U[:, :n], trace, rank, tol)
        k = min(P, 2 * k)


def exact_trace(H: LinearOperator) -> float:
    """The trace: of a curvature from its layers, exact and without products; otherwise what `H.trace()` answers."""
    cotangents = Cotangents.like(H) if isinstance(H, GaussNewton) and H.objective.selection.indices is None else None
    if cotangents is None:
        return float(H.trace())
    assert isinstance(H, GaussNewton)
    selection = H.objective.selection
    sums = SquareSums(selection.sizes, selection.tensors[0])
    try:
        for step in LayerPass(H.objective, cotangents, report_unused=False):
            sums.add(step.factors)
            if step.last:
                sums.flush()
    except DependentExamplesError:
        return float(H.trace())
    return sum(float(total.sum(dtype=torch.float64)) for total in sums.values)


def _of_the_gram(H: LinearOperator, gram: LinearOperator | None) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Eigenvalues of `H = BᵀB`, descending and above rounding, and a function that makes the first n eigenvectors."""
    factor = H._factor()
    if gram is None or factor is None:
        raise UnsupportedError(f'low_rank(method="function_space"): {H!r} has no Gram matrix; use "lanczos".')
    values, V = torch.linalg.eigh(gram.to_dense())
    values, V = values.flip(0), V.flip(1)
    limit = len(values) * torch.finfo(values.dtype).eps * float(values[0])
    positive = int((values > limit).sum())
    values, V = values[: max(1, positive)].clamp(min=0), V[:, : max(1, positive)]

    def vectors(n: int) -> Tensor:
        U = factor._rapply(V[:, :n])
        return U / torch.where(values[:n] > 0, values[:n], 1.0).sqrt()

    return values, vectors


def _largest(H: LinearOperator, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    pairs = H.eigsh(k, which="LA", generator=generator)
    values = pairs.values.flip(0)
    noise = H.shape[0] * torch.finfo(values.dtype).eps * float(values[0].abs())
    if float(values[-1]) < -1e3 * noise:
        raise NotPositiveDefiniteError(f"low_rank: {H!r} has the eigenvalue {float(values[-1]):.3g}.")
    return values.clamp(min=0), pairs.vectors.flip(1)


def _sketched(H: LinearOperator, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device=H.device).manual_seed(0) if generator is None else generator
    approximation = nystrom(H._apply, H.shape[0], rank=k, generator=generator, dtype=H.dtype, device=H.device)
    return approximation.values, approximation.U


def _kept(
    H: LinearOperator,
    values: Tensor,
    vectors: Callable[[int], Tensor],
    trace: float,
    rank: int | None,
    tol: float | None,
) -> LowRank:
    """The leading pairs that `rank` or `tol` asks for."""
    n = len(values) if rank is None else min(rank, len(values))
    if tol is not None:
        enough = (values.double().cumsum(0) >= (1 - tol) * trace * (1 - 1e-12)).nonzero()
        n = int(enough[0]) + 1 if len(enough) else n
    share = min(1.0, float(values[:n].sum(dtype=torch.float64)) / trace) if trace > 0 else 1.0
    return LowRank(vectors(n), values[:n], captured=share, layout=H.layout)
