"""curvops beside linear_operator at its defaults, on the same matrices: error, claimed error, products.

    PYTHONPATH=tests python tests/benchmarks/against_linear_operator.py

The matrices are the digits GGN + δI, P = 1,210. linear_operator gets the dense matrix in a class that counts columns.
What each claims: a solve its tolerance, an estimate its half-width; linear_operator states none for its
log-determinants and draws.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from digits import dense_ggn
from torch import Tensor

import curvops as co

DELTAS = (0.01, 0.1, 1.0, 10.0)
DRAWS = 200
BULK = 600
"""Directions, those of the smallest eigenvalues, in which the variance of draws is compared."""


class Row(NamedTuple):
    """One answer: its error, the error that it claims (None: it claims nothing), and the columns it multiplied."""

    question: str
    delta: float
    library: str
    error: float
    claimed: float | None
    products: int

    def __str__(self) -> str:
        claim = "none" if self.claimed is None else f"{self.claimed:.2g}"
        return (
            f"{self.question:<28} δ={self.delta:<5g} {self.library:<16} error {self.error:<9.2g} "
            f"claimed {claim:<9} products {self.products:,}"
        )


def rows() -> Iterator[Row]:
    """Every comparison, ours first."""
    M = dense_ggn()
    size = len(M)
    eye = torch.eye(size, dtype=M.dtype)
    b = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    for delta in DELTAS:
        A = M + delta * eye
        exact = torch.linalg.cholesky(A).diagonal().log().sum() * 2
        ours = _ours(M, delta)
        x, report = ours.solve(b, co.CG(preconditioner="auto"), return_report=True)
        yield Row("solve, relative residual", delta, "curvops", _residual(A, x, b), 1e-6, report.matvecs)
        theirs, count = _theirs(A)
        yield Row("solve, relative residual", delta, "linear_operator", _residual(A, theirs.solve(b), b), 1.0, count())

        value, report = ours.logdet(co.SLQ(), return_report=True)
        yield Row("log det, nats", delta, "curvops", float(value - exact), report.half_width, report.matvecs)
        theirs, count = _theirs(A)
        torch.manual_seed(0)  # its probes come from the global generator
        yield Row("log det, nats", delta, "linear_operator", float(theirs.logdet() - exact), None, count())

        noise = torch.randn(size, DRAWS, generator=torch.Generator().manual_seed(1), dtype=M.dtype)
        Z, report = ours.sqrt_matvec(noise, co.Lanczos(rtol=1e-4), return_report=True)
        yield Row("draws of N(0, A), bulk", delta, "curvops", *_bulk(Z, M, delta), report.matvecs)
        theirs, count = _theirs(A)
        torch.manual_seed(0)
        draws = theirs.zero_mean_mvn_samples(DRAWS).T
        yield Row("draws of N(0, A), bulk", delta, "linear_operator", _bulk(draws, M, delta)[0], None, count())


def _ours(M: Tensor, delta: float) -> co.LinearOperator:
    G = co.Closure(lambda V: M @ V, tuple(M.shape), batched=True, is_psd=True)  # type: ignore[arg-type]
    G.memory_budget = 10**8
    return G.add_diagonal(delta)


def _theirs(A: Tensor) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from linear_operator.operators import DenseLinearOperator

    seen = [0]

    class Counted(DenseLinearOperator):
        def _matmul(self, rhs: Tensor) -> Tensor:
            seen[0] += rhs.shape[-1] if rhs.dim() > 1 else 1
            return super()._matmul(rhs)

    return Counted(A), lambda: seen[0]


def _residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - A @ x).norm() / b.norm())


def _bulk(Z: Tensor, M: Tensor, delta: float) -> tuple[float, float]:
    """Variance of the draws in the directions of the smallest eigenvalues over the exact one, less 1; its 99 % error.

    The error is that of exact draws, of which there are a finite number.
    """
    values, Q = torch.linalg.eigh(M)
    wanted = values[:BULK].clamp(min=0) + delta
    error = float((Q[:, :BULK].T @ Z).square().sum() / DRAWS / wanted.sum()) - 1
    return error, 2.6 * math.sqrt(2 * float(wanted.square().sum()) / DRAWS) / float(wanted.sum())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for row in rows():
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
