"""A matrix held as a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg import dense
from curvops.operators.base import LinearOperator, Scalar

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


def require_finite(t: Tensor, what: str) -> None:
    """Raise `DataError` if it holds NaN or infinity. One read."""
    # A finite sum proves every entry finite, at a tenth of the cost of `isfinite`; an infinite one may overflow.
    if not bool(t.detach().sum().isfinite()) and not bool(t.detach().isfinite().all()):
        raise DataError(f"{what} holds NaN or infinity; expected finite entries.")


class Dense(LinearOperator):
    """The matrix M `(rows, columns)`; products O(rows · columns), factorisations O(P³), kept once made.

    Args:
        M: The matrix; NaN and infinity are refused.
        is_symmetric: None to find out at first need, by comparing M with its transpose up to rounding.
        is_psd: True when M is known to be positive semidefinite; otherwise a Cholesky establishes it when needed.
    """

    def __init__(self, M: Tensor, *, is_symmetric: bool | None = None, is_psd: bool = False) -> None:
        if not isinstance(M, Tensor) or M.dim() != 2:
            given = f"shape {tuple(M.shape)}" if isinstance(M, Tensor) else type(M).__name__
            raise ShapeError(f"Dense expects a matrix (rows, columns), got {given}.")
        super().__init__((M.shape[0], M.shape[1]), M.dtype, M.device, is_psd=is_psd)
        require_finite(M, f"the ({M.shape[0]}, {M.shape[1]}) matrix")
        self.M = M
        self._symmetry: bool | None = True if is_psd else is_symmetric

    @property
    def is_symmetric(self) -> bool:
        if self._symmetry is None:
            M = self.M.detach()
            square = M.shape[0] == M.shape[1]
            self._symmetry = square and bool(
                (M - M.T).abs().max() <= 16 * torch.finfo(M.dtype).eps * M.abs().max() if M.numel() else True
            )
        return self._symmetry

    def _matmat(self, V: Tensor) -> Tensor:
        return self.M @ V

    def _rmatmat(self, V: Tensor) -> Tensor:
        return self.M.T @ V

    def _exact(self, verb_name: str) -> str | None:
        if verb_name in ("diagonal", "trace", "dense"):
            return "read off the matrix"
        if verb_name == "slogdet":
            return "LU factorisation"
        if not self.is_symmetric:
            return "LU factorisation" if verb_name == "solve" else None
        return "eigendecomposition" if verb_name == "function" else "Cholesky factorisation"

    def _has_spectral(self) -> bool:
        return self.is_symmetric

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        def decompose() -> Eigen:
            # In float64 for every dtype: the eigenvalues then carry the rounding of the matrix as stored, and no other.
            values, vectors = dense.eigh(self.M.double())
            return Eigen(vectors.to(self.dtype), values.to(self.dtype))

        return self._kept("eigen", decompose, self.M)

    def _solve(self, B: Tensor) -> Tensor:
        if not self.is_symmetric:
            return torch.linalg.solve(self.M, B)
        try:
            L = self._kept("cholesky", lambda: definite_cholesky(self.M), self.M)
        except NotPositiveDefiniteError:
            return self._spectral()._solve(B)
        return dense.solve_cholesky(L, B)

    def _logdet(self) -> Tensor:
        L = self._kept("cholesky", lambda: definite_cholesky(self.M), self.M)
        return dense.logdet_cholesky(L)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = torch.linalg.slogdet(self.M)
        return sign, logabs

    def _diagonal(self) -> Tensor:
        return self.M.diagonal().clone()

    def _trace(self) -> Tensor:
        return self.M.trace()

    def _dense(self) -> Tensor:
        return self.M.clone()

    def _holds_tensors(self) -> bool:
        return True

    def _transpose(self) -> LinearOperator:
        return Dense(self.M.T, is_symmetric=self._symmetry)

    def _scaled(self, factor: Scalar) -> LinearOperator | None:
        return None  # a copy of the matrix is not simpler

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        principal = torch.equal(rows, columns)
        return Dense(self.M[rows][:, columns], is_symmetric=self._symmetry if principal else None,
                     is_psd=self._psd and principal)  # fmt: skip

    def _hadamard_square(self) -> LinearOperator:
        return Dense(self.M**2)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Dense(self.M.to(device, dtype), is_symmetric=self._symmetry, is_psd=self._psd)


def as_operator(matrix: Tensor | LinearOperator) -> LinearOperator:
    """An operator as it is, a matrix as `Dense`."""
    return matrix if isinstance(matrix, LinearOperator) else Dense(matrix)


def dense_route(part: LinearOperator) -> str | None:
    """What answers for a part that has no closed form: a dense copy, if it is made of tensors and fits."""
    from curvops.operators.routes.plan import dense_is_affordable

    return "dense copy" if part._holds_tensors() and dense_is_affordable(part) else None


def dense_copy(part: LinearOperator) -> Dense:
    """The part as a dense matrix."""
    return Dense(part.to_dense(), is_symmetric=part.is_symmetric, is_psd=part.is_psd)


def definite_cholesky(M: Tensor) -> Tensor:
    """Cholesky factor of a matrix that is positive definite beyond rounding.

    Raises:
        NotPositiveDefiniteError: An eigenvalue is negative, or within rounding of zero, where a factorisation may
            succeed by luck and its smallest pivots mean nothing.
    """
    L, _ = dense.cholesky(M, jitter=False)
    size, eps = M.shape[0], torch.finfo(M.dtype).eps
    pivots = L.detach().diagonal() ** 2
    if float(pivots.min()) <= size * eps * float(M.detach().diagonal().max()):
        values = torch.linalg.eigvalsh(M.detach().double())
        low, high = float(values[0]), float(values[-1])
        if low <= 4 * size**0.5 * eps * high:
            raise NotPositiveDefiniteError(
                f"the ({size}, {size}) matrix is singular to working precision: its smallest eigenvalue is {low:.3g}, "
                f"its largest {high:.3g}; use add_diagonal(d) with d > {4 * size**0.5 * eps * high:.2g}, or float64."
            )
    return L
