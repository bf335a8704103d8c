"""Spectral and Frobenius norm, each with what is certain about it."""

from __future__ import annotations

import math
import time

import torch
from scipy.stats import t as student
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.linalg.columns import Counted, check_precision, column_norms, unit_roundoff
from curvops.linalg.probes import gaussian, rademacher, resolve_seed
from curvops.linalg.results import EstimateReport
from curvops.typing import Matmat

# Probability with which the upper end of the spectral norm's bracket may fail.
FAILURE_PROBABILITY = 1e-3


def depth(size: int, rtol: float, is_psd: bool) -> int:
    """Lanczos steps after which the bound on the largest stretch is within rtol."""
    # ‖A‖ < θ/√(1−ε) for A²: a relative width of about ε/2 there.
    epsilon = rtol if is_psd else 1 - (1 - rtol) ** 2
    degree = math.ceil((_power(size) / math.sqrt(epsilon) + 1) / 2)
    return min(size, degree if is_psd else 2 * degree)


def _power(size: int) -> float:
    return math.log(1.648 * math.sqrt(size) / FAILURE_PROBABILITY)


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
    """‖A‖₂ of a symmetric A with a bracket: a projected norm below, a probabilistic bound above.

    θ = max ‖Aw‖/‖w‖ over the Krylov space of k Lanczos steps is a lower bound. For a positive semidefinite A and a
    start uniform on the sphere, θ < (1 − ε)‖A‖ has probability at most 1.648 √P exp(−√ε (2k − 1)) (Kuczyński and
    Woźniakowski 1992, theorem 4.2); an indefinite A is treated as A², whose Krylov space of half the depth lies in
    A's. The steps are those that make the bracket's relative width rtol at a probability of 10⁻³.

    Args:
        matmat: `(P, K) → (P, K)` symmetric product (for a rectangular J: that of JᵀJ, then take roots).
        size: P.
        rtol: Relative width of the bracket, 0 < rtol < 1.
        is_psd: A is known to be positive semidefinite: half the steps.
        generator: Draws the start; None: seed 0.
        dtype: float32 or float64.
        device: Where `matmat` runs.

    Returns:
        θ and a report with `bracket = (θ, upper)`.

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
    power, steps = _power(size), depth(size, rtol, is_psd)
    seed = resolve_seed(generator)
    theta, exact = _krylov_norm(A, size, steps, seed, dtype, device)
    slack = 4 * unit_roundoff(dtype) * math.sqrt(size) * theta
    if exact:
        upper = theta + slack
        reason = f"the Krylov space was exhausted after {A.columns} steps: exact up to rounding."
    else:
        degree = steps if is_psd else (steps + 1) // 2
        loss = (power / (2 * degree - 1)) ** 2
        upper = theta / (1 - loss if is_psd else math.sqrt(1 - loss)) + slack
        reason = (
            f"largest stretch in the space of {steps} Lanczos steps below; above the Kuczynski-Wozniakowski bound, "
            f"which fails with probability at most {FAILURE_PROBABILITY:g} over the random start."
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
        seed=seed,
    )


def _krylov_norm(
    A: Counted, size: int, steps: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[float, bool]:
    """max ‖Aw‖/‖w‖ over a Krylov space, by Lanczos with full reorthogonalisation; whether that is all of ‖A‖."""
    v = gaussian(size, 0, 1, seed=seed, dtype=dtype, device=device)
    v = v / column_norms(v)
    basis = torch.empty(size, steps, dtype=dtype, device=device)
    # A V = V₊ H: its norm also counts the part of A w that leaves the space.
    H = torch.zeros(steps + 1, steps, dtype=torch.float64, device="cpu")
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
        if j + 1 == size or beta <= 10 * unit_roundoff(dtype) * math.sqrt(size) * float(H.abs().max()):
            return float(torch.linalg.matrix_norm(H[: j + 1, : j + 1], 2)), True
        H[j + 1, j] = beta
        if j + 1 < steps:
            H[j, j + 1] = beta
            v = w / beta
    return float(torch.linalg.matrix_norm(H, 2)), False


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
    """‖A‖_F from E‖Az‖² = ‖A‖_F², z of random signs, with its standard error; A may be rectangular.

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

    Cost: m products, m ≈ ½ (t/rtol)²·Σλ⁴/(Σλ²)² at worst (λ the singular values): few for a flat spectrum.

    Source: Hutchinson (1990) for AᵀA; the error of the root by the delta method.
    """
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
    seed = resolve_seed(generator)
    squares = torch.zeros(0, dtype=torch.float64, device="cpu")
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
        start = squares.numel()
        squares = torch.cat(
            (squares, sample(rademacher(size, start, count - start, seed=seed, dtype=dtype, device=device)))
        )
        value = float(squares.mean().sqrt())
        stderr = 0.0
        if value > 0:
            stderr = float(squares.std()) / math.sqrt(count) / (2 * value)
        half_width = float(student.ppf(0.975, count - 1)) * stderr
        if probes is not None or half_width <= rtol * value or count >= max_probes:
            break
        count = min(2 * count, max_probes)
    converged = probes is not None or half_width <= rtol * value
    reason = f"{count} probes of random signs, Monte-Carlo half-width {half_width:.2e}."
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
        seed=seed,
    )
