"""Spectral and Frobenius norm, each with what is certain about it."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.linalg.columns import Counted, check_precision, column_norms, unit_roundoff
from curvops.linalg.results import EstimateReport
from curvops.typing import Matmat

# Probability with which the upper end of the spectral norm's bracket may fail.
FAILURE_PROBABILITY = 1e-3


@torch.no_grad()
def spectral_norm(
    matmat: Matmat,
    size: int,
    *,
    rtol: float = 0.01,
    is_psd: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[float, EstimateReport]:
    """‖A‖₂ of a symmetric A with a bracket: a Ritz value below, a probabilistic bound above.

    The largest Ritz value θ of k Lanczos steps is a lower bound. For a positive semidefinite A and a start uniform on
    the sphere, θ < (1 − ε)‖A‖ has probability at most 1.648 √P exp(−√ε (2k − 1)) (Kuczyński and Woźniakowski 1992,
    theorem 4.2); an indefinite A is treated as A², whose Krylov space of half the depth lies in A's. The steps are
    those that make ε ≤ rtol at a probability of 10⁻³.

    Args:
        matmat: `(P, K) → (P, K)` symmetric product (for a rectangular J: that of JᵀJ, then take roots).
        size: P.
        rtol: Relative width of the bracket, 0 < rtol < 1.
        is_psd: A is known to be positive semidefinite: half the steps.
        generator: Draws the start; None: seed 0.
        dtype: float32 or float64.
        device: Where `matmat` runs.

    Returns:
        θ (raised to nothing: the lower bound itself) and a report with `bracket = (θ, upper)`.

    Raises:
        ShapeError, DataError, ValueError: Arguments; NaN from the product.

    Cost: k ≈ ln(1.648 √P / 10⁻³) / (2 √rtol) products (twice that where not `is_psd`), at most P; O(P k²), memory P k.
    """
    began = time.perf_counter()
    check_precision(dtype, "the operator")
    if size < 1:
        raise ShapeError(f"size={size}; expected at least 1.")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol={rtol}; expected between 0 and 1.")
    A = Counted(matmat)
    power = math.log(1.648 * math.sqrt(size) / FAILURE_PROBABILITY)
    # ‖A‖ < θ/√(1−ε) for A²: a relative width of about ε/2 there.
    epsilon = rtol if is_psd else 1 - (1 - rtol) ** 2
    degree = math.ceil((power / math.sqrt(epsilon) + 1) / 2)
    steps = min(size, degree if is_psd else 2 * degree)
    theta, exact = _largest_ritz(A, size, steps, generator, dtype, device)
    slack = 4 * unit_roundoff(dtype) * math.sqrt(size) * theta
    if exact:
        upper = theta + slack
        reason = f"the Krylov space was exhausted after {A.columns} steps: exact up to rounding."
    else:
        depth = steps if is_psd else steps // 2
        loss = (power / (2 * depth - 1)) ** 2
        upper = theta / (1 - loss if is_psd else math.sqrt(1 - loss)) + slack
        reason = (
            f"Ritz value of {steps} Lanczos steps below; above the Kuczynski-Wozniakowski bound, which fails with "
            f"probability at most {FAILURE_PROBABILITY:g} over the random start."
        )
    return theta, EstimateReport(
        algorithm="Lanczos (spectral norm)",
        matvecs=A.columns,
        seconds=time.perf_counter() - began,
        reason=reason,
        value=theta,
        bracket=(theta, upper),
        half_width=upper - theta,
        probes=1,
        steps=A.columns,
        seed=0 if generator is None else None,
    )


def _largest_ritz(
    A: Counted, size: int, steps: int, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[float, bool]:
    """Largest Ritz value in size after Lanczos with full reorthogonalisation; whether the space is all there is."""
    rng = torch.Generator().manual_seed(0) if generator is None else generator
    v = torch.randn(size, 1, generator=rng, dtype=torch.float64, device=rng.device).to(device=device, dtype=dtype)
    v = v / column_norms(v)
    basis = torch.empty(size, steps, dtype=dtype, device=device)
    H = torch.zeros(steps, steps, dtype=torch.float64)
    exact = steps == size
    for j in range(steps):
        basis[:, j] = v[:, 0]
        w = A(v)
        if not bool(torch.isfinite(w).all()):
            raise DataError("spectral_norm: the operator's product holds NaN or infinity; check parameters and data.")
        V = basis[:, : j + 1]
        H[j, j] = float((v * w).sum())
        for _ in range(2):
            w = w - V @ (V.T @ w)
        beta = float(column_norms(w))
        scale = float(H.abs().max())
        if beta <= 10 * unit_roundoff(dtype) * math.sqrt(size) * max(scale, beta):
            return _extreme(H[: j + 1, : j + 1]), True
        if j + 1 < steps:
            H[j, j + 1] = H[j + 1, j] = beta
            v = w / beta
    return _extreme(H), exact


def _extreme(H: Tensor) -> float:
    return float(torch.linalg.eigvalsh(H).abs().max())


@torch.no_grad()
def frobenius_norm(
    matmat: Matmat,
    size: int,
    *,
    rtol: float = 0.01,
    probes: int | None = None,
    max_probes: int = 10_000,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[float, EstimateReport]:
    """‖A‖_F from E‖Az‖² = ‖A‖_F², z Gaussian, with its standard error; A may be rectangular.

    Args:
        matmat: `(P, K) → (Q, K)` product.
        size: P, the columns of A.
        rtol: Target of t₀.₉₇₅(m−1)·stderr relative to the norm, reached by doubling the probes from 10.
        probes: Exactly so many instead, ≥ 2; the report then says how wide it is, without a target.
        max_probes: Most probes; past P of them the exact norm by unit vectors is cheaper and is taken.
        generator: Draws the probes; None: seed 0.
        dtype: float32 or float64.
        device: Where `matmat` runs.

    Returns:
        The norm, and a report; `converged` False where `max_probes` did not reach rtol.

    Raises:
        ShapeError, DataError, ValueError: Arguments; NaN from the product.

    Cost: m products. For a flat spectrum m ≈ 2/(P rtol²)·t²/4, for rank one 100 times the digits squared.

    Source: Hutchinson (1990) for AᵀA; the error of the root by the delta method.
    """
    from scipy.stats import t as student

    began = time.perf_counter()
    check_precision(dtype, "the operator")
    if size < 1:
        raise ShapeError(f"size={size}; expected at least 1.")
    if not rtol > 0:
        raise ValueError(f"rtol={rtol}; expected > 0.")
    if probes is not None and probes < 2:
        raise ValueError(f"probes={probes}; expected at least 2, a standard error needs them.")
    if max_probes < 2:
        raise ValueError(f"max_probes={max_probes}; expected at least 2.")
    rng = torch.Generator().manual_seed(0) if generator is None else generator
    squares = torch.zeros(0, dtype=torch.float64)
    spent = 0

    def sample(Z: Tensor) -> Tensor:
        nonlocal spent
        W = matmat(Z)
        spent += Z.shape[1]
        if not bool(torch.isfinite(W).all()):
            raise DataError("frobenius_norm: the operator's product holds NaN or infinity; check parameters and data.")
        return W.double().square().sum(0).cpu()

    count = min(10, max_probes) if probes is None else probes
    while True:
        if probes is None and count >= size:
            exact = float(sample(torch.eye(size, dtype=dtype, device=device)).sum().sqrt())
            reason = f"{size} unit vectors cost no more than the probes that rtol={rtol:g} needs."
            seconds = time.perf_counter() - began
            return exact, EstimateReport.exact(exact, "unit vectors (Frobenius norm)", reason, spent, seconds)
        Z = torch.randn(size, count - squares.numel(), generator=rng, dtype=torch.float64, device=rng.device)
        squares = torch.cat((squares, sample(Z.to(device=device, dtype=dtype))))
        value = float(squares.mean().sqrt())
        stderr = 0.0
        if value > 0:
            stderr = float(squares.std()) / math.sqrt(count) / (2 * value)
        half_width = float(student.ppf(0.975, count - 1)) * stderr
        if probes is not None or half_width <= rtol * value or count >= max_probes:
            break
        count = min(2 * count, max_probes)
    converged = probes is not None or half_width <= rtol * value
    reason = f"{count} Gaussian probes, Monte-Carlo half-width {half_width:.2e}."
    if not converged:
        reason += f" rtol={rtol:g} needs more than max_probes={max_probes}; raise it or rtol."
    return value, EstimateReport(
        algorithm="Hutchinson (Frobenius norm)",
        matvecs=spent,
        seconds=time.perf_counter() - began,
        reason=reason,
        converged=converged,
        value=value,
        stderr=stderr,
        bracket=(value, value),
        half_width=half_width,
        probes=count,
        seed=0 if generator is None else None,
    )
