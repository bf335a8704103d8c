"""Iterative refinement reaches what float32 alone cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvops.linalg.cg import cg
from curvops.linalg.refine import refined_solve

P = 80


@pytest.fixture
def problem(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]
    M = (Q * torch.logspace(-4, 0, P, dtype=torch.float64)) @ Q.T
    return M, torch.randn(P, 3, generator=generator, dtype=torch.float64)


def test_float32_corrections_reach_float64_residuals(problem) -> None:
    M, B = problem
    B[:, 1] = 0
    single = M.float()
    products = 0

    def inner(R: Tensor, rtol: float):
        nonlocal products
        assert R.dtype == torch.float32
        X, report = cg(lambda V: single @ V, R, rtol=rtol)
        products += report.matvecs
        return X, report

    _, alone = inner(B.float(), 1e-9)
    assert not alone.converged
    products = 0
    X, report = refined_solve(inner, lambda V: M @ V, B, rtol=1e-10)
    assert report.converged
    assert X.dtype == torch.float64
    residual = torch.linalg.vector_norm(B - M @ X, dim=0) / torch.linalg.vector_norm(B, dim=0).clamp_min(1e-300)
    assert float(residual.max()) <= 1e-10
    torch.testing.assert_close(report.residual, residual, rtol=1e-3, atol=1e-14)
    assert report.matvecs > products


def test_corrections_that_do_not_help_are_reported(problem) -> None:
    M, B = problem
    _, template = cg(lambda V: V, B, rtol=1e-3)
    X, report = refined_solve(lambda R, rtol: (torch.zeros_like(R), template), lambda V: M @ V, B, rtol=1e-8)
    assert not report.converged
    assert "no longer reduce" in report.reason
    torch.testing.assert_close(report.residual, torch.ones(3, dtype=torch.float64))
    assert bool(torch.isfinite(X).all())


def test_rounds_are_limited(problem) -> None:
    M, B = problem
    single = M.float()
    _, report = refined_solve(
        lambda R, rtol: cg(lambda V: single @ V, R, rtol=0.1), lambda V: M @ V, B, rtol=1e-12, max_rounds=2
    )
    assert not report.converged
    assert "max_rounds" in report.reason
    with pytest.raises(ValueError, match="rtol"):
        refined_solve(lambda R, rtol: cg(lambda V: V, R, rtol=rtol), lambda V: V, B, rtol=0.0)
