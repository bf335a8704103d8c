"""MINRES on many right-hand sides at once: symmetric, possibly indefinite or singular, certified like `cg`."""

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
    probed_norm,
    unit_roundoff,
)
from curvops.linalg.results import SolveReport
from curvops.typing import Matmat

_SENTENCES = {
    "max_iters": "the iteration limit was reached; raise max_iters, add damping or a preconditioner.",
    "stagnated": "the recomputed residual no longer falls; loosen rtol, use float64, or refine=True.",
    "range": "A times the residual vanishes to working precision, so b is not in the range of the operator (or "
    "the operator is singular to working precision); add a diagonal or project b.",
}
# Restarts from a recomputed residual without a halving after which a column is given up.
_PATIENCE = 2


@torch.no_grad()
def minres(
    matmat: Matmat,
    B: Float[Tensor, "P K"],
    *,
    rtol: float,
    max_iters: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Float[Tensor, "P K"] | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """Solve A X = B for a symmetric A of any signs, minimising each residual over its Krylov space.

    For a consistent singular system the answer from `x0=None` is the minimum-norm one; for an inconsistent one
    `converged` is False, the residual is near its least, and X may hold a large part in the null space. A column
    whose recomputed residual is not within rtol is solved again for its correction, until it is met or no longer falls.

    Args:
        matmat: `(P, K) → (P, K)`, the product with A; symmetric.
        B: `(P, K)` right-hand sides, float32 or float64.
        rtol: Target of the true relative residual ‖b − Ax‖/‖b‖ of every column, > 0.
        max_iters: Most iterations; None: `min(max(10 P, 1000), 10_000)`.
        preconditioner: `(P, K) → (P, K)`, product with a symmetric *positive definite* M ≈ |A|⁻¹.
        x0: `(P, K)` start.
        progress: Show a progress bar.

    Returns:
        X `(P, K)` and its report, with the meaning of `cg`'s.

    Raises:
        NotPositiveDefiniteError: A preconditioner with rᵀMr ≤ 0.
        ShapeError, DataError, ValueError: Arguments (see `prepare`), or a product that is NaN.

    Cost: per iteration one product with the columns that are still open and O(P K). Memory 8 P K.

    Source: Paige and Saunders (1975).
    """
    began = time.perf_counter()
    system = prepare(B, x0, rtol, max_iters)
    A = Counted(matmat)
    M = None if preconditioner is None else Counted(preconditioner, "the preconditioner")
    answers = Answers.of(system)
    with tqdm(total=system.max_iters, desc="MINRES", disable=not progress, leave=False) as bar:
        iterations = _restarted(A, M, system, answers, bar)
    return answers.X * system.scale, SolveReport(
        algorithm="MINRES" if preconditioner is None else "preconditioned MINRES",
        matvecs=A.columns,
        seconds=time.perf_counter() - began,
        reason=answers.reason(system, _SENTENCES),
        converged=bool(answers.met.all()),
        iterations=iterations,
        residual=answers.residual,
        attainable=answers.attainable(),
    )


def _restarted(A: Counted, M: Counted | None, system: System, answers: Answers, bar: tqdm) -> int:
    """Sweeps of MINRES, each on the recomputed residual that the one before left."""
    columns = system.active
    B = system.B[:, columns]
    norm = B.new_zeros(()) if M is None or not columns.numel() else probed_norm(A, B)
    if system.X is None:
        X, R = torch.zeros_like(B), B
        relative = torch.ones_like(system.norms[columns])
    else:
        X = system.X[:, columns]
        AX = A(X)
        R = B - AX
        norm = norm_seen(norm, AX, X)
        met, relative, _ = answers.judge(system, columns, X, R, float(norm))
        columns, B, X, R, relative = columns[~met], B[:, ~met], X[:, ~met], R[:, ~met], relative[~met]
    strikes = torch.zeros_like(relative)
    iterations = 0
    factor = 0.9
    while columns.numel():
        target = factor * system.rtol * system.norms[columns]
        D, norm, steps = _sweep(A, M, R, target, norm, system.max_iters - iterations, bar)
        iterations += steps
        X = X + D
        AX = A(X)
        before, R = R, B - AX
        norm = norm_seen(norm, AX, X)
        met, now, slack = answers.judge(system, columns, X, R, float(norm))
        # A correction of vanishing product is a null vector: proof that b is out of reach if b has a part along it.
        null = column_norms(before - R) <= 1e3 * unit_roundoff(B.dtype) * norm * column_norms(D)
        null &= ~met & outside_range(B, D, system.rtol)
        answers.fail("range", columns[null])
        strikes = torch.where(now <= 0.5 * relative, 0.0, strikes + 1)
        last = iterations >= system.max_iters
        stuck = (strikes >= _PATIENCE) | ((slack >= system.rtol) & (now <= 4 * slack)) | last
        stuck &= ~met & ~null
        if bool(stuck.any()):
            # At a least-squares solution Ar = 0 though r is not.
            flat = column_norms(A(R[:, stuck])) <= math.sqrt(unit_roundoff(B.dtype)) * norm * column_norms(R[:, stuck])
            answers.fail("range", columns[stuck][flat])
            answers.fail("max_iters" if last else "stagnated", columns[stuck][~flat])
        keep = ~(met | stuck | null)
        columns, B, X, R, relative, strikes = (
            columns[keep],
            B[:, keep],
            X[:, keep],
            R[:, keep],
            now[keep],
            strikes[keep],
        )
        factor *= 0.7
    return iterations


def _sweep(
    A: Counted, M: Counted | None, R: Tensor, target: Tensor, norm: Tensor, budget: int, bar: tqdm
) -> tuple[Tensor, Tensor, int]:
    """MINRES for A D = R from zero, in the letters of Paige and Saunders: D, a lower bound on ‖A‖, iterations done."""
    u = unit_roundoff(R.dtype)
    count = R.shape[1]
    answer = torch.zeros_like(R)
    open_columns = torch.arange(count, device=R.device)
    D = torch.zeros_like(R)
    y, beta = _lanczos_norm(M, R)
    r1, r2, residual = R, R, R.clone()
    w, w2 = torch.zeros_like(R), torch.zeros_like(R)
    old_beta, dbar, epsilon, phibar = torch.ones_like(beta), torch.zeros_like(beta), torch.zeros_like(beta), beta
    cs, sn = -torch.ones_like(beta), torch.zeros_like(beta)
    for step in range(1, budget + 1):
        v = y / beta
        Av = A(v)
        alpha = column_dots(v, Av)
        y = Av - (alpha / beta) * r2
        if step > 1:
            y -= (beta / old_beta) * r1
        norm = norm_seen(norm, Av, v)
        r1, r2, old_beta = r2, y, beta
        y, beta = _lanczos_norm(M, r2)
        old_epsilon = epsilon
        delta = cs * dbar + sn * alpha
        gbar = sn * dbar - cs * alpha
        epsilon = sn * beta
        dbar = -cs * beta
        # ‖A r‖ / ‖r‖ of the iterate before this step: 0 at a least-squares solution.
        root = torch.hypot(gbar, dbar)
        gamma = torch.hypot(gbar, beta)
        size = torch.hypot(torch.hypot(alpha, beta), old_beta if step > 1 else torch.zeros_like(beta))
        flat = root <= 100 * u * size
        gamma = torch.where(gamma > 0, gamma, 1.0)
        cs, sn = gbar / gamma, beta / gamma
        phi = torch.where(flat, 0.0, cs * phibar)
        phibar = torch.where(flat, phibar, sn * phibar)
        w, w2 = (v - old_epsilon * w2 - delta * w) / gamma, w
        D.addcmul_(w, phi)
        # Where rounding in A d is a tenth of the residual, only a recomputed residual leads further.
        blurred = 20 * u * norm * column_norms(D) >= phibar
        exhausted = beta <= 10 * u * size
        if M is None:
            reached = phibar <= target
        else:
            # The recurrence knows ‖r‖ in M's norm only; carry r itself for its 2-norm.
            live = torch.where(exhausted, 1.0, beta)
            residual = torch.where(flat, residual, sn * sn * residual - (phibar * cs / live) * r2)
            reached = column_norms(residual) <= target
        bar.update()
        event = reached | flat | blurred | exhausted | ~torch.isfinite(phibar)
        if bool(event.any()):
            if not bool(torch.isfinite(phibar).all()):
                raise DataError("MINRES: the operator's product holds NaN or infinity; check parameters and data.")
            done = open_columns[event]
            answer[:, done] = D[:, event]
            keep = ~event
            open_columns = open_columns[keep]
            if not open_columns.numel():
                return answer, norm, step
            D, y, r1, r2, w, w2, residual = (V[:, keep] for V in (D, y, r1, r2, w, w2, residual))
            beta, old_beta, dbar, epsilon, phibar, cs, sn, target = (
                s[keep] for s in (beta, old_beta, dbar, epsilon, phibar, cs, sn, target)
            )
    answer[:, open_columns] = D
    return answer, norm, budget


def _lanczos_norm(M: Counted | None, R: Tensor) -> tuple[Tensor, Tensor]:
    """M R and √(rᵀMr); a vanished r gives 0."""
    if M is None:
        return R, column_norms(R)
    Y = M(R)
    squares = column_dots(R, Y)
    noise = 10 * unit_roundoff(R.dtype) * column_norms(R) * column_norms(Y)
    if bool((squares < -noise).any()):
        raise NotPositiveDefiniteError(
            f"the preconditioner is not positive definite: MINRES met r'Mr = {float(squares.amin()):.3e}; expected "
            f"> 0. Give another preconditioner, or none."
        )
    return Y, squares.clamp_min(0.0).sqrt()
