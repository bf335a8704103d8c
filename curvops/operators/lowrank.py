"""Low-rank matrices, alone and with a diagonal.

    A = U diag(s) Uᵀ + D
    A⁻¹ = D⁻¹ − D⁻¹ U (diag(s)⁻¹ + Uᵀ D⁻¹ U)⁻¹ Uᵀ D⁻¹           (Woodbury)
    det A = det D · det(I + diag(s) Uᵀ D⁻¹ U)                    (determinant lemma)

With `W = D^-½ U |s|^½` the r x r core `I + Wᵀ W sign(s)` needs no inverse of s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.operators.base import Layout, LinearOperator, Scalar
from curvops.operators.dense import require_finite
from curvops.operators.formula import Formula, times_text

if TYPE_CHECKING:
    from curvops.operators.eigen import Eigen


class LowRank(LinearOperator):
    """`U diag(s) Uᵀ` with any U `(P, r)` and s `(r,)` (ones by default); products O(P r), verbs O(P r² + r³).

    Args:
        layout: Where each named parameter lies in a vector, so that `add_diagonal` takes a dict.

    Raises:
        DataError: NaN or infinity in U or s.

    Attributes:
        captured: Fraction of the trace that an approximation kept; None where it is not one.
    """

    def __init__(
        self, U: Tensor, s: Tensor | None = None, *, captured: float | None = None, layout: Layout | None = None
    ) -> None:
        if not isinstance(U, Tensor) or U.dim() != 2:
            given = f"shape {tuple(U.shape)}" if isinstance(U, Tensor) else type(U).__name__
            raise ShapeError(f"LowRank expects U of shape (P, r), got {given}.")
        s = U.new_ones(U.shape[1]) if s is None else s
        if tuple(s.shape) != (U.shape[1],):
            raise ShapeError(
                f"LowRank: U has {U.shape[1]} columns, so s must be ({U.shape[1]},); got {tuple(s.shape)}."
            )
        super().__init__((U.shape[0], U.shape[0]), U.dtype, U.device, is_symmetric=True, layout=layout)
        require_finite(U, f"LowRank: U ({U.shape[0]}, {U.shape[1]})")
        require_finite(s, f"LowRank: s ({U.shape[1]},)")
        self.U, self.s, self.captured = U, s, captured

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self.U.shape[1]

    @property
    def is_psd(self) -> bool:
        return bool((self.s.detach() >= 0).all())

    @property
    def lower_bound(self) -> float | None:
        return 0.0 if self.is_psd else None

    def _bound_is_free(self) -> bool:
        return False

    def _matmat(self, V: Tensor) -> Tensor:
        return self.U @ (self.s[:, None] * (self.U.T @ V))

    def _has_spectral(self) -> bool:
        return True

    def _exact(self, verb_name: str) -> str | None:
        return "read off the factors" if verb_name in ("diagonal", "trace", "dense") else "thin eigendecomposition"

    def _spectral(self) -> Eigen:
        from curvops.operators.eigen import Eigen

        def decompose() -> Eigen:
            Q, R = torch.linalg.qr(self.U)  # Q (P, min(P, r)): also right for more columns than rows
            R = R.double()  # as a dense matrix is: the squares add no rounding of theirs
            values, vectors = torch.linalg.eigh((R * self.s) @ R.T)
            values = values.to(self.dtype)
            require_finite(values, f"the eigenvalues of {self!r}, in {self.dtype},")
            return Eigen(Q @ vectors.to(self.dtype), values)

        return self._kept("eigen", decompose, self.U, self.s)

    def _diagonal(self) -> Tensor:
        return (self.U**2) @ self.s

    def _trace(self) -> Tensor:
        return (self.U**2).sum(0) @ self.s

    def _dense(self) -> Tensor:
        return (self.U * self.s) @ self.U.T

    def _holds_tensors(self) -> bool:
        return True

    def _scaled(self, factor: Scalar) -> LinearOperator:
        return LowRank(self.U, factor * self.s, captured=self.captured, layout=self.layout)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, LowRank):
            return None
        layout = self.layout or other.layout
        if other.U is self.U:
            return LowRank(self.U, self.s + other.s, layout=layout)
        return LowRank(torch.cat([self.U, other.U], 1), torch.cat([self.s, other.s]), layout=layout)

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator | None:
        return LowRank(self.U[rows], self.s) if torch.equal(rows, columns) else None

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        U, s = self.U.to(device, dtype), self.s.to(device, dtype)
        return LowRank(U, s, captured=self.captured, layout=self.layout)

    def _formula(self) -> Formula:
        notes = () if self.captured is None else (f"{self.captured:.1%} of the trace",)
        return Formula("leaf", f"LowRank({times_text(self.U.shape)})", notes=notes)


WOODBURY = {
    "solve": "Woodbury",
    "logdet": "determinant lemma",
    "slogdet": "determinant lemma",
    "sample": "thin eigendecomposition of the low rank, scaled by the diagonal",
}
"""What a low-rank matrix with a positive diagonal answers in closed form, and by what."""


class LowRankPlusDiagonal(LinearOperator):
    """`U diag(s) Uᵀ + diag(d)`, d > 0, by Woodbury and the determinant lemma; O(P r² + r³)."""

    def __init__(self, low_rank: LowRank, d: Tensor) -> None:
        super().__init__(low_rank.shape, low_rank.dtype, low_rank.device, is_symmetric=True)
        self.low_rank, self.d = low_rank, d

    def _matmat(self, V: Tensor) -> Tensor:
        return self.low_rank._matmat(V) + self.d[:, None] * V

    def _exact(self, verb_name: str) -> str | None:
        if verb_name == "function":
            return None
        return WOODBURY.get(verb_name, "read off the factors")

    def _core(self) -> tuple[Tensor, Tensor]:
        """W = D^-½ U |s|^½ and the core I + sign(s) WᵀW."""
        W = self.low_rank.U * self.low_rank.s.abs().sqrt() / self.d.sqrt()[:, None]
        sign = self.low_rank.s.detach().sign()
        return W, torch.eye(W.shape[1], dtype=self.dtype, device=self.device) + sign[:, None] * (W.T @ W)

    def _solve(self, B: Tensor) -> Tensor:
        W, core = self._core()
        sign = self.low_rank.s.detach().sign()
        root = self.d.sqrt()[:, None]
        C = B / root
        return (C - W @ torch.linalg.solve(core, sign[:, None] * (W.T @ C))) / root

    def _logdet(self) -> Tensor:
        sign, logabs = self._slogdet()
        # An even number of negative eigenvalues keeps the sign, so inertia is read off the symmetric core.
        if float(sign.detach()) <= 0 or (not self.low_rank.is_psd and self._has_negative_eigenvalue()):
            raise NotPositiveDefiniteError(
                f"logdet of a low-rank plus diagonal matrix {self.shape}: it has an eigenvalue that is not positive."
            )
        return logabs

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = torch.linalg.slogdet(self._core()[1])
        return sign, logabs + self.d.log().sum()

    def _inverse_root(self, E: Tensor) -> Tensor:
        # A = D^½ (I + W sign(s) Wᵀ) D^½, and the bracket has a thin eigendecomposition.
        W, _ = self._core()
        inner = LowRank(W, self.low_rank.s.detach().sign())._spectral()
        damped = type(inner)(inner.Q, inner.values + 1.0, 1.0)
        return damped._power(-0.5)._matmat(E) / self.d.sqrt()[:, None]

    def _has_negative_eigenvalue(self) -> bool:
        W, _ = self._core()
        R = torch.linalg.qr(W.detach(), mode="r").R
        inner = torch.linalg.eigvalsh((R * self.low_rank.s.detach().sign()) @ R.T)
        return bool(inner.min() <= -1)

    def _diagonal(self) -> Tensor:
        return self.low_rank._diagonal() + self.d

    def _trace(self) -> Tensor:
        return self.low_rank._trace() + self.d.sum()

    def _dense(self) -> Tensor:
        return self.low_rank._dense() + torch.diag(self.d)

    def _holds_tensors(self) -> bool:
        return True
