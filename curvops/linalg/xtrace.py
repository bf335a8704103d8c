"""XTrace and XDiag (Epperly, Tropp, Webber 2024): every probe serves the sketch of all the others."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.linalg.growth import student
from curvops.linalg.probes import derive_seed, gaussian, rademacher, resolve_seed
from curvops.linalg.results import EstimateReport
from curvops.linalg.traces import FIRST_PROBES, check, unit_vectors
from curvops.typing import Matmat

_STREAM = 4
_CORRELATION = {"XTrace": 2.0, "XDiag": math.sqrt(2)}
"""The leave-one-out estimates share all but one vector, so their spread over √m understates the error of their mean: by
up to 1/√2 for diagonals (the limit as m grows) and up to 1/2 for traces, measured over the spectra of the tests."""


class _Sketch:
    """Y = AΩ = QR and Z = AᵀQ (A symmetric), grown by further probes without repeating a product."""

    def __init__(self, matmat: Matmat, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.matmat, self.size = matmat, size
        self.omega, self.Y, self.Q, self.Z = (torch.zeros(size, 0, dtype=dtype, device=device) for _ in range(4))
        self.matvecs = 0
        self.complete = False
        self.rounding = 0.0

    def add(self, omega: Tensor) -> None:
        Y = self.matmat(omega).detach().to(omega.dtype)
        fresh = Y
        for _ in range(2):
            fresh = fresh - self.Q @ (self.Q.T @ fresh)
        Q, R = torch.linalg.qr(fresh)
        Q = Q - self.Q @ (self.Q.T @ Q)
        Q = torch.linalg.qr(Q)[0]
        self.omega, self.Y = torch.cat([self.omega, omega], 1), torch.cat([self.Y, Y], 1)
        self.Z = torch.cat([self.Z, self.matmat(Q).detach().to(omega.dtype)], 1)
        self.Q = torch.cat([self.Q, Q], 1)
        self.matvecs += 2 * omega.shape[1]
        # Where Y has lost rank, its columns span the range of A, and A = Q QᵀA leaves nothing to estimate.
        scale = float(torch.linalg.vector_norm(self.Y, dim=0).max())
        self.rounding = 10 * torch.finfo(omega.dtype).eps * scale / math.sqrt(self.size)
        lost = float(R.diagonal().abs().min()) <= self.rounding * math.sqrt(self.size)
        self.complete = lost or self.Q.shape[1] >= self.size

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """R `(m, m)` with Y = QR, and S whose column i is the unit vector of range(Q) orthogonal to Y without "
        "column i."""
        R = self.Q.T @ self.Y
        # R is triangular up to the signs and rounding of the blockwise factorisation; a general inverse takes both.
        S = torch.linalg.inv(R).T
        return R, S / torch.linalg.vector_norm(S, dim=0)


def _trace_samples(s: _Sketch) -> Tensor:
    """`(m,)` exchangeable estimates of tr A: tr Q₍ᵢ₎ᵀAQ₍ᵢ₎ plus Hutchinson with probe i on what Q₍ᵢ₎ leaves."""
    R, S = s.leave_one_out()
    m = S.shape[1]
    H, W, T = s.Q.T @ s.Z, s.Q.T @ s.omega, s.Z.T @ s.omega

    def dot(A: Tensor, B: Tensor) -> Tensor:
        return (A * B).sum(0)

    sw, shs, tw, whw = dot(S, W), dot(S, H @ S), dot(T, W), dot(W, H @ W)
    rest = -tw + whw + sw * dot(S, R - H @ W) + sw.square() * shs + sw * dot(T - H.T @ W, S)
    # Uniform on the sphere left over by Q₍ᵢ₎: fewer degrees of freedom, the same mean, less variance.
    length = s.omega.square().sum(0) - W.square().sum(0) + sw.square()
    scale = (s.size - m + 1) / length.clamp(min=torch.finfo(S.dtype).tiny)
    return H.trace() - shs + rest * scale


def _diagonal_samples(s: _Sketch) -> Tensor:
    """`(P, m)` estimates of diag A: diag(Q₍ᵢ₎Q₍ᵢ₎ᵀA) plus Hutchinson with probe i on (I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)A."""
    R, S = s.leave_one_out()
    QS = s.Q @ S
    # (I − Q₍ᵢ₎Q₍ᵢ₎ᵀ) y_i = Q s_i (s_iᵀ r_i), because y_i lies in the range of Q.
    rest = QS * (S * R).sum(0) * s.omega
    return (s.Q * s.Z).sum(1)[:, None] - QS * (s.Z @ S) + rest


def _traces(Z: Tensor, AZ: Tensor) -> Tensor:
    return (Z * AZ).sum(0, dtype=torch.float64)


def _columns(Z: Tensor, AZ: Tensor) -> Tensor:
    return Z * AZ


def _run(
    matmat: Matmat,
    size: int,
    diagonal: bool,
    rtol: float | None,
    probes: int | None,
    max_probes: int,
    seed: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, EstimateReport]:
    began = time.perf_counter()
    check(size, rtol, probes, max_probes)
    target = rtol if rtol is not None else ((0.05 if diagonal else 0.01) if probes is None else None)
    drawn, shown = (seed, seed) if generator is None else (resolve_seed(generator), None)
    stream = derive_seed(drawn, _STREAM)
    name = "XDiag" if diagonal else "XTrace"
    limit = min(max_probes, size)
    goal, sketch = min(probes or FIRST_PROBES, limit), _Sketch(matmat, size, dtype, device)
    with torch.no_grad():
        while True:
            if probes is None and 2 * goal >= size:
                # 2m products of the sketch against P of the unit vectors, which leave no error.
                value = unit_vectors(matmat, size, _columns if diagonal else _traces, dtype, device)
                reason = f"{size} unit vectors cost no more than the test vectors that the target would need: exact."
                spent, seconds = sketch.matvecs + size, time.perf_counter() - began
                shown_value = value if diagonal else float(value)
                report = EstimateReport.exact(shown_value, f"{name} (unit vectors)", reason, spent, seconds)
                return value, (replace(report, stderr=0 * value, half_width=0 * value) if diagonal else report)
            start = sketch.omega.shape[1]
            draw = rademacher if diagonal else gaussian
            omega = draw(size, start, goal - start, seed=stream, dtype=dtype, device=device)
            if not diagonal:
                omega = omega * (math.sqrt(size) / torch.linalg.vector_norm(omega, dim=0))
            sketch.add(omega)
            if sketch.complete:
                whole = (sketch.Q * sketch.Z).sum(1) if diagonal else (sketch.Q * sketch.Z).sum()
                samples = whole[..., None].expand(*whole.shape, 2)
            else:
                samples = _diagonal_samples(sketch) if diagonal else _trace_samples(sketch)
            samples = samples.to(torch.float64)
            value, m = samples.mean(-1), goal
            stderr = (
                _CORRELATION[name] * samples.std(-1) / math.sqrt(m)
                if m > 1 or sketch.complete
                else torch.full_like(value, math.inf)
            )
            half = torch.where(stderr > 0, student(m) * stderr, torch.zeros_like(stderr))
            slack = sketch.rounding * (1 if diagonal else size - sketch.Q.shape[1]) if sketch.complete else 0.0
            half = half + slack
            met = target is None or bool(half.norm() <= target * value.norm())
            if met or probes is not None or goal >= limit:
                break
            goal = min(2 * goal, limit)
    reason = f"{m} probes ({sketch.matvecs} products)"
    if sketch.complete:
        reason += " span the range of the matrix: exact to rounding."
    elif target is not None:
        reason += f" {'met' if met else 'did not meet'} the relative target {target:g}."
    plain = (lambda x: x) if diagonal else (lambda x: float(x))
    return value, EstimateReport(
        algorithm=name,
        matvecs=sketch.matvecs,
        seconds=time.perf_counter() - began,
        reason=reason,
        converged=met,
        value=plain(value),
        stderr=plain(stderr),
        bracket=(plain(value - slack), plain(value + slack)),
        half_width=plain(half),
        probes=m,
        seed=shown,
    )


def xtrace(
    matmat: Matmat,
    size: int,
    *,
    rtol: float | None = None,
    probes: int | None = None,
    max_probes: int = 5_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[float, EstimateReport]:
    """tr A of a symmetric matrix whose spectrum decays, to rtol (default 0.01), by XTrace.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        size: P.
        rtol: Relative half-width wanted; default 0.01, or none when `probes` is given.
        probes: Exactly this many test vectors (two products each); capped at P, where the result is exact.
        max_probes: Bound on growth.
        seed: Seed of the probes.
        generator: Takes the place of `seed` (one draw).
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.

    Returns:
        `(value, report)`; the standard error is twice (`xdiag`: √2 times) the paper's, whose leave-one-out estimates
        are correlated.

    Cost: 2m products, O(P·m²), memory 4·P·m. Once 2m reaches P, the P unit vectors are taken: exact.
    Source: Epperly, Tropp, Webber, XTrace: making the most of every sample in stochastic trace estimation, 2024.
    """
    value, report = _run(matmat, size, False, rtol, probes, max_probes, seed, generator, dtype, device)
    return float(value), report


def xdiag(
    matmat: Matmat,
    size: int,
    *,
    rtol: float | None = None,
    probes: int | None = None,
    max_probes: int = 5_000,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, " P"], EstimateReport]:
    """diag A of a symmetric matrix whose spectrum decays, to rtol (default 0.05 in the 2-norm), by XDiag.

    Arguments, cost and source as in `xtrace`; the report's stderr and half-width are `(P,)`.
    """
    value, report = _run(matmat, size, True, rtol, probes, max_probes, seed, generator, dtype, device)
    return value.to(dtype), report
