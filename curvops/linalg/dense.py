"""Factorisations of a dense symmetric matrix, differentiable in the matrix, with a jitter that is said and is small."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.typing import Vector


def _check_square(M: Tensor) -> None:
    if M.ndim != 2 or M.shape[0] != M.shape[1] or M.shape[0] < 1:
        raise ShapeError(f"the matrix has shape {tuple(M.shape)}; expected (P, P) with P >= 1.")
    if M.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"the matrix has dtype {M.dtype}; expected torch.float32 or torch.float64.")
    if not bool(torch.isfinite(M.detach()).all()):
        raise DataError(f"the ({M.shape[0]}, {M.shape[0]}) matrix holds NaN or infinity; expected finite entries.")


def cholesky(M: Float[Tensor, "P P"], *, jitter: bool = True) -> tuple[Float[Tensor, "P P"], float]:
    """Lower Cholesky factor of M + jitter·I, with the smallest jitter of a ladder that lets it succeed.

    The ladder starts at 0. Only if that fails are the eigenvalues looked at: a smallest eigenvalue that is negative
    beyond rounding is refused; otherwise jitters u·λ_max·{1, 10, …} are tried, up to 100·√P·u·λ_max and never more,
    u the unit roundoff. So the jitter repairs a matrix that is semidefinite up to rounding, and nothing else.

    Args:
        M: `(P, P)` symmetric; the lower triangle is read.
        jitter: False: only 0 is tried (positive definiteness is to be established, not repaired).

    Returns:
        L `(P, P)` lower triangular, differentiable in M, and the jitter used (0.0 mostly), in M's units.

    Raises:
        NotPositiveDefiniteError: No rung of the ladder succeeds; names the smallest eigenvalue.
        ShapeError, DataError: Not a square finite float matrix.

    Cost: O(P³/3); O(2 P³) more where the ladder is needed.
    """
    _check_square(M)
    L, info = torch.linalg.cholesky_ex(M)
    if not int(info):
        return L, 0.0
    size = M.shape[0]
    values = torch.linalg.eigvalsh(M.detach())
    low, high = float(values[0]), float(values.abs().amax())
    # Half a unit in the last place, times the growth √P that eigenvalues and factor see from P roundings.
    rounding = torch.finfo(M.dtype).eps / 2 * high
    bound = 10 * size**0.5 * rounding
    refusal = (
        f"the ({size}, {size}) matrix is not positive definite: its smallest eigenvalue is {low:.3e}, its largest in "
        f"size {high:.3e}. Use add_diagonal(d) with d > {max(-low, bound):.3g}, or solve with MINRES()."
    )
    if not jitter or low < -bound or high == 0.0:
        raise NotPositiveDefiniteError(refusal)
    step = rounding
    while step <= 10 * bound:
        shifted = M + step * torch.eye(size, dtype=M.dtype, device=M.device)
        L, info = torch.linalg.cholesky_ex(shifted)
        if not int(info):
            return L, step
        step *= 10
    raise NotPositiveDefiniteError(refusal)


def solve_cholesky(L: Float[Tensor, "P P"], B: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """(L Lᵀ)⁻¹ B for `(P, K)` columns (or a `(P,)` vector). Cost O(P² K)."""
    _check_square(L)
    if B.ndim not in (1, 2) or B.shape[0] != L.shape[0] or B.dtype != L.dtype:
        raise ShapeError(
            f"B has shape {tuple(B.shape)} ({B.dtype}); expected ({L.shape[0]},) or ({L.shape[0]}, K) ({L.dtype})."
        )
    if B.ndim == 1:
        return torch.cholesky_solve(B[:, None], L)[:, 0]
    return torch.cholesky_solve(B, L)


def logdet_cholesky(L: Float[Tensor, "P P"]) -> Float[Tensor, ""]:
    """log det(L Lᵀ) = 2 Σ log L_ii, a 0-dim tensor. Cost O(P)."""
    return 2 * L.diagonal().log().sum()


def eigh(M: Float[Tensor, "P P"]) -> tuple[Vector, Float[Tensor, "P P"]]:
    """Eigenvalues ascending and orthonormal eigenvectors of symmetric M (lower triangle read). Cost O(9 P³).

    The gradient of the vectors exists only where eigenvalues are distinct; that of the values always.
    """
    _check_square(M)
    values, vectors = torch.linalg.eigh(M)
    return values, vectors


def slogdet(M: Float[Tensor, "P P"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sign and log|det| of any square M by LU; (0, −inf) where singular. Differentiable. Cost O(⅔ P³)."""
    _check_square(M)
    sign, logabs = torch.linalg.slogdet(M)
    return sign, logabs
