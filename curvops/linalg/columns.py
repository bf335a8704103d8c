"""Checks, exact scaling, counted products and verdicts: what every column-wise solver shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.typing import Matmat


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, half the spacing of the numbers next to 1: 1.1e-16 in float64, 6.0e-8 in float32."""
    return torch.finfo(dtype).eps / 2


def column_dots(V: Tensor, W: Tensor) -> Tensor:
    """`(K,)` inner products of the columns of two `(P, K)` tensors."""
    return (V * W).sum(0)


def column_norms(V: Tensor) -> Tensor:
    """`(K,)` 2-norms of the columns."""
    return torch.linalg.vector_norm(V, dim=0)


def norm_seen(norm: Tensor, AX: Tensor, X: Tensor) -> Tensor:
    """Lower bound on ‖A‖, raised by what the product A X has shown."""
    return torch.maximum(norm, (column_norms(AX) / column_norms(X)).nan_to_num(0.0, 0.0).amax())


def probed_norm(A: Counted, B: Tensor) -> Tensor:
    """Lower bound on ‖A‖ from two power steps on the first column of B; two products.

    For preconditioned iterations, whose own directions may hide the large eigenvalues that rounding is governed by.
    """
    v = B[:, :1]
    norm = B.new_zeros(())
    for _ in range(2):
        v = v / column_norms(v)
        w = A(v)
        norm = norm_seen(norm, w, v)
        v = w
    return norm


def outside_range(B: Tensor, D: Tensor, rtol: float) -> Tensor:
    """Whether directions p with Ap = 0 prove b out of reach: then ‖b − Ax‖ ≥ |pᵀb|/‖p‖ whatever x is."""
    return column_dots(B, D).abs() > rtol * column_norms(B) * column_norms(D)


def check_precision(dtype: torch.dtype, what: str = "B") -> None:
    """Refuse what is neither float32 nor float64: an iteration in half precision cannot certify anything."""
    if dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"{what} has dtype {dtype}; expected torch.float32 or torch.float64. Convert it first.")


class Counted:
    """A `matmat` that counts its columns and refuses a product of another shape or dtype.

    Attributes:
        columns: Columns multiplied so far.
    """

    def __init__(self, matmat: Matmat, what: str = "the operator's product") -> None:
        self.matmat = matmat
        self.what = what
        self.columns = 0

    def __call__(self, V: Tensor) -> Tensor:
        W = self.matmat(V)
        self.columns += V.shape[1]
        if W.shape != V.shape or W.dtype != V.dtype:
            raise ShapeError(
                f"{self.what} returned shape {tuple(W.shape)} ({W.dtype}) for columns of shape {tuple(V.shape)} "
                f"({V.dtype}); expected the same shape and dtype."
            )
        return W


@dataclass(frozen=True)
class System:
    """The right-hand sides of a solve, each scaled by a power of two so that no norm can under- or overflow.

    Attributes:
        B: `(P, K)` scaled right-hand sides.
        X: `(P, K)` scaled start, or None for zero.
        norms: `(K,)` ‖b‖ after scaling, between ½ and √P; 0 for zero columns.
        scale: `(K,)` powers of two: the original column is `B · scale` (and so is X).
        rtol: Target of ‖b − Ax‖/‖b‖, for every column.
        max_iters: Most iterations.
    """

    B: Tensor
    X: Tensor | None
    norms: Tensor
    scale: Tensor
    rtol: float
    max_iters: int

    @property
    def active(self) -> Tensor:
        """Indices of the columns that are not zero: zero columns have the answer zero."""
        return torch.nonzero(self.norms > 0).flatten()


def prepare(B: Tensor, x0: Tensor | None, rtol: float, max_iters: int | None) -> System:
    """Check the arguments that all iterative solvers share.

    Args:
        B: `(P, K)` right-hand sides, finite, float32 or float64.
        x0: `(P, K)` start or None.
        rtol: Relative tolerance, > 0.
        max_iters: ≥ 1, or None for `min(max(10 P, 1000), 10_000)`: rounding can cost CG several times the P iterations
            that exact arithmetic needs, and past ten thousand a better preconditioner is the answer, not patience.

    Raises:
        ShapeError: Wrong shapes or dtypes.
        DataError: NaN or infinity in B or x0.
        ValueError: `rtol <= 0` or `max_iters < 1`.
    """
    if B.ndim != 2 or B.shape[0] < 1:
        raise ShapeError(f"B has shape {tuple(B.shape)}; expected (P, K) columns with P >= 1.")
    check_precision(B.dtype)
    if not rtol > 0 or not math.isfinite(rtol):
        raise ValueError(f"rtol={rtol!r}; expected a positive number, the target of ||b - Ax||/||b||.")
    if max_iters is None:
        max_iters = min(max(10 * B.shape[0], 1000), 10_000)
    if max_iters < 1:
        raise ValueError(f"max_iters={max_iters}; expected at least 1.")
    B = B.detach()
    if x0 is not None:
        if x0.shape != B.shape or x0.dtype != B.dtype or x0.device != B.device:
            raise ShapeError(
                f"x0 is {tuple(x0.shape)}, {x0.dtype} on {x0.device}; expected {tuple(B.shape)}, {B.dtype} on "
                f"{B.device}, as B."
            )
        x0 = x0.detach()
        if not bool(torch.isfinite(x0).all()):
            raise DataError("x0 holds NaN or infinity; expected finite numbers.")
    if not bool(torch.isfinite(B).all()):
        bad = (~torch.isfinite(B)).any(0).nonzero().flatten().tolist()
        raise DataError(f"the right-hand side holds NaN or infinity (columns {bad[:8]}); expected finite numbers.")
    if B.shape[1] == 0:
        return System(B, x0, B.new_zeros(0), B.new_ones(0), rtol, max_iters)
    exponent = torch.frexp(B.abs().amax(0)).exponent
    scale = torch.ldexp(torch.ones_like(B[0]), exponent)
    # A power of two: the scaled system has the same digits, so scaling b changes neither iterations nor answer.
    B = B / scale
    return System(B, None if x0 is None else x0 / scale, column_norms(B), scale, rtol, max_iters)


@dataclass
class Answers:
    """Best iterate met per column, its true relative residual, and why a column stopped.

    A column counts as met only if its recomputed residual *plus* the rounding of that recomputation, 2u‖A‖‖x‖/‖b‖,
    is within rtol; so an answer is never claimed that a more exact evaluation of its residual would refute.
    """

    X: Tensor
    residual: Tensor
    slack: Tensor
    met: Tensor
    failures: dict[str, list[int]]

    @staticmethod
    def of(system: System) -> Answers:
        zero = system.norms == 0
        residual = torch.full_like(system.norms, math.inf).masked_fill_(zero, 0.0)
        return Answers(torch.zeros_like(system.B), residual, torch.zeros_like(residual), zero, {})

    def judge(
        self, system: System, columns: Tensor, X: Tensor, R: Tensor, norm: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Record true residuals `R = B − A X` of the given columns, keeping the best iterate of each.

        Returns:
            `(k,)` whether met, relative residual, and slack 2u‖A‖‖x‖/‖b‖.
        """
        norms = system.norms[columns]
        relative = column_norms(R) / norms
        slack = 2 * unit_roundoff(X.dtype) * norm * column_norms(X) / norms
        met = relative + slack <= system.rtol
        better = (relative < self.residual[columns]) | met
        which = columns[better]
        self.X[:, which] = X[:, better]
        self.residual[which] = relative[better]
        self.slack[which] = slack[better]
        self.met[which] = met[better]
        return met, relative, slack

    def fail(self, why: str, columns: Tensor) -> None:
        """Remember why the given columns were given up."""
        if columns.numel():
            self.failures.setdefault(why, []).extend(columns.tolist())

    def attainable(self) -> float | None:
        """Largest 2u‖A‖‖x‖/‖b‖ over the columns."""
        return float(self.slack.max()) if self.slack.numel() else None

    def reason(self, system: System, sentences: dict[str, str]) -> str:
        """One sentence on how the solve ended; `sentences` words the keys given to `fail`."""
        count = self.residual.numel()
        if bool(self.met.all()):
            worst = float(self.residual.max()) if count else 0.0
            return f"worst true residual of {count} column(s) {worst:.1e}, rtol={system.rtol:.1e}."
        parts: list[str] = []
        for why, columns in self.failures.items():
            open_columns: Sequence[int] = [j for j in columns if not bool(self.met[j])]
            if open_columns:
                worst = float(self.residual[torch.as_tensor(open_columns, device=self.residual.device)].max())
                shown = f"column {open_columns[0]}" if len(open_columns) == 1 else f"{len(open_columns)} columns"
                parts.append(
                    f"{shown} of {count} ended at a true residual of {worst:.1e} (rtol={system.rtol:.1e}): "
                    f"{sentences[why]}"
                )
        limit = self.attainable()
        if limit is not None and limit > 0.5 * system.rtol:
            name = str(system.B.dtype).removeprefix("torch.")
            parts.append(f"{name} attains a residual of about {limit:.1e} here.")
        return " ".join(parts)
