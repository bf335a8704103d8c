"""Lanczos quadrature of numbered probes, grown in number and in depth until its half-width meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from curvops.linalg import quadrature
from curvops.linalg.lanczos import Tridiagonal, extend, lanczos
from curvops.linalg.probes import rademacher
from curvops.linalg.quadrature import Rules, SpectralFunction
from curvops.typing import Matmat

FIRST_PROBES = 10
FIRST_STEPS = 20
_SLAB_BYTES = 1 << 27
_INSIDE = 0.2
"""The bracket is inside the Monte-Carlo error when half of it is below this part of that error."""


def together(size: int, steps: int, dtype: torch.dtype) -> int:
    """Probes whose runs of so many steps share their products: ten, and more while a moderate basis holds them."""
    return max(FIRST_PROBES, int(_SLAB_BYTES / (size * steps * dtype.itemsize)))


def student(m: int) -> float:
    """t₀.₉₇₅(m − 1); infinite for a single probe, which says nothing of its own spread."""
    return float(stats.t.ppf(0.975, m - 1)) if m > 1 else math.inf


class Interval(NamedTuple):
    """value ± half_width, of which `noise` = t·stderr is Monte-Carlo error and `bracket` = ½(high − low) "
    "quadrature's."""

    value: float
    stderr: float
    low: float
    high: float
    noise: float
    bracket: float

    @property
    def half_width(self) -> float:
        """t₀.₉₇₅(m − 1)·stderr + ½(high − low)."""
        return self.noise + self.bracket


def sample_variance(variance: Tensor, mean: Tensor, energy: Tensor, count: int, size: int | Tensor) -> Tensor:
    """Variance of one zᵀBz, from the sample's own and from B's energy.

    A few probes of a matrix that one direction dominates draw from something like χ²₁: their variance is mostly too
    small, and most so when their mean is. var zᵀBz ≤ 2‖B‖²_F − 2(tr B)²/P up to the spread of the diagonal, and ‖B‖²_F
    is the mean of ‖Bz‖², which the same products give with far less scatter. It is believed above the sample's
    variance, up to a factor 1 + 30/m: so a matrix near its diagonal, which Rademacher probes see without noise, keeps
    that gift.

    Args:
        variance: Variance over the sample.
        mean: Mean of zᵀBz.
        energy: Mean of ‖Bz‖².
        count: m.
        size: P, or the length of the block.
    """
    bound = 2 * (energy - mean.square() / size)
    return torch.minimum(torch.maximum(bound, variance), variance * (1 + 30 / count))


def interval(
    low: Tensor, high: Tensor, offset: float = 0.0, slack: float = 0.0, *, energy: Tensor | None = None, size: int = 1
) -> Interval:
    """Interval of the mean of m bracketed values, moved by `offset ± slack`; `energy (m,)` as in `sample_variance`."""
    bottom, top = float(low.mean()) + offset - slack, float(high.mean()) + offset + slack
    m = len(low)
    middle, stderr = (low + high) / 2, math.inf
    if m > 1:
        variance = middle.var()
        if energy is not None:
            variance = sample_variance(variance, middle.mean(), energy.mean(), m, size)
        stderr = math.sqrt(float(variance) / m)
    noise = student(m) * stderr if stderr > 0 else 0.0
    return Interval((bottom + top) / 2, stderr, bottom, top, noise, (top - bottom) / 2)


@dataclass(frozen=True)
class Limits:
    """What may grow, and how far: None for `probes` or `steps` lets it grow from its first value."""

    probes: int | None = None
    steps: int | None = None
    max_probes: int = 2560
    max_steps: int = 1000
    first_steps: int = FIRST_STEPS


class Run:
    """Lanczos runs of probes 0, 1, …; a basis is kept only while its run may still be extended and memory allows it.

    A run whose basis had to go starts again from its probe when it must go deeper: the same numbers, more products.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        size: P.
        f: The function whose quadratic forms are bracketed.
        lower_bound: Proven lower bound of the spectrum, or None.
        seed: Seed of the probes.
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.
        memory: Bytes that bases may take side by side, but for the one at work if it alone takes more; None: no limit.
        progress: Show progress bars.
    """

    def __init__(
        self,
        matmat: Matmat,
        size: int,
        f: SpectralFunction,
        lower_bound: float | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: int | None = None,
        progress: bool,
    ) -> None:
        self.matmat, self.size, self.f, self.lower_bound = matmat, size, f, lower_bound
        self.seed, self.dtype, self.device, self.progress = seed, dtype, device, progress
        self.memory = math.inf if memory is None else memory
        self.groups: list[Tridiagonal] = []
        self.rules: list[Rules] = []
        self.matvecs = self.probes = self.steps = 0
        self.complete = False

    def _fresh(self, start: int, count: int, keep: bool) -> Tridiagonal:
        if self.complete:
            z = torch.zeros(self.size, count, dtype=self.dtype, device=self.device)
            z[torch.arange(start, start + count, device="cpu"), torch.arange(count, device="cpu")] = math.sqrt(
                self.size
            )
        else:
            z = rademacher(self.size, start, count, seed=self.seed, dtype=self.dtype, device=self.device)
        tri = lanczos(self.matmat, z, self.steps, basis=keep, progress=self.progress)
        self.matvecs += tri.matvecs
        return tri

    def add_probes(self, count: int, steps: int, keep: bool) -> None:
        """Run `count` further probes; slabs of them share their products, as many as a moderate basis allows."""
        self.steps = max(self.steps, min(steps, self.size))
        width = together(self.size, self.steps, self.dtype)
        if keep:  # as many as could go all the way down
            deepest = self._bytes(1, min(self.size, Limits.max_steps))
            width = int(min(width, max(FIRST_PROBES, self.memory // deepest)))
        end = self.probes + count
        while self.probes < end:
            number = min(width, end - self.probes)
            self._make_room(len(self.groups), number)
            self.groups.append(self._fresh(self.probes, number, keep))
            self.rules.append(quadrature.rules(self.groups[-1], self.lower_bound))
            self.probes += number

    def take_unit_vectors(self) -> None:
        """Start again from all P unit vectors times √P: their mean is the trace itself, no Monte-Carlo error is "
        "left."""
        steps, self.groups, self.rules, self.probes, self.complete = self.steps, [], [], 0, True
        self.add_probes(self.size, steps, keep=False)

    def deepen(self, steps: int) -> None:
        """Bring every run to `steps`; runs whose basis is gone start again (same probes)."""
        self.steps, start = min(steps, self.size), 0
        for i in range(len(self.groups)):
            tri = self.groups[i]
            count = len(tri.norms)
            self._make_room(i, count)
            if tri.current is not None:
                self.groups[i] = extend(self.matmat, tri, max(1, self.steps - tri.steps), progress=self.progress)
                self.matvecs += self.groups[i].matvecs - tri.matvecs
            elif not bool(tri.exact.all()):
                self.groups[i] = self._fresh(start, count, True)
            self.rules[i] = quadrature.rules(self.groups[i], self.lower_bound)
            start += count

    def _bytes(self, count: int, steps: int) -> int:
        return self.size * count * steps * self.dtype.itemsize

    def _make_room(self, index: int, count: int) -> None:
        """Let other groups' bases go until `count` probes of group `index` have room at the present depth.

        Those that have been at work go first, the latest before the earlier: they are needed again only if all go
        deeper still, and then the earlier ones come first.
        """
        held = {i: self._bytes(len(t.norms), t.steps) for i, t in enumerate(self.groups) if t.current is not None}
        held[index] = self._bytes(count, self.steps)
        for other in (*range(index - 1, -1, -1), *range(len(self.groups) - 1, index, -1)):
            if sum(held.values()) <= self.memory:
                return
            if other in held:
                del held[other]
                self.groups[other] = self.groups[other].without_basis()

    def drop_bases(self) -> None:
        """Release the memory of the Lanczos vectors."""
        self.groups = [tri.without_basis() for tri in self.groups]

    @property
    def exhausted(self) -> bool:
        """Every run is exact: more steps change nothing."""
        return all(bool(tri.exact.all()) for tri in self.groups)

    @property
    def rounding(self) -> float:
        """Largest η of the runs: absolute error of the products, in the unit of the matrix."""
        return max(float(r.rounding.max()) for r in self.rules)

    def rounding_bracket(self) -> float:
        """Half the mean bracket that rounding alone explains."""
        return float(torch.cat([quadrature.rounding_share(r, self.f) for r in self.rules]).mean()) / 2

    def energies(self) -> Tensor:
        """`(m,)` ‖f(A)z‖², by the Gauss rule."""
        return torch.cat([r.gauss.apply(lambda x: self.f(x).square()) for r in self.rules])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """`(m,)` lower and upper bounds of zᵀ f(A) z."""
        pairs = [quadrature.bracket(r, self.f) for r in self.rules]
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def grow(
    run: Run,
    target: Callable[[float], float],
    limits: Limits,
    *,
    offset: float = 0.0,
    slack: float = 0.0,
    pause: Callable[[Run, float], bool] = lambda run, goal: False,
) -> tuple[Interval, str]:
    """Grow depth and probes until the half-width meets the target.

    Depth comes first, while the probes are few: until the bracket is inside the error that more probes must remove.
    Once doubling the probes would reach P, the P unit vectors take their place.

    Args:
        run: The runs; begun here if empty.
        target: Half-width wanted, given the value; infinite for none.
        limits: What may grow.
        offset: Known part of the value.
        slack: Rounding of that part.
        pause: Asked while the target is not met; True ends the growth for a better road.

    Returns:
        `(interval, limit)`: "" when the target was met, "paused", or what stopped the growth.
    """
    max_steps = min(limits.max_steps, run.size)
    if not run.groups:
        first = limits.steps or min(limits.first_steps, max_steps)
        run.add_probes(limits.probes or FIRST_PROBES, first, keep=limits.steps is None)
    while True:
        found = interval(*run.bounds(), offset, slack, energy=run.energies(), size=run.size)
        if run.complete:
            found = found._replace(stderr=0.0, noise=0.0)
        goal = target(found.value)
        if found.half_width <= goal:
            return found, ""
        if pause(run, goal):
            return found, "paused"
        rounded = run.exhausted or found.bracket <= 1.2 * (run.rounding_bracket() + slack)
        deepest = limits.steps is not None or run.steps >= max_steps or rounded
        ceiling = _INSIDE * max(found.noise, goal)
        if not deepest and not found.bracket <= ceiling:
            run.deepen(min(max_steps, max(run.steps + 4, int(1.5 * run.steps))))
            continue
        if deepest and not found.bracket < goal:
            why = "rounding of the products" if rounded else f"{run.steps} Lanczos steps"
            return found, f"{why} left a bracket of ±{found.bracket:.3g}"
        if limits.probes is not None or run.probes >= limits.max_probes:
            return found, f"only {run.probes} probes were allowed"
        if 2 * run.probes >= run.size and run.size <= limits.max_probes and not run.complete:
            run.take_unit_vectors()
            continue
        settled = deepest or found.bracket <= _INSIDE * goal
        if settled:
            run.drop_bases()
        run.add_probes(min(run.probes, limits.max_probes - run.probes), run.steps, keep=not settled)
