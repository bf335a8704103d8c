"""One Lanczos run, every question about the spectrum: log-determinants at any shift, degrees of freedom, densities, "
"counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.errors import DataError, NotPositiveDefiniteError, ShapeError
from curvops.linalg import evidence, quadrature
from curvops.linalg.growth import sample_variance, student
from curvops.linalg.lanczos import lanczos
from curvops.linalg.probes import derive_seed, rademacher, resolve_seed
from curvops.linalg.quadrature import Rule, Rules, SpectralFunction
from curvops.linalg.results import EstimateReport
from curvops.typing import Matmat

_PROBE_STREAM = 2


@dataclass(frozen=True)
class Spectrum:
    """Quadrature of the spectral density of a symmetric P x P matrix H, from m probes.

    Every method answers from what is stored, without a further product. A half-width is t₀.₉₇₅(m − 1) standard errors
    plus half the quadrature's bracket; where the bracket dominates, more steps are needed, otherwise more probes.

    Attributes:
        rules: Gauss and (with a lower bound) Gauss–Radau rules per probe.
        size: P.
        lower_bound: Proven lower bound of the spectrum of H, or None.
        matvecs: Products spent.
        steps: Lanczos steps per probe.
        seed: Seed of the probes; None where a generator was given.
        seconds: Time spent.
        zeros: Eigenvalues known to be 0 and left out of the rules: P − n where they are of a Gram matrix n x n.
        is_exact: Whether the nodes are the eigenvalues themselves, so that nothing is estimated.
    """

    rules: Rules
    size: int
    lower_bound: float | None
    matvecs: int
    steps: int
    seed: int | None = None
    seconds: float = 0.0
    zeros: int = 0
    is_exact: bool = False

    @property
    def nodes(self) -> Float[Tensor, "m k"]:
        """`(m, k)` Ritz values of each probe, ascending; with one at 0 for the known zeros."""
        return self._atoms()[0]

    @property
    def weights(self) -> Float[Tensor, "m k"]:
        """`(m, k)` weights; each row sums to P."""
        return self._atoms()[1]

    @property
    def probes(self) -> int:
        """m."""
        return self.rules.gauss.nodes.shape[0]

    def logdet(self, delta: float = 0.0) -> EstimateReport:
        """log det(H + δI), nats.

        Args:
            delta: δ; H + δI must be positive definite by the lower bound.

        Raises:
            NotPositiveDefiniteError: The lower bound does not make it so, or rounding of the products swallows it.
        """
        shift = self._definite_shift(delta, "logdet")
        return self._trace(quadrature.log(shift), f"log det(H + {shift:g} I)")

    def effective_dimension(self, delta: float) -> EstimateReport:
        """tr H(H + δI)⁻¹, the effective number of parameters (MacKay 1992), of a positive semidefinite H.

        Raises:
            NotPositiveDefiniteError: H is not known to be positive semidefinite, or δ is not positive.
        """
        if self.lower_bound is not None and self.lower_bound < 0:
            raise NotPositiveDefiniteError(
                f"effective_dimension needs a positive semidefinite H, its lower bound is {self.lower_bound:.3g}."
            )
        shift = self._definite_shift(delta, "effective_dimension")
        return self._trace(quadrature.shrinkage(shift), f"tr H(H + {shift:g} I)⁻¹")

    def trace_of(self, f: SpectralFunction | Callable[[Tensor], Tensor]) -> EstimateReport:
        """tr f(H).

        Args:
            f: A `SpectralFunction`, whose derivative signs certify the bracket, or any elementwise callable on float64
                eigenvalues, bracketed by how well polynomials approximate it between the extreme Ritz values.
        """
        known = f if isinstance(f, SpectralFunction) else SpectralFunction(getattr(f, "__name__", "f"), f)
        return self._trace(known, f"tr {known.name}(H)")

    def count(self, interval: tuple[float, float]) -> EstimateReport:
        """Number of eigenvalues in [low, high] (either end may be infinite).

        The bracket is that of Chebyshev, Markov and Stieltjes: between two Ritz values the distribution function lies
        within the weights on either side (Golub and Meurant 2010, section 2).
        """
        low, high = interval
        if not low <= high:
            raise ValueError(f"count expects an interval with low <= high, got [{low}, {high}].")
        below = self._distribution(torch.tensor([low], dtype=torch.float64, device="cpu"))
        above = self._distribution(torch.tensor([high], dtype=torch.float64, device="cpu"))
        least = (above[0] - below[1]).clamp(min=0)[:, 0]
        most = (above[1] - below[0]).clamp(min=0)[:, 0]
        # An indicator is its own square.
        energy, known = (least + most) / 2, self.zeros * float(low <= 0 <= high)
        return self._report(
            least + known, most + known, f"eigenvalues in [{low:g}, {high:g}]", energy=energy, known=known
        )

    def density(
        self, grid: Float[Tensor, " g"] | Sequence[float], log: bool = False, width: float | None = None
    ) -> EstimateReport:
        """Density of the eigenvalues, smoothed by a Gaussian, on a grid; it integrates to P.

        Args:
            grid: Eigenvalues at which to show it; with `log=True` they are positive and the density is per unit of
                log₁₀ λ (eigenvalues ≤ 0 do not show).
            log: Smooth and measure on a log₁₀ scale.
            width: Standard deviation of the Gaussian, in units of the axis; default: 1/50 of the grid's range, or three
                mean distances of Ritz values if that is more.

        Returns:
            Report whose `value`, `stderr`, `bracket` and `half_width` are `(g,)` tensors. The bracket bounds the
            quadrature error by the distribution function's own bounds, which is safe and wide; `stderr` is the
            probes' alone.
        """
        points = torch.as_tensor(grid, dtype=torch.float64, device="cpu").flatten()
        if points.numel() < 1 or not bool(torch.isfinite(points).all()) or (log and not bool((points > 0).all())):
            raise DataError("density expects a grid of finite values, and of positive ones with log=True.")
        axis: Callable[[Tensor], Tensor] = (lambda x: torch.log10(x.clamp(min=1e-300))) if log else (lambda x: x)
        centres = axis(points)
        if width is None:
            spread = float(centres.max() - centres.min()) or 1.0
            inside = axis(self.rules.gauss.nodes)
            inside = inside.clamp(float(centres.min()), float(centres.max()))
            width = max(spread / 50, 3 * float((inside[:, -1] - inside[:, 0]).mean()) / inside.shape[1])
        if not width > 0:
            raise ValueError(f"density expects width > 0, got {width}.")
        normal = torch.distributions.Normal(0.0, 1.0)

        def kernel(x: Tensor) -> Tensor:
            """`(m, g, k)` values of the Gaussian about every grid point."""
            return torch.exp(normal.log_prob((axis(x)[:, None, :] - centres[None, :, None]) / width)) / width

        nodes, weights = self.rules.gauss.nodes, self.rules.gauss.weights
        value = (kernel(nodes) * weights[:, None, :]).sum(2)
        # ∫K dμ = −∫K′F: where K rises a larger F takes away, where it falls a larger F adds.
        # Between two nodes F is off by no more than the larger of their weights.
        pad = torch.nn.functional.pad
        bounds = pad(pad(nodes, (1, 0), value=-math.inf), (0, 1), value=math.inf)
        at = pad(kernel(nodes), (1, 1))
        turn = torch.minimum(bounds[:, None, 1:], torch.maximum(bounds[:, None, :-1], points[None, :, None]))
        peak = torch.exp(normal.log_prob((axis(turn) - centres[None, :, None]) / width)) / width
        variation = (peak - at[:, :, :-1]).abs() + (peak - at[:, :, 1:]).abs()
        heavy = torch.maximum(pad(weights, (1, 0)), pad(weights, (0, 1)))
        error = (variation * heavy[:, None, :]).sum(2)
        error[self.rules.exact] = 0
        value = value + self.zeros * kernel(nodes.new_zeros(1, 1))[..., 0]
        report = self._report((value - error).clamp(min=0), value + error, "spectral density", centre=value)
        return replace(report, reason=f"{report.reason} Gaussian of width {width:.3g}.")

    def evidence_curve(
        self,
        loss: float | Tensor,
        mean: Tensor,
        deltas: Sequence[float] | Tensor,
        prior_mean: float | Tensor = 0.0,
    ) -> EstimateReport:
        """Laplace log evidence at many prior precisions, from the same probes.

        −loss − ½δ‖μ − μ₀‖² + ½P log δ − ½ log det(H + δI), without the likelihood's constants.

        Args:
            loss: Σ −log p(y | f) at `mean`, without constants.
            mean: μ `(P,)`, the parameters.
            deltas: `(d,)` positive prior precisions.
            prior_mean: μ₀.

        Returns:
            Report whose `value`, `stderr`, `bracket` and `half_width` are `(d,)` tensors, nats.
        """
        return evidence.curve(self, loss, mean, deltas, prior_mean)

    def optimal_prior_precision(
        self,
        loss: float | Tensor,
        mean: Tensor,
        prior_mean: float | Tensor = 0.0,
        bounds: tuple[float, float] = (1e-6, 1e6),
    ) -> EstimateReport:
        """Prior precision that maximises the evidence, with its jackknife error; arguments as in `evidence_curve`."""
        return evidence.optimum(self, loss, mean, prior_mean, bounds)

    def logdet_bounds(self, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """`(m, d)` lower and upper bounds of each probe's value of log det(H + δI)."""
        shifts = [self._definite_shift(float(d), "logdet") for d in deltas]
        pairs = [quadrature.bracket(self.rules, quadrature.log(shift)) for shift in shifts]
        zeros = [self._at_zeros(quadrature.log(shift)) for shift in shifts]
        known = torch.tensor(zeros, dtype=torch.float64, device="cpu")
        return torch.stack([p[0] for p in pairs], dim=1) + known, torch.stack([p[1] for p in pairs], dim=1) + known

    def _atoms(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights, the known zeros among them."""
        nodes, weights = self.rules.gauss.nodes, self.rules.gauss.weights
        if not self.zeros:
            return nodes, weights
        nodes, order = torch.nn.functional.pad(nodes, (1, 0)).sort(1)
        return nodes, torch.nn.functional.pad(weights, (1, 0), value=float(self.zeros)).gather(1, order)

    def _at_zeros(self, f: Callable[[Tensor], Tensor]) -> float:
        """The known zeros' part of tr f(H)."""
        return self.zeros * float(f(torch.zeros(1, dtype=torch.float64, device="cpu"))) if self.zeros else 0.0

    def _distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(m, x)` bounds of each probe's μ((−∞, x]) without the known zeros, up to rounding at the nodes."""
        sums = self.rules.gauss.weights.cumsum(1)
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)
        eta = self.rules.rounding[:, None]
        nodes = self.rules.gauss.nodes.contiguous()
        # Nodes surely at or below x count in full, save the last of them; the next one above may count too.
        surely = torch.searchsorted(nodes, (x[None, :] - eta).contiguous(), right=True)
        maybe = torch.searchsorted(nodes, (x[None, :] + eta).contiguous(), right=True)
        exact = self.rules.exact[:, None]
        low = torch.where(exact, surely, (surely - 1).clamp(min=0))
        high = torch.where(exact, maybe, (maybe + 1).clamp(max=nodes.shape[1]))
        least, most = sums.gather(1, low), sums.gather(1, high)
        # No mass below a proven bound, all of it below infinity.
        if self.lower_bound is not None:
            most = torch.where(x[None, :] < self.lower_bound, torch.zeros_like(most), most)
        least = torch.where(torch.isposinf(x)[None, :], sums[:, -1:], least)
        return least, most

    def _definite_shift(self, delta: float, verb: str) -> float:
        if isinstance(delta, torch.Tensor) and delta.numel() != 1:
            raise ShapeError(
                f"{verb}: δ has shape {tuple(delta.shape)}, expected one number; ask for each, at no product."
            )
        delta = float(delta)
        if self.lower_bound is None:
            raise NotPositiveDefiniteError(
                f"{verb} needs a proven lower bound of the spectrum of H, and none is known; take a curvature that is "
                "positive semidefinite (GGN, Fisher), or say what is known when H is built (is_psd, lower_bound)."
            )
        if not (math.isfinite(delta) and self.lower_bound + delta > 0):
            raise NotPositiveDefiniteError(
                f"{verb} needs lower_bound + δ > 0, got {self.lower_bound:.3g} + {delta:.3g}; take a larger δ."
            )
        eta = float(self.rules.rounding.max())
        if self.lower_bound + delta <= 4 * eta:
            raise NotPositiveDefiniteError(
                f"δ = {delta:.3g} underflows: the products behind this spectrum carry an absolute error of {eta:.1e}. "
                "Take a larger δ, or multiply in float64."
            )
        return delta

    def _trace(self, f: SpectralFunction, what: str) -> EstimateReport:
        low, high = quadrature.bracket(self.rules, f)
        energy, known = self.rules.gauss.apply(lambda x: f(x).square()), self._at_zeros(f)
        return self._report(low + known, high + known, what, energy=energy, known=known)

    def _report(
        self,
        low: Tensor,
        high: Tensor,
        what: str,
        *,
        centre: Tensor | None = None,
        energy: Tensor | None = None,
        known: Tensor | float = 0.0,
    ) -> EstimateReport:
        """Report of the mean over probes (dimension 0) of bracketed values.

        Args:
            low: `(m, …)` lower bounds.
            high: `(m, …)` upper bounds.
            what: What is estimated, for the reason.
            centre: `(m, …)` best values; default the middles.
            energy: `(m, …)` ‖f(H)z‖² of the random part (`growth.sample_variance`).
            known: What is not random in the values.
        """
        m = self.probes
        middle = (low + high) / 2 if centre is None else centre
        value, bottom, top = middle.mean(0), low.mean(0), high.mean(0)
        stderr = torch.full_like(value, 0.0 if self.is_exact else math.inf)
        if m > 1:
            variance = middle.var(0)
            if energy is not None:
                variance = sample_variance(variance, value - known, energy.mean(0), m, self.size - self.zeros)
            stderr = (variance / m).sqrt()
        noise = torch.where(stderr > 0, student(m) * stderr, torch.zeros_like(stderr))
        bracket = torch.maximum(top - value, value - bottom)
        part = "Monte-Carlo error" if float(noise.max()) > float(bracket.max()) else "Quadrature bracket"

        def plain(x: Tensor) -> Any:
            return float(x) if x.ndim == 0 else x

        source = f"{m} probes of {self.steps} steps ({self.matvecs} products in all). {part} dominates."
        if self.is_exact:
            source = f"{self.size - self.zeros:,} eigenvalues{f' and {self.zeros:,} zeros' if self.zeros else ''}."
        return EstimateReport(
            algorithm="eigenvalues" if self.is_exact else "Lanczos quadrature of the spectrum",
            matvecs=0,
            reason=f"{what} from {source}",
            value=plain(value),
            stderr=plain(stderr),
            bracket=(plain(bottom), plain(top)),
            half_width=plain(noise + bracket),
            probes=0 if self.is_exact else m,
            steps=self.steps,
            seed=self.seed,
        )


def spectrum(
    matmat: Matmat,
    size: int,
    *,
    probes: int = 10,
    steps: int = 64,
    lower_bound: float | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = False,
    zeros: int = 0,
) -> Spectrum:
    """Run Lanczos from `probes` Rademacher vectors and keep its quadrature rules.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        size: P.
        probes: m.
        steps: k, capped at P.
        lower_bound: Proven lower bound of the spectrum; None leaves logdet and effective_dimension out.
        seed: Seed of the probes.
        generator: Takes the place of `seed` (one draw).
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.
        progress: Show a progress bar.
        zeros: Eigenvalues 0 that the matrix of the spectrum has besides this one's.

    Raises:
        ShapeError: `probes` or `steps` < 1.
        NotPositiveDefiniteError: A Ritz value disproves `lower_bound`.

    Cost: m·k products; P·m·k numbers of memory during the run, m·k afterwards.
    """
    began = time.perf_counter()
    if probes < 1 or steps < 1:
        raise ShapeError(f"spectrum expects probes >= 1 and steps >= 1, got probes={probes}, steps={steps}.")
    drawn, shown = (seed, seed) if generator is None else (resolve_seed(generator), None)
    stream = derive_seed(drawn, _PROBE_STREAM)
    tri = lanczos(
        matmat,
        rademacher(size, 0, probes, seed=stream, dtype=dtype, device=device),
        steps,
        basis=False,
        progress=progress,
    )
    found = quadrature.rules(tri, lower_bound)
    seconds = time.perf_counter() - began
    return Spectrum(found, size + zeros, lower_bound, tri.matvecs, tri.steps, shown, seconds, zeros)


def exact_spectrum(values: Tensor, *, lower_bound: float | None, zeros: int = 0, matvecs: int = 0) -> Spectrum:
    """The spectrum from all eigenvalues, up to their rounding.

    Args:
        values: `(n,)` eigenvalues, of a backward stable factorisation.
        lower_bound: Proven lower bound; None to take the smallest eigenvalue less rounding.
        zeros: Further eigenvalues 0.
        matvecs: Products that were spent on the matrix.
    """
    unit = torch.finfo(values.dtype).eps
    nodes = values.detach().to("cpu", torch.float64).sort().values[None]
    rounding = (unit * math.sqrt(nodes.shape[1]) * nodes.abs().amax(1)).clamp(min=torch.finfo(torch.float64).tiny)
    bound = float(nodes.min() - rounding) if lower_bound is None else lower_bound
    depth = torch.tensor([nodes.shape[1]], device="cpu")
    found = Rules(
        Rule(nodes, torch.ones_like(nodes)), None, None, rounding, depth, depth > 0, nodes[:, -1],
        torch.full((1,), bound, dtype=torch.float64, device="cpu"),
    )  # fmt: skip
    return Spectrum(found, nodes.shape[1] + zeros, bound, matvecs, nodes.shape[1], zeros=zeros, is_exact=True)
