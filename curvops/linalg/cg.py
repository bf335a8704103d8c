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
    probed_norm,
    unit_roundoff,
)
from curvops.linalg.results import SolveReport
from curvops.typing import Matmat

_SENTENCES = {
    "max_iters": "the iteration limit was reached; raise max_iters, add damping or a preconditioner.",
    "stagnated": "the recomputed residual no longer falls; loosen rtol, use float64, or refine=True.",
    "diverged": "the iteration diverged, so the operator is singular or indefinite to working precision; use MINRES(), "
    "add a diagonal or use float64.",
    "range": "b has a component along a direction p with p'Ap zero to working precision, so b is not in the range of "
    "the operator (or the operator is singular to working precision); add a diagonal or project b.",
}
# Checks of the true residual without a halving after which a column is given up.
_PATIENCE = 3
# Iterations between looks at whether rounding has made the target unattainable.
_FUTILITY = 64
# Iterations between looks at the stopping test on an accelerator, each of which waits for it.
_LOOK = 8


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

    Cost: per iteration one product with the columns that are still open and O(P K), one product per recomputed
    residual, two single columns for ‖A‖ where preconditioned. Memory 5 P K.

    Source: Hestenes and Stiefel (1952); Greenbaum (1997) for the attainable residual 2u‖A‖‖x‖.
    """
    every = 1 if B.device.type == "cpu" else _LOOK
    return iterate(matmat, B, rtol, max_iters, preconditioner, x0, progress=progress, every=every)


@torch.no_grad()
def iterate(
    matmat: Matmat,
    B: Float[Tensor, "P K"],
    rtol: float,
    max_iters: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Float[Tensor, "P K"] | None = None,
    *,
    progress: bool = False,
    every: int = 1,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """As `cg`, with the stopping test looked at `every` so many iterations; answers and residuals are the same.

    Between two looks nothing is read back from the device: a column whose test has struck stands still until the next
    look, while the others go on. That costs up to `every − 1` products more.
    """
    began = time.perf_counter()
    system = prepare(B, x0, rtol, max_iters)
    A = Counted(matmat)
    answers = Answers.of(system)
    M = None if preconditioner is None else Counted(preconditioner, "the preconditioner")
    iterations = 0
    if system.active.numel():
        state = _Iteration(A, M, system, answers, every)
        with tqdm(total=system.max_iters, desc="CG", disable=not progress, leave=False) as bar:
            while state.columns.numel() and state.iterations < system.max_iters:
                state.step()
                bar.update()
        if state.columns.numel():
            state.finish()
        iterations = state.iterations
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


class _Iteration:
    """The columns still open and their recurrences; every attribute but `norm` has one entry or column for each.

    Attributes:
        pending: Columns whose test has struck since the last look; None at a look.
        broken: Those of them whose direction was none of descent.
        lowest: Least rᵀMr since the last look, 0-dim.
    """

    def __init__(self, A: Counted, M: Counted | None, system: System, answers: Answers, every: int) -> None:
        self.A, self.M, self.system, self.answers, self.every = A, M, system, answers, every
        self.u = unit_roundoff(system.B.dtype)
        # Below this Rayleigh quotient, relative to ‖A‖, the sign of pᵀAp is decided by rounding.
        self.floor = self.u * (8 + math.sqrt(system.B.shape[0]))
        self.columns = system.active
        self.B = system.B[:, self.columns]
        self.norm = self.B.new_zeros(()) if M is None else probed_norm(A, self.B)
        if system.X is None:
            self.X, self.R = torch.zeros_like(self.B), self.B.clone()
        else:
            self._start_at(system.X[:, self.columns])
        scale = system.norms[self.columns]
        self.target = (0.999 * system.rtol * scale) ** 2
        # In exact arithmetic ‖r‖ ≤ √κ(A) ‖r₀‖, and a κ past 1/u is beyond this precision.
        self.ceiling = 100 / self.u * torch.maximum(column_dots(self.R, self.R), scale**2)
        # Last recomputed residual, and how many of them in a row have not halved it.
        self.last = torch.full_like(self.target, math.inf)
        self.strikes = torch.zeros_like(self.target)
        Z, self.rz = _precondition(M, self.R)
        if M is not None:
            _require_positive(self.rz)
        self.D = Z.clone()
        self.pending: Tensor | None = None
        self.broken = torch.zeros_like(self.target, dtype=torch.bool)
        self.lowest = torch.full_like(self.norm, math.inf)
        self.iterations = 0
        # One column on a processor: its scalars are Python's, at a tenth of a tensor operation's time.
        self.one = _Scalars(self) if every == 1 and self.columns.numel() == 1 and self.D.device.type == "cpu" else None

    def _start_at(self, X: Tensor) -> None:
        AX = self.A(X)
        R = self.B - AX
        self.norm = norm_seen(self.norm, AX, X)
        met, _, _ = self.answers.judge(self.system, self.columns, X, R, float(self.norm))
        self.columns, self.B, self.X, self.R = self.columns[~met], self.B[:, ~met], X[:, ~met], R[:, ~met]

    def step(self) -> None:
        """One iteration of every open column."""
        if self.one is not None:
            self._step_one(self.one)
        else:
            self._step_all()

    def _step_all(self) -> None:
        D, X, R = self.D, self.X, self.R
        AD = self.A(D)
        dAd = column_dots(D, AD)
        curvature = dAd / column_dots(D, D)
        self.norm = torch.maximum(self.norm, curvature.amax())
        sound = curvature > self.floor * self.norm
        length = torch.where(sound if self.pending is None else sound & ~self.pending, self.rz / dAd, 0.0)
        X.addcmul_(D, length)
        R.addcmul_(AD, length, value=-1)
        rr = column_dots(R, R)
        self.iterations += 1
        event = ~sound | (rr <= self.target) | (rr > self.ceiling)
        if self.iterations % _FUTILITY == 0:
            event |= self._futile(rr)
        struck, restart = self._struck(event, ~sound, curvature, rr), None
        if not self.columns.numel():
            return
        if struck is not None:
            rr, restart = struck
        Z, rz = (self.R, rr) if self.M is None else _precondition(self.M, self.R)
        if self.M is not None:
            self.lowest = torch.minimum(self.lowest, rz.amin())
            if self.every == 1:
                _require_positive(rz)
        beta = rz / self.rz
        if restart is not None:
            beta = torch.where(restart, 0.0, beta)
        if self.pending is None:
            self.D.mul_(beta).add_(Z)
            self.rz = rz
        else:  # a column that stands still keeps the direction and the rᵀMr of its last step
            self.D.mul_(torch.where(self.pending, 1.0, beta)).add_(torch.where(self.pending, 0.0, Z))
            self.rz = torch.where(self.pending, self.rz, rz)

    def _struck(self, event: Tensor, broken: Tensor, curvature: Tensor, rr: Tensor) -> tuple[Tensor, Tensor] | None:
        """Note the columns whose test has struck; at a look check them, and answer as `_check`."""
        if self.every > 1:
            if self.pending is not None:
                broken = torch.where(self.pending, self.broken, broken)
                event = event | self.pending
            broken = event & broken
            if self.iterations % self.every and self.iterations < self.system.max_iters:
                self.pending, self.broken = event, broken
                return None
            self.pending = None
            strikes, lowest = torch.stack([event.any().to(self.lowest.dtype), self.lowest]).tolist()
            if not lowest > 0:
                _require_positive(self.lowest)
            self.lowest = torch.full_like(self.lowest, math.inf)
        else:
            strikes = bool(event.any())
        if not strikes:
            return None
        if bool(broken.any()):
            _refuse_negative(curvature[broken], float(self.norm), self.floor)
        return self._check(event.nonzero().flatten(), broken, rr)

    def _step_one(self, one: _Scalars) -> None:
        AD = self.A(self.D)
        Ad = AD[:, 0]
        dAd, dd = torch.dot(one.d, Ad).item(), torch.dot(one.d, one.d).item()
        curvature = dAd / dd if dd else math.nan
        one.norm = max(one.norm, curvature)
        sound = curvature > self.floor * one.norm
        if sound:
            length = one.rz / dAd
            one.x.add_(one.d, alpha=length)
            one.r.add_(Ad, alpha=-length)
        rr = torch.dot(one.r, one.r).item()
        self.iterations += 1
        event = not sound or rr <= one.target or rr > one.ceiling
        look = self.iterations % _FUTILITY == 0
        restart = False
        if event or look:
            self.norm, seen = self.norm.new_tensor(one.norm), self.R.new_tensor([rr])
            if event or bool(self._futile(seen)):
                everyone = torch.ones_like(seen, dtype=torch.bool)
                struck = self._struck(everyone, everyone & (not sound), self.R.new_tensor([curvature]), seen)
                if not self.columns.numel() or struck is None:
                    return
                rr, restart = struck[0].item(), bool(struck[1])
                one.read(self)
        z, rz = one.r, rr
        if self.M is not None:
            Z, products = _precondition(self.M, self.R)
            _require_positive(products)
            z, rz = Z[:, 0], products.item()
        torch.add(z, one.d, alpha=0.0 if restart else rz / one.rz, out=one.d)
        one.rz = rz

    def _futile(self, rr: Tensor) -> Tensor:
        """Columns where rounding alone exceeds rtol (‖x‖ only grows) and the residual is no larger than it."""
        scale = self.system.norms[self.columns]
        rounding = 2 * self.u * self.norm * column_norms(self.X) / scale
        return (rounding >= self.system.rtol) & (rr <= (2 * rounding * scale) ** 2)

    def _check(self, checked: Tensor, broken: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
        """Recompute residuals of the given columns, close those that are met or hopeless, correct the others.

        Returns:
            For the columns that stay open ‖r‖², and whether their recurrence has to start afresh.
        """
        system, answers, columns = self.system, self.answers, self.columns[checked]
        X = self.X[:, checked]
        B = self.B[:, checked]
        AX = self.A(X)
        R = B - AX
        self.norm = norm_seen(self.norm, AX, X)
        norm = float(self.norm)
        met, relative, slack = answers.judge(system, columns, X, R, norm)

        halved = relative <= 0.5 * self.last[checked]
        self.last[checked] = relative
        self.strikes[checked] = torch.where(halved, 0.0, self.strikes[checked] + 1)
        limit = (slack >= system.rtol) & (relative <= 4 * slack)
        null = broken[checked] & ~met & outside_range(B, self.D[:, checked], system.rtol)
        wild = ~met & ~null & (rr[checked] > self.ceiling[checked])
        stuck = ~met & ~null & ~wild & ((self.strikes[checked] >= _PATIENCE) | limit)
        # Where the iterate has run away along a null vector, zero may be the better answer.
        lost = null | wild
        answers.judge(system, columns[lost], torch.zeros_like(X[:, lost]), B[:, lost], norm)
        answers.fail("range", columns[null])
        answers.fail("diverged", columns[wild])
        answers.fail("stagnated", columns[stuck])

        # The recomputed residual replaces the recurrence's. Where it is the larger one by far, or the last direction
        # was no descent, conjugacy to that direction is worth nothing: start afresh.
        self.R[:, checked] = R
        restart = torch.zeros_like(broken)
        restart[checked] = broken[checked] | (column_dots(R, R) > 4 * rr[checked])
        self.target[checked] *= 0.5
        keep = torch.ones_like(broken)
        keep[checked] = ~(met | lost | stuck)
        if not bool(keep.all()):
            self._drop(keep)
            restart = restart[keep]
        return column_dots(self.R, self.R), restart

    def _drop(self, keep: Tensor) -> None:
        self.columns, self.target, self.ceiling = self.columns[keep], self.target[keep], self.ceiling[keep]
        self.last, self.strikes, self.rz = self.last[keep], self.strikes[keep], self.rz[keep]
        self.B, self.X, self.R, self.D = self.B[:, keep], self.X[:, keep], self.R[:, keep], self.D[:, keep]

    def finish(self) -> None:
        """Judge the columns that the iteration limit has left open."""
        AX = self.A(self.X)
        norm = float(norm_seen(self.norm, AX, self.X))
        met, _, _ = self.answers.judge(self.system, self.columns, self.X, self.B - AX, norm)
        self.answers.fail("max_iters", self.columns[~met])


class _Scalars:
    """What one column's iteration needs: Python's numbers, and views of the vectors, which are written in place."""

    def __init__(self, state: _Iteration) -> None:
        self.d, self.x, self.r = state.D[:, 0], state.X[:, 0], state.R[:, 0]
        self.rz = state.rz.item()
        self.read(state)

    def read(self, state: _Iteration) -> None:
        """What a check may have changed."""
        self.norm = float(state.norm)
        self.target, self.ceiling = state.target.item(), state.ceiling.item()


def _precondition(M: Counted | None, R: Tensor) -> tuple[Tensor, Tensor]:
    """M R and the columns' rᵀMr, which a positive definite M keeps positive."""
    if M is None:
        return R, column_dots(R, R)
    Z = M(R)
    return Z, column_dots(R, Z)


def _require_positive(rz: Tensor) -> None:
    """Refuse a preconditioner that is not positive definite; waits for the device."""
    if not bool((rz > 0).all()):
        worst = float(rz.amin()) if not bool(torch.isnan(rz).any()) else math.nan
        raise NotPositiveDefiniteError(
            f"the preconditioner is not positive definite: CG met r'Mr = {worst:.3e} for a residual r; expected > 0. "
            f"Give another preconditioner, or none."
        )


def _refuse_negative(curvature: Tensor, norm: float, floor: float) -> None:
    """Raise for NaN and for curvature that is negative beyond rounding; a vanishing one is the caller's to treat."""
    if not bool(torch.isfinite(curvature).all()):
        raise DataError("CG: the operator's product holds NaN or infinity; check the parameters and the data.")
    lowest = float(curvature.amin())
    if lowest < -floor * max(norm, abs(lowest)):
        raise NotPositiveDefiniteError(
            f"CG met a direction p with p'Ap/p'p = {lowest:.3e} < 0: the operator is not positive semidefinite. Use "
            f"MINRES(), or add_diagonal(d) with d above {-lowest:.3g} at the least (an eigenvalue may lie lower still)."
        )
