"""Randomised Nyström approximation of a positive semidefinite matrix, and the preconditioner made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg.columns import Counted, check_precision, column_norms, unit_roundoff
from curvops.typing import Matmat, Vector


@dataclass(frozen=True)
class NystromApproximation:
    """U diag(values) Uᵀ ≈ A, never above A in exact arithmetic.

    Attributes:
        U: `(P, r)` orthonormal columns.
        values: `(r,)` non-negative, descending.
        matvecs: Products spent, counted in columns.
    """

    U: Tensor
    values: Vector
    matvecs: int

    @property
    def rank(self) -> int:
        """r, the number of columns kept."""
        return self.values.numel()

    def matmat(self, V: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """U diag(values) Uᵀ V. Cost O(P r K)."""
        return self.U @ (self.values[:, None] * (self.U.T @ V))

    def preconditioner(self, delta: float | Tensor) -> Callable[[Tensor], Tensor]:
        """Product with P⁻¹ for A + δI (or A + D): columns `(P, K)` in, columns out.

        Scalar δ: P⁻¹ = (λ_r + δ) U (Λ + δI)⁻¹ Uᵀ + (I − U Uᵀ), λ_r the smallest value kept (Frangella, Tropp and Udell
        2023, eq. 1.3): what U misses of A is taken to be λ_r. Vector D: the inverse of U (Λ − λ_r) Uᵀ + D + λ_r I by
        Woodbury, which is the same up to the factor λ_r + δ where D = δI.

        Args:
            delta: δ ≥ 0, or `(P,)` non-negative entries of D.

        Raises:
            ValueError: δ < 0, or δ + λ_r = 0: the preconditioner would not be positive definite.
            ShapeError: A vector of the wrong length.

        Cost: O(P r K) per application; for a vector once O(P r²).
        """
        U, values = self.U, self.values
        last = float(values[-1])
        if isinstance(delta, Tensor) and delta.ndim:
            return self._diagonal_preconditioner(delta, last)
        delta = float(delta)
        if not delta >= 0 or delta + last == 0:
            raise ValueError(
                f"delta={delta} with smallest Nystrom value {last:.3e}; expected delta >= 0 and a positive sum. Add a "
                f"diagonal to the operator first."
            )
        # I + U (…) Uᵀ with one small diagonal: half the products of the formula as written.
        shrink = ((last + delta) / (values.double() + delta) - 1).to(values.dtype)[:, None]

        def product(R: Tensor) -> Tensor:
            return torch.addmm(R, U, shrink * (U.T @ R))

        return product

    def _diagonal_preconditioner(self, delta: Tensor, last: float) -> Callable[[Tensor], Tensor]:
        if delta.shape != self.U.shape[:1]:
            raise ShapeError(f"delta has shape {tuple(delta.shape)}; expected a scalar or ({self.U.shape[0]},).")
        inverse = 1 / (delta.detach().to(self.U) + last)
        if not bool(((delta >= 0) & torch.isfinite(inverse)).all()):
            raise ValueError(
                f"delta holds entries down to {float(delta.min()):.3e} with smallest Nystrom value {last:.3e}; "
                f"expected entries >= 0 and positive sums."
            )
        # With S = (Λ − λ_r)^½: (D' + U S S Uᵀ)⁻¹ = D'⁻¹ − D'⁻¹ U S (I + S Uᵀ D'⁻¹ U S)⁻¹ S Uᵀ D'⁻¹.
        W = self.U * (self.values - last).clamp_min(0.0).sqrt()
        DW = inverse[:, None] * W
        inner = W.T @ DW
        L = torch.linalg.cholesky(inner + torch.eye(self.rank, dtype=inner.dtype, device=inner.device))
        half = torch.linalg.solve_triangular(L, DW.T, upper=False)

        def product(R: Tensor) -> Tensor:
            return inverse[:, None] * R - half.T @ (half @ R)

        return product

    def error(self, matmat: Matmat, *, generator: torch.Generator, steps: int = 10, shift: float = 0.0) -> float:
        """Estimate of ‖A − U Λ Uᵀ‖₂ by power iteration: a lower bound, close after a few steps.

        Args:
            matmat: Product with A + shift·I.
            generator: Draws the start.
            steps: Products spent, ≥ 1.
            shift: As given to `nystrom`.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}; expected at least 1.")
        v = _gaussian(self.U.shape[0], 1, generator, self.U.dtype, self.U.device)
        length = 0.0
        for _ in range(steps):
            v = v / column_norms(v)
            v = matmat(v) - shift * v - self.matmat(v)
            length = float(column_norms(v))
            if length == 0.0:
                break
        return length


@torch.no_grad()
def nystrom(
    matmat: Matmat,
    size: int,
    *,
    rank: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    shift: float = 0.0,
) -> NystromApproximation:
    """Nyström approximation of A from one block product with `rank` random orthonormal columns.

    Args:
        matmat: `(P, K) → (P, K)`, product with A + shift·I, A symmetric positive semidefinite.
        size: P.
        rank: Columns r, 1 ≤ r ≤ P.
        generator: Draws the test matrix.
        dtype: float32 or float64.
        device: Where `matmat` runs.
        shift: Known multiple of I inside `matmat`, taken out.

    Raises:
        ShapeError: rank out of range.
        DataError: NaN from the product.
        NotPositiveDefiniteError: ΩᵀAΩ is indefinite beyond rounding.

    Cost: r products and O(P r²); memory 3 P r.

    Source: Tropp, Yurtsever, Udell and Cevher (2017), algorithm 3; Frangella, Tropp and Udell (2023), algorithm 2.1.
    """
    _check(size, rank, dtype)
    A = Counted(matmat)
    Omega = torch.linalg.qr(_gaussian(size, rank, generator, dtype, device))[0]
    Y = A(Omega) - shift * Omega
    return _assemble(Omega, Y, abs(shift), A.columns)


@torch.no_grad()
def grown_nystrom(
    matmat: Matmat,
    size: int,
    *,
    delta: float,
    max_rank: int,
    generator: torch.Generator,
    rank: int = 10,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    shift: float = 0.0,
    enough: Callable[[NystromApproximation], bool] | None = None,
) -> NystromApproximation:
    """Nyström approximation whose rank doubles until its smallest value is ≤ 10 δ, or `max_rank` is reached.

    Once λ_r ≤ 10 δ the preconditioned A + δI has a condition number of about 10, and further columns save little. The
    columns drawn before are kept: no product is repeated.

    Args:
        delta: δ > 0, the damping that the preconditioner will be used with.
        max_rank: Most columns, 1 ≤ max_rank ≤ P.
        rank: Columns to start with.
        enough: Asked after every doubling in place of the rule above; True ends the growth.

    The other arguments, errors and sources are `nystrom`'s; Frangella, Tropp and Udell (2023), section 5.4.
    """
    _check(size, max_rank, dtype)
    if rank < 1:
        raise ValueError(f"rank={rank}; expected at least 1.")
    if not delta > 0:
        raise ValueError(f"delta={delta}; expected > 0, the damping to precondition for.")
    A = Counted(matmat)
    Omega = torch.zeros(size, 0, dtype=dtype, device=device)
    Y = Omega
    target = min(rank, max_rank)
    while True:
        new = _gaussian(size, target - Omega.shape[1], generator, dtype, device)
        for _ in range(2):
            # Twice is enough: the new columns must be orthogonal to the old ones, whose products are known.
            new = torch.linalg.qr(new - Omega @ (Omega.T @ new))[0]
        Y = torch.cat((Y, A(new) - shift * new), 1)
        Omega = torch.cat((Omega, new), 1)
        approximation = _assemble(Omega, Y, abs(shift), A.columns)
        done = float(approximation.values[-1]) <= 10 * delta if enough is None else enough(approximation)
        if done or target >= max_rank:
            return approximation
        target = min(2 * target, max_rank)


def _check(size: int, rank: int, dtype: torch.dtype) -> None:
    check_precision(dtype, "the operator")
    if not 1 <= rank <= size:
        raise ShapeError(f"rank={rank} for a ({size}, {size}) operator; expected 1 <= rank <= {size}.")


def _gaussian(
    size: int, count: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Draws on the generator's device in float64, so that the numbers do not depend on dtype or device."""
    drawn = torch.randn(size, count, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(device=device, dtype=dtype)


def _assemble(Omega: Tensor, Y: Tensor, shift: float, matvecs: int) -> NystromApproximation:
    """Y (ΩᵀY)⁻¹ Yᵀ in the stable, slightly shifted form: A + νI is approximated and ν taken out again."""
    if not bool(torch.isfinite(Y).all()):
        raise DataError("Nystrom: the operator's product holds NaN or infinity; check the parameters and the data.")
    u = unit_roundoff(Y.dtype)
    # Rounding of the products; taking the shift out left its rounding behind, too.
    scale = float(torch.linalg.matrix_norm(Y)) + shift
    if scale == 0.0:
        return NystromApproximation(Omega, torch.zeros_like(Y[0]), matvecs)
    nu = 2 * u * scale
    core = Omega.T @ Y
    core = (core + core.T) / 2
    eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    for _ in range(4):
        L, info = torch.linalg.cholesky_ex(core + nu * eye)
        if not int(info):
            break
        nu *= 10
    else:
        low = float(torch.linalg.eigvalsh(core)[0])
        raise NotPositiveDefiniteError(
            f"Nystrom: the operator is not positive semidefinite (a test space shows an eigenvalue {low:.3e}, scale "
            f"{scale:.3e}). Use a preconditioner of another kind, or none."
        )
    F = torch.linalg.solve_triangular(L, (Y + nu * Omega).T, upper=False).T
    U, singular, _ = torch.linalg.svd(F, full_matrices=False)
    return NystromApproximation(U, (singular**2 - nu).clamp_min(0.0), matvecs)
