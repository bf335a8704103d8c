"""Gauss and Gauss–Radau rules of Lanczos runs, and the interval in which they put zᵀ f(A) z.

For f with known derivative signs the Gauss rule errs to one side and the Radau rule with a node at or below the
spectrum to the other, with the products already made (Golub and Meurant 2010, chapter 6).

Rounding enters with the runs' own measured η (`Tridiagonal.rounding`): T belongs to A + E, ‖E‖₂ ≲ η, so every
eigenvalue moved by at most η (Weyl), and the bounds are taken of f at nodes moved by η to the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.linalg.lanczos import Tridiagonal


@dataclass(frozen=True)
class SpectralFunction:
    """f, evaluated elementwise on float64 tensors of eigenvalues, and what is known of its derivatives.

    Attributes:
        name: For reports.
        function: f.
        gauss: Side on which the Gauss rule errs: "upper" when the even derivatives are negative (log, x/(x + δ), xᵖ
            with 0 < p < 1), "lower" when they are positive (1/x, x⁻ᵖ). The Radau rule errs to the other side. None:
            unknown.
        increasing: True, False, or None when neither is known.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gauss: Literal["upper", "lower"] | None = None
    increasing: bool | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def log(shift: float = 0.0) -> SpectralFunction:
    """log(x + shift)."""
    return SpectralFunction("log", lambda x: torch.log(x + shift), "upper", True)


def inverse(shift: float = 0.0) -> SpectralFunction:
    """1/(x + shift)."""
    return SpectralFunction("inverse", lambda x: 1 / (x + shift), "lower", False)


def shrinkage(shift: float) -> SpectralFunction:
    """x/(x + shift): its trace is the effective number of parameters."""
    return SpectralFunction("shrinkage", lambda x: x / (x + shift), "upper", True)


def power(exponent: float, shift: float = 0.0) -> SpectralFunction:
    """(x + shift)ᵖ; its derivative signs are known for p < 2."""
    name = f"power {exponent:g}"
    if exponent in (0.0, 1.0):
        return SpectralFunction(name, lambda x: (x + shift) ** exponent, "upper", True)
    if exponent < 0:
        return SpectralFunction(name, lambda x: (x + shift) ** exponent, "lower", False)
    side = "upper" if exponent < 1 else "lower" if exponent < 2 else None
    return SpectralFunction(name, lambda x: (x + shift) ** exponent, side, True)


@dataclass(frozen=True)
class Rule:
    """Nodes and weights per run: ∫ f dμ ≈ Σ_j weights_j f(nodes_j), μ the spectral measure of z with mass ‖z‖².

    Attributes:
        nodes: `(m, k)`, ascending.
        weights: `(m, k)`, non-negative, each row sums to ‖z‖².
    """

    nodes: Float[Tensor, "m k"]
    weights: Float[Tensor, "m k"]

    def apply(self, f: Callable[[Tensor], Tensor], move: Tensor | None = None, floor: Tensor | None = None) -> Tensor:
        """`(m,)` sums of f at the nodes, moved by `move (m,)` and kept above `floor (m,)`; nodes without weight are "
        "skipped."""
        nodes = self.nodes if move is None else self.nodes + move[:, None]
        if floor is not None:
            nodes = torch.maximum(nodes, floor[:, None])
        values = f(nodes)
        if values.shape != nodes.shape:
            raise ShapeError(f"f must map eigenvalues elementwise, {tuple(nodes.shape)} became {tuple(values.shape)}.")
        return torch.where(self.weights > 0, self.weights * values, torch.zeros_like(values)).sum(1)


@dataclass(frozen=True)
class Rules:
    """Both rules of m runs, ready to bound any f (and any shift of the matrix).

    Attributes:
        gauss: Gauss rule, k nodes.
        radau: Gauss–Radau rule, k + 1 nodes, one of them at `node`; None when no lower bound is known.
        node: `(m,)` the prescribed node: the lower bound (or the smallest Ritz value, should rounding have put it
            below), less η, so that T − node·I is definite even where the bound is attained. None without a lower bound.
        rounding: `(m,)` η.
        depth: `(m,)` steps taken.
        exact: `(m,)` runs whose Gauss rule is exact.
        top: `(m,)` largest Ritz value plus its residual.
        bottom: `(m,)` lower bound if known, else smallest Ritz value less its residual.
    """

    gauss: Rule
    radau: Rule | None
    node: Float[Tensor, " m"] | None
    rounding: Float[Tensor, " m"]
    depth: Tensor
    exact: Tensor
    top: Float[Tensor, " m"]
    bottom: Float[Tensor, " m"]


def _eigh(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues `(m, k)`, first and last components `(m, k)` of the eigenvectors of tridiagonal matrices."""
    values, first, last = (np.empty(alphas.shape) for _ in range(3))
    for i, (a, b) in enumerate(zip(alphas.numpy(), betas.numpy(), strict=True)):
        values[i], vectors = scipy.linalg.eigh_tridiagonal(a, b, check_finite=False)
        first[i], last[i] = vectors[0], vectors[-1]
    return torch.from_numpy(values), torch.from_numpy(first), torch.from_numpy(last)


def rules(tri: Tridiagonal, lower_bound: float | None = None) -> Rules:
    """Gauss rule and, with a lower bound, Gauss–Radau rule of Lanczos runs.

    Args:
        tri: The runs.
        lower_bound: Proven lower bound of the spectrum; None leaves the Radau rule out.

    Raises:
        NotPositiveDefiniteError: A Ritz value lies below `lower_bound` by more than rounding: the bound is false.

    Cost: O(m·k²), no product.
    """
    theta, first, last = _eigh(tri.alphas, tri.betas[:, :-1])
    mass = tri.norms.square()[:, None]
    gauss = Rule(theta, mass * first.square())
    # The padding of a run that ended early has no part in any residual.
    residual = torch.where(tri.exact[:, None], torch.zeros_like(last), tri.betas[:, -1:] * last.abs())
    unit = torch.finfo(torch.float64).eps
    eta = torch.maximum(tri.rounding, 4 * unit * theta.abs().amax(1))
    real = gauss.weights > 0
    lowest = torch.where(real, theta, torch.full_like(theta, math.inf)).amin(1).where(tri.norms > 0, tri.alphas[:, 0])
    top, bottom = theta[:, -1] + residual[:, -1], theta[:, 0] - residual[:, 0]
    if lower_bound is None:
        return Rules(gauss, None, None, eta, tri.depth, tri.exact, top, bottom)
    below = (tri.norms > 0) & (lowest < lower_bound - 20 * eta)
    if bool(below.any()):
        raise NotPositiveDefiniteError(
            f"The spectrum was said to be bounded below by {lower_bound:.6g}, but Lanczos met the Ritz value "
            f"{float(lowest[below].min()):.6g} (rounding {float(eta.max()):.1e}). Add a larger multiple of the "
            "identity, or "
            "correct lower_bound."
        )
    node = torch.clamp(lowest, max=lower_bound) - eta
    # α̂ = a + β_k² e_kᵀ(T_k − aI)⁻¹e_k; every term is positive, because a lies below every Ritz value by η at least.
    gap = (theta - node[:, None]).clamp(min=1e-300)
    extra = node + (residual.square() / gap).sum(1)
    alphas = torch.cat([tri.alphas, extra[:, None]], dim=1)
    theta_r, first_r, _ = _eigh(alphas, tri.betas)
    return Rules(
        gauss,
        Rule(theta_r, mass * first_r.square()),
        node,
        eta,
        tri.depth,
        tri.exact,
        top,
        torch.full_like(bottom, lower_bound),
    )


def gauss(tri: Tridiagonal, f: Callable[[Tensor], Tensor]) -> Float[Tensor, " m"]:
    """Gauss values of zᵀ f(A) z, one per run; exact for polynomials of degree 2k − 1 and for exact runs. O(m·k²)."""
    return rules(tri).gauss.apply(f)


def gauss_radau(tri: Tridiagonal, f: Callable[[Tensor], Tensor], node: float) -> Float[Tensor, " m"]:
    """Gauss–Radau values of zᵀ f(A) z with a node at `node` (at or below the spectrum; less rounding). O(m·k²).

    Raises:
        NotPositiveDefiniteError: A Ritz value lies below the node.
    """
    radau = rules(tri, node).radau
    assert radau is not None
    return radau.apply(f)


def bracket(r: Rules, f: SpectralFunction) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Lower and upper bounds of zᵀ f(A) z, one pair per run.

    Args:
        r: Rules of the runs; without a Radau rule, or for an f whose derivative signs are not known, the Gauss value ±
            twice ‖z‖² times the best polynomial approximation of f on [bottom, top] (`chebyshev_error`) is taken, where
            [bottom, top] leans on the extreme Ritz values and their residuals.
        f: The function.

    Returns:
        `(low, high)`; on exact runs both are the Gauss value, up to rounding.
    """
    if f.gauss is None or r.radau is None or r.node is None:
        value = r.gauss.apply(f)
        mass = r.gauss.weights.sum(1)
        error = 2 * mass * chebyshev_error(f, float(r.bottom.min()), float(r.top.max()), 2 * r.depth - 1)
        error = torch.where(r.exact, torch.zeros_like(error), error) + rounding_share(r, f) / 2
        return value - error, value + error
    ends = [rule.apply(f, move, floor) for rule, move, floor in _sides(r, f)]
    return torch.minimum(*ends), torch.maximum(*ends)


def _sides(r: Rules, f: SpectralFunction) -> list[tuple[Rule, Tensor, Tensor]]:
    """Rule, move of its nodes and floor below which they do not go, for the lower and the upper bound."""
    assert r.radau is not None
    assert r.node is not None
    # The rule is that of A + E, whose spectrum starts at the node; A's own f is taken η below it.
    floor, sides = r.node - r.rounding, []
    for side in ("lower", "upper"):
        downwards = (side == "lower") == bool(f.increasing)
        sides.append((r.gauss if f.gauss == side else r.radau, -r.rounding if downwards else r.rounding, floor))
    return sides


def rounding_share(r: Rules, f: SpectralFunction) -> Float[Tensor, " m"]:
    """Part of each bracket's width that rounding alone accounts for: no further step takes it away."""
    if f.gauss is None or r.radau is None or r.node is None:
        return (r.gauss.apply(f, r.rounding, r.bottom) - r.gauss.apply(f, -r.rounding, r.bottom)).abs()
    shares = [(rule.apply(f, move, floor) - rule.apply(f)).abs() for rule, move, floor in _sides(r, f)]
    return shares[0] + shares[1]


def chebyshev_error(f: Callable[[Tensor], Tensor], low: float, high: float, degrees: Tensor) -> Tensor:
    """Upper bound of min over polynomials p of the given degrees of max |f − p| on [low, high].

    The tail of the Chebyshev coefficients of f, interpolated in 4,097 points; infinite where f is not finite in them.
    """
    count = 4096
    centre, radius = (high + low) / 2, max((high - low) / 2, 0.0)
    if radius == 0:
        return torch.zeros(degrees.shape, dtype=torch.float64, device="cpu")
    nodes = centre + radius * torch.cos(torch.pi * torch.arange(count + 1, dtype=torch.float64, device="cpu") / count)
    values = f(nodes)
    if not bool(torch.isfinite(values).all()):
        return torch.full(degrees.shape, math.inf, dtype=torch.float64, device="cpu")
    coefficients = torch.fft.rfft(torch.cat([values, values[1:-1].flip(0)])).real.abs() / count
    coefficients[0] /= 2
    coefficients[-1] /= 2
    # Below rounding of f the coefficients are noise, and summing 4,096 of them would read as an error.
    coefficients[coefficients < 4 * torch.finfo(torch.float64).eps * coefficients.max()] = 0
    tails = torch.cat([coefficients.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64, device="cpu")])
    return tails[(degrees + 1).clamp(0, count + 1)]
