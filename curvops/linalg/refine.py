"""Iterative refinement: float64 residuals, float32 corrections."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.linalg.columns import Answers, Counted, column_norms, norm_seen, prepare
from curvops.linalg.results import SolveReport
from curvops.typing import Matmat

InnerSolve = Callable[[Tensor, float], tuple[Tensor, SolveReport]]

_SENTENCES = {
    "max_iters": "the rounds of refinement are used up; raise max_rounds.",
    "stagnated": "the corrections no longer reduce the float64 residual; add damping or solve in float64.",
}
# Digits asked of one correction: more costs the inner solver iterations that its own rounding wastes.
_INNER_RTOL = 1e-3


@torch.no_grad()
def refined_solve(
    inner_solve: InnerSolve,
    matmat64: Matmat,
    B: Float[Tensor, "P K"],
    *,
    rtol: float,
    max_rounds: int = 20,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """Solve A X = B to float64 accuracy with a solver that works in float32.

    Each round solves for the correction of every column that is still open, R scaled to unit columns, and recomputes
    the residual with the float64 product. A round helps as long as the inner solver gains any digit, so the float32
    operator may differ from the float64 one by its rounding (u‖A‖‖A⁻¹‖ < 1).

    Args:
        inner_solve: `(R, rtol) → (D, report)` with R, D `(P, k)` in float32 and A D ≈ R. It need not reach its rtol.
        matmat64: `(P, K) → (P, K)` product with A in float64 (the twin's).
        B: `(P, K)` right-hand sides, float32 or float64.
        rtol: Target of the true relative residual ‖b − Ax‖/‖b‖ of every column.
        max_rounds: Most corrections.

    Returns:
        X `(P, K)` in **float64** (rounding it to float32 would undo the refinement) and a report whose `matvecs` count
        both products and whose `iterations` are the inner ones.

    Raises:
        ShapeError, DataError, ValueError: Arguments (see `prepare`).

    Cost: rounds x (one inner solve + one float64 product).

    Source: Wilkinson (1963); Higham (2002), chapter 12.
    """
    began = time.perf_counter()
    system = prepare(B.double(), None, rtol, max_rounds)
    A = Counted(matmat64, "the float64 product")
    answers = Answers.of(system)
    columns = system.active
    X = torch.zeros_like(system.B[:, columns])
    R = system.B[:, columns]
    relative = torch.ones_like(system.norms[columns])
    norm = R.new_zeros(())
    inner_products = iterations = rounds = 0
    worthwhile = _INNER_RTOL
    while columns.numel():
        lengths = column_norms(R)
        # The last round need not do more than what is missing.
        inner_rtol = max(worthwhile, min(0.1, 0.3 * rtol / float(relative.max())))
        D, inner = inner_solve((R / lengths).float(), inner_rtol)
        rounds += 1
        inner_products += inner.matvecs
        iterations += inner.iterations
        if not inner.converged and inner.attainable is not None:
            # float32 cannot do better: do not make it try again.
            worthwhile = min(max(worthwhile, 4 * inner.attainable), 0.3)
        D = D.double() * lengths
        Xn = X + D
        AX = A(Xn)
        Rn = system.B[:, columns] - AX
        norm = norm_seen(norm_seen(norm, AX, Xn), R - Rn, D)
        met, now, _ = answers.judge(system, columns, Xn, Rn, float(norm))
        stuck = ~met & ~(now <= 0.5 * relative)
        spent = ~met & ~stuck & (rounds >= max_rounds)
        answers.fail("stagnated", columns[stuck])
        answers.fail("max_iters", columns[spent])
        keep = ~(met | stuck | spent)
        columns, X, R, relative = columns[keep], Xn[:, keep], Rn[:, keep], now[keep]
    return answers.X * system.scale, SolveReport(
        algorithm="iterative refinement",
        matvecs=A.columns + inner_products,
        seconds=time.perf_counter() - began,
        reason=f"{rounds} float32 correction(s), float64 residuals: {answers.reason(system, _SENTENCES)}",
        converged=bool(answers.met.all()),
        iterations=iterations,
        residual=answers.residual,
        attainable=answers.attainable(),
    )
