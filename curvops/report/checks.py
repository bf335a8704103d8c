"""Every measured number against the dense matrices of `reference`: deviation, what is allowed, PASS or FAIL."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.linalg.results import Eigenpairs, EstimateReport
from curvops.operators.base import LinearOperator
from curvops.operators.methods import SOLVE_RTOL
from curvops.report.measure import Measurements, Settings
from curvops.report.reference import dense_ggn, dense_hessian, dense_jacobian_gram, too_large

PRODUCT_RTOL = {torch.float64: 1e-12, torch.float32: 5e-6}
"""Relative error allowed of a product, per dtype."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What was compared.
        deviation: How far off it is.
        allowed: How far off it may be.
        unit: Of both.
    """

    name: str
    deviation: float
    allowed: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed; a NaN is not."""
        return self.deviation <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """All comparisons, or the sentence that says why there are none.

    Attributes:
        checks: Empty where skipped.
        skipped: Why; None where made.
        seconds: Time of the dense matrices and the comparisons.
    """

    checks: tuple[Check, ...] = ()
    skipped: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed for check in self.checks)


def check(m: Measurements, settings: Settings) -> Verdict:
    """Compare every number with dense float64 matrices built by plain automatic differentiation.

    Products must agree to rounding; eigenvalues within their residuals; the solution must have the residual claimed;
    a randomised estimate must lie within twice its 95 % half-width, and the samples' total variance within four of its
    own standard errors, so that an honest run fails about once in ten thousand.
    """
    began = time.perf_counter()
    inputs = m.spread.jacobian.curvature.objective
    skipped = too_large(m.ggn.shape[0], max(m.rows, m.spread.jacobian.shape[0]))
    if skipped:
        return Verdict(skipped=skipped)
    G, H = dense_ggn(m.ggn.objective), dense_hessian(m.ggn.objective)
    A = G + settings.delta * torch.eye(len(G), dtype=G.dtype)
    values_G, values_H = torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(H)
    k = len(m.top_ggn.values)
    b, x = _plain(m.rhs), _plain(m.solution)
    checks = (
        _product("GGN times random vectors", m.ggn, G, settings),
        _product("Hessian times random vectors", m.hessian, H, settings),
        _eigenvalues(f"top {k} eigenvalues of the GGN", m.top_ggn, values_G[-k:], values_G),
        _eigenvalues(f"top {k} eigenvalues of the Hessian", m.top_hessian, values_H[-k:], values_H),
        _eigenvalues("smallest eigenvalue of the Hessian", m.bottom_hessian, values_H[:1], values_H),
        _estimate("trace of the GGN", m.trace, float(G.trace()), ""),
        _estimate("log det(GGN + δI)", m.logdet, float(torch.logdet(A)), "nats"),
        Check("residual of the solve", float((b - A @ x).norm() / b.norm()), _residual_allowed(m), "relative"),
        _variance(m.spread.deviations, torch.linalg.inv(A), dense_jacobian_gram(inputs)),
    )
    return Verdict(checks=checks, seconds=time.perf_counter() - began)


def _plain(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _product(name: str, operator: LinearOperator, dense: Tensor, settings: Settings) -> Check:
    V = torch.randn(len(dense), 8, generator=settings.generator(5), dtype=torch.float64)
    expected = dense @ V
    error = _plain(operator @ V.to(operator.device, operator.dtype)) - expected
    return Check(name, float(error.norm() / expected.norm()), PRODUCT_RTOL[operator.dtype], "relative")


def _eigenvalues(name: str, pairs: Eigenpairs, exact: Tensor, spectrum: Tensor) -> Check:
    """An eigenvalue lies within the residual of every Ritz value; rounding of the products comes on top."""
    rounding = 4 * len(spectrum) * torch.finfo(pairs.values.dtype).eps * float(spectrum.abs().max())
    if pairs.values.numel() != exact.numel():
        return Check(name, math.nan, rounding, "absolute")
    deviation = (_plain(pairs.values) - exact).abs().max()
    return Check(name, float(deviation), float(pairs.residuals.max()) + rounding, "absolute")


def _estimate(name: str, report: EstimateReport, exact: float, unit: str) -> Check:
    rounding = 1e-9 * abs(exact)
    return Check(name, abs(float(report.value) - exact), 2 * float(report.half_width) + rounding, unit or "absolute")


def _residual_allowed(m: Measurements) -> float:
    """The residual claimed, and what it cost to compute it: rounding of the products and of the dense matrix."""
    rtol = max(SOLVE_RTOL[m.ggn.dtype], m.solve.worst_residual)
    return rtol + 10 * PRODUCT_RTOL[m.ggn.dtype]


def _variance(deviations: Tensor, covariance: Tensor, gram: Tensor) -> Check:
    """Sum over the outputs of the samples' variance, against tr JΣJᵀ; its standard error is √(2/n) ‖JΣJᵀ‖_F."""
    n = deviations.shape[1]
    M = covariance @ gram
    exact = float(M.trace())
    error = math.sqrt(2 / n * float((M * M.T).sum())) / exact
    found = float(_plain(deviations).square().sum()) / n
    return Check("total predictive variance of the samples", abs(found / exact - 1), 4 * error, "relative")
