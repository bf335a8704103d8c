"""f(A) V by Lanczos, each column to its own depth, with an error checked after the fact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.linalg.lanczos import Tridiagonal, extend, lanczos
from curvops.linalg.results import SolveReport
from curvops.typing import Matmat

FIRST_STEPS = 10
_SLAB_BYTES = 1 << 28
_EXPECTED_STEPS = 128
_LEAST_STEPS = 20

Weight = Callable[[np.ndarray], np.ndarray]
"""w(t) ≥ 0 of a Stieltjes function: |f(x) − f(y)| = |∫₀^∞ w(t) (1/(x + t) − 1/(y + t)) dt|."""


def stieltjes_power(exponent: float) -> Weight:
    """w(t) of xᵖ, −1 < p < 1, p ≠ 0: |sin πp|/π · tᵖ."""
    if not -1 < exponent < 1 or exponent == 0:
        raise ValueError(f"xᵖ is a Stieltjes integral for -1 < p < 1, p ≠ 0, got p = {exponent}.")
    scale = abs(math.sin(math.pi * exponent)) / math.pi
    return lambda t: scale * t**exponent


class _Column:
    """One run seen as a small matrix: coefficients of f(T)e₁ and their error."""

    def __init__(self, tri: Tridiagonal, i: int, lower_bound: float | None) -> None:
        k = int(tri.depth[i])
        self.alphas, self.betas = tri.alphas[i, :k].numpy(), tri.betas[i, :k].numpy()
        self.norm, self.exact = float(tri.norms[i]), bool(tri.exact[i])
        self.theta, self.vectors = self._eigh(k)
        self.rounding = max(float(tri.rounding[i]), 4 * np.finfo(float).eps * float(np.abs(self.theta).max()))
        self.lower_bound = lower_bound
        if lower_bound is not None and self.theta[0] < lower_bound - 20 * self.rounding:
            raise NotPositiveDefiniteError(
                f"The spectrum was said to be bounded below by {lower_bound:.6g}, but Lanczos met the Ritz value "
                f"{self.theta[0]:.6g}. Add a larger multiple of the identity, or correct lower_bound."
            )

    def _eigh(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        theta, vectors = scipy.linalg.eigh_tridiagonal(self.alphas[:k], self.betas[: k - 1], check_finite=False)
        return np.asarray(theta), np.asarray(vectors)

    def _snap(self, theta: np.ndarray) -> np.ndarray:
        # Ritz values within rounding of the bound belong to it: √ of a singular matrix must not see √(1e-16).
        if self.lower_bound is None:
            return theta
        return np.where(theta <= self.lower_bound + self.rounding, self.lower_bound, theta)

    @staticmethod
    def _evaluate(f: Callable[[Tensor], Tensor], theta: np.ndarray) -> np.ndarray:
        return f(torch.from_numpy(np.ascontiguousarray(theta))).numpy()

    def coefficients(self, f: Callable[[Tensor], Tensor], k: int | None = None) -> np.ndarray:
        """‖v‖ f(T_k)e₁, padded to full depth."""
        depth = len(self.alphas)
        theta, vectors = (self.theta, self.vectors) if k is None else self._eigh(k)
        out = np.zeros(depth)
        out[: len(theta)] = self.norm * (vectors @ (self._evaluate(f, self._snap(theta)) * vectors[0]))
        return out

    def attainable(self, f: Callable[[Tensor], Tensor]) -> float:
        """Change of f(T)e₁ when every eigenvalue moves by the products' rounding."""
        low = self.theta - self.rounding
        if self.lower_bound is not None:
            low = np.maximum(low, self.lower_bound)
        moved = self._evaluate(f, self.theta + self.rounding) - self._evaluate(f, low)
        return self.norm * float(np.linalg.norm(moved * self.vectors[0])) / 2

    def agreement(self, f: Callable[[Tensor], Tensor], now: np.ndarray) -> float:
        """Error from successive depths: their last change, enlarged when changes shrink slowly."""
        k = len(self.alphas)
        gap = max(2, k // 6)
        if k <= 2 * gap:
            return math.inf
        before, earlier = self.coefficients(f, k - gap), self.coefficients(f, k - 2 * gap)
        change, older = float(np.linalg.norm(now - before)), float(np.linalg.norm(before - earlier))
        ratio = change / older if older > 0 else 0.0
        return change * max(1.0, ratio / max(1 - ratio, 0.01))

    def certificate(self, weight: Weight) -> float:
        """∫ w(t) ‖r(t)‖/(a + t) dt, r(t) the residual of (A + t)x = v in the Krylov space: bounds the error of f.

        All shifted residuals lie along v_{k+1}, of length ‖v‖·Πβ_j/Π(θ_j + t); in t they are smooth on a log scale,
        where the trapezoidal rule is spectrally accurate (Frommer, Güttel, Schweitzer 2014).
        """
        a = self.lower_bound or 0.0
        theta = np.maximum(self.theta, max(a, self.rounding))
        top = float(theta[-1])
        u = np.linspace(math.log(1e-20 * top), math.log(1e12 * top), 800)
        t = np.exp(u)
        with np.errstate(divide="ignore", over="ignore"):
            logs = np.log(self.betas).sum() - np.log(theta[:, None] + t).sum(0)
            return self.norm * float(np.trapezoid(weight(t) * t * np.exp(logs) / (a + t), u))


def slab(size: int, dtype: torch.dtype, memory: int | None = None) -> int:
    """Columns that run together at first, given the bytes that their bases may take (256 MB at most)."""
    held = _SLAB_BYTES if memory is None else min(memory, _SLAB_BYTES)
    return max(1, int(held / (size * _EXPECTED_STEPS * dtype.itemsize)))


def apply_function(
    matmat: Matmat,
    f: Callable[[Tensor], Tensor],
    V: Float[Tensor, "P K"],
    *,
    rtol: float,
    max_steps: int | None = None,
    lower_bound: float | None = None,
    weight: Weight | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """f(A) V for a symmetric A, column by column in its own Krylov space.

    The depth grows until the error is below rtol·‖f(A)v‖₂ in every column; a column that is done leaves the products.
    With `weight` the error is bounded (for A ≽ lower_bound·I); otherwise it is estimated from successive depths, which
    a function with features that no Ritz value has met yet can deceive. A Krylov space that closes, at P steps at the
    latest, is exact.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        f: Elementwise on float64 eigenvalues.
        V: `(P, K)`.
        rtol: Relative error wanted, 2-norm per column.
        max_steps: Bound on the depth; default min(P, 1000).
        lower_bound: Proven lower bound of the spectrum: Ritz values are kept above it.
        weight: Stieltjes weight of f (`stieltjes_power`), which needs lower_bound ≥ 0.
        memory: Bytes that the bases of the columns that run together may take; columns that need to go deeper than
            that allows start again among fewer. None: as deep as max_steps.
        progress: Show progress bars.

    Returns:
        `(f(A)V, report)`; `report.residual (K,)` is the relative error bound or estimate of each column, and
        `report.attainable` what the rounding of the products allows.

    Raises:
        NotPositiveDefiniteError: A Ritz value disproves `lower_bound`.
        ShapeError: V is not `(P, K)`, or max_steps < 1.
        DataError: A product or V is not finite, or the matrix is not symmetric.

    Cost: Σ depth products; slabs of columns whose bases fit about 256 MB at 128 steps, P·K·steps numbers per slab.
    """
    began = time.perf_counter()
    if V.ndim != 2:
        raise ShapeError(f"apply_function expects V of shape (P, K), got {tuple(V.shape)}.")
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0, got {rtol}.")
    if max_steps is not None and max_steps < 1:
        raise ShapeError(f"max_steps must be >= 1, got {max_steps}.")
    if weight is not None and (lower_bound is None or lower_bound < 0):
        raise NotPositiveDefiniteError(
            f"A Stieltjes bound needs a lower bound >= 0 of the spectrum, got {lower_bound}."
        )
    size, columns = V.shape
    depth = min(size, max_steps or 1000)
    width, allowed = max(1, min(columns, slab(size, V.dtype, memory))), depth
    X, steps, matvecs = torch.zeros_like(V.detach()), 0, 0
    residual, floor = (torch.zeros(columns, dtype=torch.float64, device="cpu") for _ in range(2))
    left = torch.arange(columns, device="cpu")
    with torch.no_grad():
        while len(left):
            if memory is not None:
                allowed = min(depth, max(_LEAST_STEPS, memory // (width * size * V.dtype.itemsize)))
            for piece in left.split(width):
                at = piece.to(V.device)
                found = _slab(matmat, f, V[:, at].detach(), rtol, allowed, lower_bound, weight, progress)
                X[:, at], residual[piece], floor[piece] = found[:3]
                steps, matvecs = max(steps, found[3]), matvecs + found[4]
            if width == 1 or allowed == depth:
                break
            # What was too deep to go together begins again with four times the memory each: a third more products.
            left = left[(residual[left] > rtol) & (floor[left] <= rtol)]
            width = max(1, width // 4)
    attainable = float(floor.max()) if columns else 0.0
    met = bool((torch.maximum(residual, floor) <= rtol).all())
    how = "bounded by shifted residuals" if weight is not None else "estimated from successive depths"
    worst = float(residual.max()) if columns else 0.0
    reason = f"{steps} Lanczos steps, relative error {worst:.1e} {how}."
    if not met:
        limit = (
            f"rounding of the products allows {attainable:.1e} only; multiply in float64"
            if attainable > rtol
            else f"{allowed} steps were allowed"
        )
        reason += f" Target {rtol:g} not met: {limit}."
    return X, SolveReport(
        algorithm="Lanczos f(A)v",
        matvecs=matvecs,
        seconds=time.perf_counter() - began,
        reason=reason,
        converged=met,
        iterations=steps,
        residual=torch.maximum(residual, floor),
        attainable=attainable,
    )


def _slab(
    matmat: Matmat,
    f: Callable[[Tensor], Tensor],
    V: Tensor,
    rtol: float,
    depth: int,
    lower_bound: float | None,
    weight: Weight | None,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """`(f(A)V, errors, attainable, steps, matvecs)` of columns that run together."""
    columns = V.shape[1]
    tri = lanczos(matmat, V, min(FIRST_STEPS, depth), progress=progress)
    coefficients = [np.zeros(0)] * columns
    errors, floors = (
        torch.full((columns,), math.inf, dtype=torch.float64, device="cpu"),
        torch.zeros(columns, dtype=torch.float64, device="cpu"),
    )
    done = tri.norms == 0
    errors[done] = 0
    while True:
        for i in torch.nonzero(~done).flatten().tolist():
            column = _Column(tri, i, lower_bound)
            now = column.coefficients(f)
            length = float(np.linalg.norm(now))
            if column.exact:
                error = 0.0
            elif weight is not None:
                error = column.certificate(weight)
            else:
                error = column.agreement(f, now)
            coefficients[i] = now
            errors[i] = error / length if length > 0 else (0.0 if error == 0 else math.inf)
            floors[i] = column.attainable(f) / length if length > 0 else 0.0
            done[i] = column.exact or float(errors[i]) <= rtol
        if bool(done.all()) or tri.steps >= depth:
            break
        # A finished column takes no further part in the products; its coefficients are kept as they are.
        tri = replace(tri, exact=tri.exact | done)
        tri = extend(matmat, tri, min(depth - tri.steps, max(5, tri.steps // 2)), progress=progress)
    full = torch.zeros(columns, tri.steps, dtype=torch.float64, device="cpu")
    for i, c in enumerate(coefficients):
        full[i, : len(c)] = torch.from_numpy(c)
    out, start = torch.zeros_like(V.T), 0
    for block in tri.blocks:
        piece = full[:, start : start + block.shape[1]].to(V.device, V.dtype)
        out += torch.bmm(piece[:, None, :], block)[:, 0]
        start += block.shape[1]
    return out.T, errors, floors, tri.steps, tri.matvecs


def sqrt(
    matmat: Matmat,
    V: Float[Tensor, "P K"],
    *,
    rtol: float,
    lower_bound: float | None,
    max_steps: int | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """A^½ V for a positive semidefinite A, with a certified error; arguments as in `apply_function`.

    Raises:
        NotPositiveDefiniteError: `lower_bound` is unknown or negative, or was disproved.
    """
    return _root(matmat, V, 0.5, rtol, lower_bound, max_steps, memory, progress)


def inv_sqrt(
    matmat: Matmat,
    V: Float[Tensor, "P K"],
    *,
    rtol: float,
    lower_bound: float | None,
    max_steps: int | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "P K"], SolveReport]:
    """A^-½ V for a positive definite A, with a certified error; arguments as in `apply_function`.

    Raises:
        NotPositiveDefiniteError: `lower_bound` is unknown or not positive, or was disproved.
    """
    return _root(matmat, V, -0.5, rtol, lower_bound, max_steps, memory, progress)


def _root(
    matmat: Matmat,
    V: Tensor,
    exponent: float,
    rtol: float,
    lower_bound: float | None,
    max_steps: int | None,
    memory: int | None,
    progress: bool,
) -> tuple[Tensor, SolveReport]:
    least = 0.0 if lower_bound is None else lower_bound
    if lower_bound is None or not (math.isfinite(least) and (least > 0 or (least == 0 and exponent > 0))):
        sign = "positive" if exponent < 0 else "non-negative"
        raise NotPositiveDefiniteError(
            f"A^{exponent:g} needs a proven {sign} lower bound of the spectrum, got {lower_bound}. Add a multiple of "
            "the "
            "identity with add_diagonal, or give lower_bound."
        )
    return apply_function(
        matmat,
        lambda x: x.clamp(min=least) ** exponent,
        V,
        rtol=rtol,
        max_steps=max_steps,
        lower_bound=lower_bound,
        weight=stieltjes_power(exponent),
        memory=memory,
        progress=progress,
    )
