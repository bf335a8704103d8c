"""Conjugate gradients with what `CG(...)` asks for around it: preconditioner and refinement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.linalg.cg import cg
from curvops.linalg.nystrom import grown_nystrom, nystrom
from curvops.linalg.probes import resolve_seed
from curvops.linalg.refine import refined_solve
from curvops.linalg.results import SolveReport
from curvops.operators import methods
from curvops.operators.routes.plan import counted, product

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Preconditioner = Callable[[Tensor], Tensor]


def solve_cg(
    A: LinearOperator, method: methods.CG, B: Tensor, *, rtol: float, x0: Tensor | None
) -> tuple[Tensor, SolveReport]:
    """CG on columns B as `method` says."""
    spent = counted(A)
    preconditioner, note = _prepared(A, method.preconditioner, B.shape[1])
    if method.refine:
        twin = A.to(torch.float64)

        def inner(R: Tensor, inner_rtol: float) -> tuple[Tensor, SolveReport]:
            return cg(product(A), R, rtol=inner_rtol, max_iters=method.max_iters, preconditioner=preconditioner)

        X, report = refined_solve(inner, product(twin), B, rtol=rtol)
    else:
        X, report = cg(product(A), B, rtol=rtol, max_iters=method.max_iters, preconditioner=preconditioner, x0=x0)
    reason = "; ".join(filter(None, (note, report.reason)))
    return X, replace(report, matvecs=spent()[0], reason=reason)


def _prepared(A: LinearOperator, asked: Any, columns: int) -> tuple[Preconditioner | None, str]:
    from curvops.operators.base import LinearOperator

    if asked is None:
        return None, ""
    if isinstance(asked, LinearOperator):
        if asked.shape != A.shape:
            raise ShapeError(f"CG: the preconditioner {asked!r} is {asked.shape}, expected {A.shape}.")
        if asked._exact("solve") is None and not asked._holds_tensors():
            raise UnsupportedError(
                f"CG: the preconditioner {asked!r} has no exact solve; give a structured operator (KFAC, LowRank plus "
                f"a diagonal, Dense) or Nystrom()."
            )
        return (lambda R: asked.solve(R)), f"preconditioned by {asked!r}"
    if asked == "auto":
        return _automatic(A, columns)
    if isinstance(asked, methods.Nystrom):
        return _nystrom(A, asked.rank, asked.generator)
    raise ShapeError(
        f'CG(preconditioner={asked!r}): expected None, "auto", Nystrom(rank), or an operator with an exact solve.'
    )


def _automatic(A: LinearOperator, columns: int) -> tuple[Preconditioner | None, str]:
    bound = A.lower_bound
    if bound is None or bound <= 0:
        return None, "no preconditioner: no positive lower bound on the spectrum to build one for"
    return _nystrom(A, None, None)


def _nystrom(
    A: LinearOperator, rank: int | None, generator: torch.Generator | None
) -> tuple[Preconditioner | None, str]:
    delta = A.lower_bound
    if delta is None or delta <= 0:
        raise UnsupportedError(f"CG: Nystrom() preconditions a positive definite operator; add a diagonal to {A!r}.")
    size = A.shape[0]
    if rank is not None and rank > size:
        raise ShapeError(f"CG: Nystrom(rank={rank}) for an operator of size {size}; expected a rank of at most {size}.")
    draws = torch.Generator().manual_seed(resolve_seed(generator))

    def undamped(V: Tensor) -> Tensor:
        return product(A)(V) - delta * V

    common: dict[str, Any] = {"generator": draws, "dtype": A.dtype, "device": A.device}
    if rank is None:
        sketch = grown_nystrom(undamped, size, delta=delta, max_rank=max(1, min(size // 4, 256)), **common)
    else:
        sketch = nystrom(undamped, size, rank=rank, **common)
    rank = len(sketch.values)
    return sketch.preconditioner(delta), f"Nyström preconditioner of rank {rank} from {sketch.matvecs} products"
