"""Conjugate gradients with what `CG(...)` asks for around it: preconditioner and refinement.

`preconditioner="auto"` grows a randomised Nyström sketch (Frangella, Tropp and Udell 2023) while a model of the
products still to be spent says that doubling its rank pays for itself, and builds none where the solve is short.
Jacobi and KFAC are never chosen: on these matrices they often cost iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError, UnsupportedError
from curvops.linalg.cg import cg
from curvops.linalg.nystrom import NystromApproximation, grown_nystrom, nystrom
from curvops.linalg.probes import resolve_seed
from curvops.linalg.refine import refined_solve
from curvops.linalg.results import SolveReport
from curvops.memory import default_budget
from curvops.operators import methods
from curvops.operators.composites import Sum
from curvops.operators.diagonal import diagonal_of
from curvops.operators.routes.plan import counted, dense_is_affordable, product

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Preconditioner = Callable[[Tensor], Tensor]


def solve_cg(
    A: LinearOperator, method: methods.CG, B: Tensor, *, rtol: float, x0: Tensor | None
) -> tuple[Tensor, SolveReport]:
    """CG on columns B as `method` says."""
    spent = counted(A)
    preconditioner, note = _prepared(A, method.preconditioner, B.shape[1], rtol)
    set_up, _ = spent()
    options: dict[str, Any] = {"max_iters": method.max_iters, "preconditioner": preconditioner}
    try:
        if method.refine:
            X, report = _refined(A, B, rtol, x0, options)
        else:
            X, report = cg(product(A), B, rtol=rtol, x0=x0, **options)
    except NotPositiveDefiniteError as refusal:
        raise NotPositiveDefiniteError(f"{refusal} ({A!r}{', ' + note if note else ''}.)") from refusal
    reason = "; ".join(filter(None, (note, report.reason)))
    # The twin's products of a refinement are in its own report and not in A's count.
    return X, replace(report, matvecs=set_up + report.matvecs, seconds=spent()[1], reason=reason)


def _refined(
    A: LinearOperator, B: Tensor, rtol: float, x0: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, SolveReport]:
    if x0 is not None:
        raise UnsupportedError("CG(refine=True, x0=…): refinement starts from zero; give one or the other.")
    twin = A.to(torch.float64)

    def inner(R: Tensor, inner_rtol: float) -> tuple[Tensor, SolveReport]:
        return cg(product(A), R.to(A.dtype), rtol=inner_rtol, **options)

    return refined_solve(inner, product(twin), B, rtol=rtol)


def _prepared(A: LinearOperator, asked: Any, columns: int, rtol: float) -> tuple[Preconditioner | None, str]:
    """What applies the preconditioner asked for, and the sentence about it."""
    from curvops.operators.base import LinearOperator

    if asked is None:
        return None, ""
    if isinstance(asked, LinearOperator):
        return _given(A, asked), f"preconditioned by {asked!r}"
    if asked == "auto":
        return _automatic(A, columns, rtol)
    if isinstance(asked, methods.Nystrom):
        return _nystrom(A, asked.rank, asked.generator)
    raise ShapeError(
        f'CG(preconditioner={asked!r}): expected None, "auto", Nystrom(rank), or an operator with an exact solve.'
    )


def _given(A: LinearOperator, asked: LinearOperator) -> Preconditioner:
    from curvops.operators.dense import Dense

    if asked.shape != A.shape or asked.dtype != A.dtype or asked.device != A.device:
        raise ShapeError(
            f"CG: the preconditioner {asked!r} is {asked.shape[0]} x {asked.shape[1]} in {asked.dtype} on "
            f"{asked.device}; expected {A.shape[0]} x {A.shape[1]} in {A.dtype} on {A.device} for {A!r}."
        )
    asked._require_symmetric("CG's preconditioner")
    if asked._exact("solve") is not None:
        return asked._solve
    if asked._holds_tensors() and dense_is_affordable(asked):
        return Dense(asked.to_dense(), is_symmetric=True)._solve
    raise UnsupportedError(
        f"CG: the preconditioner {asked!r} has no exact solve; give a structured operator (KFAC, LowRank plus "
        f"a diagonal, Dense) or Nystrom()."
    )


class _Damped:
    """`A = C + D` as a sketch sees it: products with C alone, and the diagonal D, a number or a vector.

    Where A is no sum with a positive diagonal, C is A less its lower bound.
    """

    def __init__(self, A: LinearOperator, bound: float) -> None:
        self.A, self.bound = A, bound
        self.diagonal: Tensor | float = bound
        self.shift = bound
        self._terms: tuple[LinearOperator, ...] = (A,)
        if isinstance(A, Sum):
            diagonals = [term for term in A.terms if diagonal_of(term) is not None]
            others = tuple(term for term in A.terms if diagonal_of(term) is None)
            if len(diagonals) == 1 and others and all(term.is_psd for term in others):
                d = diagonal_of(diagonals[0])
                assert d is not None
                d = d.detach()
                if bool((d > 0).all()):
                    self.diagonal = float(d[0]) if bool((d == d[0]).all()) else d
                    self.shift, self._terms = 0.0, others

    def matmat(self, V: Tensor) -> Tensor:
        """Products with C + shift·I, counted as the operator's own."""
        if self._terms[0] is self.A:
            return product(self.A)(V)
        self.A._count += V.shape[1]
        with torch.no_grad():
            total = self._terms[0]._apply(V)
            for term in self._terms[1:]:
                total = total + term._apply(V)
        return total

    @property
    def smallest(self) -> float:
        """The least entry of D."""
        return float(self.diagonal.min()) if isinstance(self.diagonal, Tensor) else self.diagonal


class CostModel:
    """Whether a sketch of twice the rank pays for itself, in products.

    With rank r the preconditioned condition number is about 1 + 5 λ_r/δ (the factor covers what a sketch misses,
    measured on networks' GGNs and power laws), and CG takes about ½ √κ ln(2/rtol) iterations for each of K columns. The
    next λ follows from the last two, as on a power law. Static: the same input gives the same rank.

    Args:
        columns: K right-hand sides.
        rtol: Their target.
        delta: δ, the least of the damping.
    """

    def __init__(self, columns: int, rtol: float, delta: float) -> None:
        self.columns, self.delta = columns, delta
        self.digits = math.log(2 / min(rtol, 1.0))
        self.last: list[float] = []
        self.pays = True

    def iterations(self, eigenvalue: float) -> float:
        """CG's iterations when `eigenvalue` is the largest left to it."""
        return max(1.0, 0.5 * math.sqrt(1 + eigenvalue / self.delta) * self.digits)

    def enough(self, sketch: NystromApproximation) -> bool:
        """Whether growth should end with this sketch."""
        rank, last = sketch.rank, float(sketch.values[-1])
        self.last.append(last)
        if len(self.last) == 1:
            # Without a second rank there is no decay to read; a solve this short is not worth one.
            self.pays = self.columns * self.iterations(float(sketch.values[0])) > 10 * _FIRST_RANK
            return not self.pays
        decay = min(1.0, last / self.last[-2]) if self.last[-2] > 0 else 1.0
        gain = self.iterations(5 * last) - self.iterations(5 * last * decay)
        return self.columns * gain <= rank


def _automatic(A: LinearOperator, columns: int, rtol: float) -> tuple[Preconditioner | None, str]:
    bound = A.lower_bound
    if bound is None or bound <= 0:
        return None, "no preconditioner: no positive lower bound on the spectrum to build one for"
    most = _rank_limit(A)
    if most < _FIRST_RANK or columns == 0:
        return None, f"no preconditioner: P = {A.shape[0]:,} leaves no room for one"
    damped = _Damped(A, bound)
    model = CostModel(columns, rtol, damped.smallest)
    sketch = grown_nystrom(
        damped.matmat, A.shape[0], delta=damped.smallest, max_rank=most, rank=_FIRST_RANK, shift=damped.shift,
        generator=torch.Generator().manual_seed(0), dtype=A.dtype, device=A.device, enough=model.enough,
    )  # fmt: skip
    if not model.pays:
        return None, (
            f"no preconditioner: a look of {sketch.matvecs} products expects {model.iterations(model.last[0]):.0f} "
            f"iterations at most, which a sketch would not repay"
        )
    why = f"the cost model stopped there for {columns} right-hand side(s)" if sketch.rank < most else "the largest rank"
    return sketch.preconditioner(damped.diagonal), f"{_described(sketch)}: {why}"


def _nystrom(
    A: LinearOperator, rank: int | None, generator: torch.Generator | None
) -> tuple[Preconditioner | None, str]:
    bound = A.lower_bound
    if bound is None or bound <= 0:
        raise UnsupportedError(f"CG: Nystrom() preconditions a positive definite operator; add a diagonal to {A!r}.")
    size = A.shape[0]
    if rank is not None and rank > size:
        raise ShapeError(f"CG: Nystrom(rank={rank}) for an operator of size {size}; expected a rank of at most {size}.")
    damped = _Damped(A, bound)
    common: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(resolve_seed(generator)),
        "dtype": A.dtype,
        "device": A.device,
        "shift": damped.shift,
    }
    if rank is None:
        sketch = grown_nystrom(
            damped.matmat, size, delta=damped.smallest, max_rank=max(1, min(size // 4, 256)), **common
        )
    else:
        sketch = nystrom(damped.matmat, size, rank=rank, **common)
    return sketch.preconditioner(damped.diagonal), _described(sketch)


def _described(sketch: NystromApproximation) -> str:
    return f"Nyström preconditioner of rank {sketch.rank} from {sketch.matvecs} products"


def _rank_limit(A: LinearOperator) -> int:
    """Half the size at most, and three tall matrices of that rank within a quarter of the budget."""
    size = A.shape[0]
    budget = default_budget(A.device) if A.memory_budget is None else A.memory_budget
    return min(size // 2, _MOST_RANK, budget // 4 // (3 * size * A.dtype.itemsize))


_FIRST_RANK, _MOST_RANK = 2, 512
