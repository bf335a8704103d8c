"""Conjugate gradients on many right-hand sides at once, certified by recomputed residuals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvops.errors import DataError, NotPositiveDefiniteError
from curvops.linalg.columns import (
    Answers,
    Counted,
    System,
    column_dots,
    column_norms,
    norm_seen,
    outside_range,
    prepare,
    unit_roundoff,
)
from curvops.linalg.results import SolveReport
from curvops.typing import Matmat

_SENTENCES = {
    "max_iters": "the iteration limit was reached; raise max_iters, add damping or a preconditioner.",
    "stagnated": "the recomputed residual no longer falls; loosen rtol, use float64, or refine=True.",
    "range": "b has a component along a direction p with p'Ap zero to working precision, so b is not in the range of "
    "the operator (or the operator is singular to working precision); add a diagonal or project b.",
}
# Checks of the true residual without a halving after which a column is given up.
_PATIENCE = 3
# Iterations between looks at whether rounding has made the target unattainable.
_FUTILITY = 64


@torch.no_grad()
def cg(
    matmat: Matmat,
    B: Float[Tensor, "P K"],
    *,
    rtol: float,
    max_iters: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Float[Tensor, "P K"] | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """Solve A X = B for a symmetric positive (semi)definite A.

    Columns are independent Krylov recurrences that share their products; a column that has converged leaves the
    products. When the recurrence of a column reaches its target, its residual is recomputed; if the recomputed one is
    not within rtol, it replaces the recurrence's and the iteration goes on (van der Vorst and Ye, 2000), until it is
    met or no longer falls. For a consistent semidefinite system the answer from `x0=None` is the minimum-norm one.

    Args:
        matmat: `(P, K) → (P, K)`, the product with A; symmetric.
        B: `(P, K)` right-hand sides, float32 or float64.
        rtol: Target of the true relative residual ‖b − Ax‖/‖b‖ of *every* column, > 0. There is no absolute one.
        max_iters: Most iterations; None: `min(max(10 P, 1000), 10_000)`.
        preconditioner: `(P, K) → (P, K)`, product with a symmetric positive definite M ≈ A⁻¹.
        x0: `(P, K)` start. For a singular A the answer is then the solution closest to x0.
        progress: Show a progress bar.

    Returns:
        X `(P, K)` and its report. `report.converged` is False, never an exception, where the target was not met;
        X then holds the best iterate whose residual was recomputed. `residual` is recomputed, and a column counts as
        converged only if it stays within rtol when the rounding of that recomputation (`attainable`) is added.

    Raises:
        NotPositiveDefiniteError: A direction p with pᵀAp < 0 beyond rounding, or a preconditioner with rᵀMr ≤ 0.
        ShapeError, DataError, ValueError: Arguments (see `prepare`), or a product that is NaN.

    Cost: per iteration one product with the columns that are still open and O(P K). Memory 5 P K.

    Source: Hestenes and Stiefel (1952); Greenbaum (1997) for the attainable residual 2u‖A‖‖x‖.
    """
    began = time.perf_counter()
    system = prepare(B, x0, rtol, max_iters)
    A = Counted(matmat)
    answers = Answers.of(system)
    iterations = 0
    if system.active.numel():
        iterations = _iterate(A, system, answers, preconditioner, progress)
    report = SolveReport(
        algorithm="CG" if preconditioner is None else "preconditioned CG",
        matvecs=A.columns,
        seconds=time.perf_counter() - began,
        reason=answers.reason(system, _SENTENCES),
        converged=bool(answers.met.all()),
        iterations=iterations,
        residual=answers.residual,
        attainable=answers.attainable(),
    )
    return answers.X * system.scale, report


def _iterate(
    A: Counted,
    system: System,
    answers: Answers,
    preconditioner: Callable[[Tensor], Tensor] | None,
    progress: bool,
) -> int:
    columns = system.active
    B = system.B[:, columns]
    size, dtype = B.shape[0], B.dtype
    M = None if preconditioner is None else Counted(preconditioner, "the preconditioner")
    # Below this Rayleigh quotient, relative to ‖A‖, the sign of pᵀAp is decided by rounding.
    floor = unit_roundoff(dtype) * (8 + math.sqrt(size))
    norm = B.new_zeros(())
    if system.X is None:
        X, R = torch.zeros_like(B), B.clone()
    else:
        X = system.X[:, columns].clone()
        AX = A(X)
        R = B - AX
        norm = norm_seen(norm, AX, X)
        met, _, _ = answers.judge(system, columns, X, R, float(norm))
        keep = ~met
        columns, B, X, R = columns[keep], B[:, keep], X[:, keep], R[:, keep]
        if not columns.numel():
            return 0

    # Per column: squared target of the recurrence, last recomputed residual, checks that did not halve it.
    target = (0.999 * system.rtol * system.norms[columns]) ** 2
    last = torch.full_like(target, math.inf)
    strikes = torch.zeros_like(target)

    Z, rz = _precondition(M, R)
    D = Z.clone()
    iterations = 0
    with tqdm(total=system.max_iters, desc="CG", disable=not progress, leave=False) as bar:
        while iterations < system.max_iters:
            AD = A(D)
            dAd = column_dots(D, AD)
            curvature = dAd / column_dots(D, D)
            norm = torch.maximum(norm, curvature.amax())
            sound = curvature > floor * norm
            step = torch.where(sound, rz / dAd, 0.0)
            X.addcmul_(D, step)
            R.addcmul_(AD, step, value=-1)
            rr = column_dots(R, R)
            iterations += 1
            bar.update()
            restart = None
            event = ~sound | (rr <= target)
            if iterations % _FUTILITY == 0:
                # ‖x‖ only grows: once rounding alone exceeds rtol, a residual of that size is the end of the road.
                rounding = 2 * unit_roundoff(dtype) * norm * column_norms(X) / system.norms[columns]
                event |= (rounding >= system.rtol) & (rr <= (2 * rounding * system.norms[columns]) ** 2)
            if bool(event.any()):
                if not bool(sound.all()):
                    _refuse_negative(curvature[~sound], float(norm), floor)
                checked = event.nonzero().flatten()
                AX = A(X[:, checked])
                Rt = B[:, checked] - AX
                norm = norm_seen(norm, AX, X[:, checked])
                met, relative, slack = answers.judge(system, columns[checked], X[:, checked], Rt, float(norm))
                halved = relative <= 0.5 * last[checked]
                last[checked] = relative
                strikes[checked] = torch.where(halved, 0.0, strikes[checked] + 1)
                broken = ~sound[checked]
                null = broken & ~met & outside_range(B[:, checked], D[:, checked], system.rtol)
                limit = (slack >= system.rtol) & (relative <= 4 * slack)
                stuck = ~met & ~null & ((strikes[checked] >= _PATIENCE) | limit)
                # Along p the iterate has run away; where its residual shows it, zero is the better answer.
                answers.judge(system, columns[checked[null]], 0 * X[:, checked[null]], B[:, checked[null]], float(norm))
                answers.fail("range", columns[checked[null]])
                answers.fail("stagnated", columns[checked[stuck]])

                # The recomputed residual replaces the recurrence's. Where it is the larger one by far, or the last
                # direction was no descent, conjugacy to that direction is worth nothing: start afresh.
                R[:, checked] = Rt
                rr_true = column_dots(Rt, Rt)
                restart = torch.zeros_like(event)
                restart[checked] = broken | (rr_true > 4 * rr[checked])
                target[checked] *= 0.5
                keep = torch.ones_like(event)
                keep[checked] = ~(met | null | stuck)
                if not bool(keep.all()):
                    columns, B, X, R, D = columns[keep], B[:, keep], X[:, keep], R[:, keep], D[:, keep]
                    target, last, strikes, rz, restart = (v[keep] for v in (target, last, strikes, rz, restart))
                    if not columns.numel():
                        return iterations
                rr = column_dots(R, R)
            if M is None:
                Z, rz_new = R, rr
            else:
                Z, rz_new = _precondition(M, R)
            beta = rz_new / rz
            if restart is not None:
                beta = torch.where(restart, 0.0, beta)
            D.mul_(beta).add_(Z)
            rz = rz_new
    AX = A(X)
    met, _, _ = answers.judge(system, columns, X, B - AX, float(norm_seen(norm, AX, X)))
    answers.fail("max_iters", columns[~met])
    return iterations


def _precondition(M: Counted | None, R: Tensor) -> tuple[Tensor, Tensor]:
    """M R and the columns' rᵀMr, which a positive definite M keeps positive."""
    if M is None:
        return R, column_dots(R, R)
    Z = M(R)
    rz = column_dots(R, Z)
    if not bool((rz > 0).all()):
        worst = float(rz.amin()) if not bool(torch.isnan(rz).any()) else math.nan
        raise NotPositiveDefiniteError(
            f"the preconditioner is not positive definite: CG met r'Mr = {worst:.3e} for a residual r; expected > 0. "
            f"Give another preconditioner, or none."
        )
    return Z, rz


def _refuse_negative(curvature: Tensor, norm: float, floor: float) -> None:
    """Raise for NaN and for curvature that is negative beyond rounding; a vanishing one is the caller's to treat."""
    if not bool(torch.isfinite(curvature).all()):
        raise DataError("CG: the operator's product holds NaN or infinity; check the parameters and the data.")
    lowest = float(curvature.amin())
    if lowest < -floor * max(norm, abs(lowest)):
        raise NotPositiveDefiniteError(
            f"CG met a direction p with p'Ap/p'p = {lowest:.3e} < 0 (largest met: {norm:.3e}): the operator is not "
            f"positive semidefinite. Use MINRES(), or add_diagonal(d) with d > {-lowest:.3g}."
        )
