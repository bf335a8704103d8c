"""Stochastic Lanczos quadrature: log det A and tr f(A) from products, with an interval that counts both its errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError
from curvops.linalg import quadrature
from curvops.linalg.growth import FIRST_PROBES, Interval, Limits, Run, grow
from curvops.linalg.probes import derive_seed, resolve_seed
from curvops.linalg.quadrature import SpectralFunction
from curvops.linalg.results import EstimateReport
from curvops.linalg.split import SKETCH_VECTORS, choose_rank, split
from curvops.typing import Matmat

_PROBE_STREAM = 2


def _goal(
    probes: int | None, steps: int | None, rtol: float | None, atol: float | None, default: tuple[float, float]
) -> Callable[[float], float]:
    """Half-width wanted of a value; checks the tolerances."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{name} must be >= 0, got {tolerance}.")
    if (rtol is not None or atol is not None) and not (rtol or atol):
        raise ValueError("Random probes cannot meet a target of zero; give rtol > 0 or atol > 0.")
    if rtol is None and atol is None:
        if probes is not None and steps is not None:
            return lambda value: math.inf
        rtol, atol = default
    return lambda value: max(atol or 0.0, (rtol or 0.0) * abs(value))


def _limits(size: int, probes: int | None, steps: int | None, max_probes: int, max_steps: int) -> Limits:
    given = {"size": size, "probes": probes, "steps": steps, "max_probes": max_probes, "max_steps": max_steps}
    bad = {name: number for name, number in given.items() if number is not None and number < 1}
    if bad:
        raise ShapeError(f"Quadrature expects numbers >= 1, got {', '.join(f'{k}={v}' for k, v in bad.items())}.")
    return Limits(probes, steps, max(max_probes, probes or 0), max_steps)


def _report(
    algorithm: str, found: Interval, limit: str, run: Run, matvecs: int, seed: int | None, began: float
) -> tuple[float, EstimateReport]:
    kind = "unit vectors" if run.complete else "probes"
    part = "Monte-Carlo error" if found.noise > found.bracket else "Quadrature bracket"
    reason = (
        f"{part} dominates: ±{found.noise:.3g} from {run.probes} {kind}, ±{found.bracket:.3g} from {run.steps} steps, "
        f"{matvecs} products in all."
    )
    return found.value, EstimateReport(
        algorithm=algorithm,
        matvecs=matvecs,
        seconds=time.perf_counter() - began,
        reason=f"{reason} Target not met: {limit}." if limit else reason,
        converged=not limit,
        value=found.value,
        stderr=found.stderr,
        bracket=(found.low, found.high),
        half_width=found.half_width,
        probes=run.probes,
        steps=run.steps,
        seed=seed,
    )


def slq_trace(
    matmat: Matmat,
    size: int,
    f: SpectralFunction | Callable[[Tensor], Tensor],
    *,
    lower_bound: float | None = None,
    probes: int | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    max_probes: int = 2560,
    max_steps: int = 1000,
    memory: int | None = None,
    progress: bool = False,
) -> tuple[float, EstimateReport]:
    """tr f(A) of a symmetric matrix, by Rademacher probes and Lanczos quadrature.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric.
        size: P.
        f: A `SpectralFunction` (whose derivative signs give a certified bracket) or any callable on float64 eigenvalues
            (bracketed by how well polynomials approximate it between the extreme Ritz values).
        lower_bound: Proven lower bound of the spectrum, for the Gauss–Radau end of the bracket.
        probes: Exactly this many; None grows them from 10 by doubling.
        steps: Exactly this many; None grows them until the bracket is inside the Monte-Carlo error.
        rtol: Relative half-width wanted; without any target the default is 0.01, or none when probes and steps are
            given.
        atol: Absolute half-width wanted, in the trace's unit; the looser of the two counts.
        seed: Seed of the probes.
        generator: Takes the place of `seed` (one draw).
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.
        max_probes: Bound on growth.
        max_steps: Bound on growth.
        memory: Bytes that Lanczos bases may take side by side, and a sketch; runs whose basis does not fit are repeated
            when they must go deeper. None: no limit.
        progress: Show progress bars.

    Returns:
        `(value, report)`; `report.converged` is False when the target was not met within the bounds.

    Raises:
        NotPositiveDefiniteError: A Ritz value disproves `lower_bound`.
        DataError: A product is not finite, or the matrix is not symmetric.

    Cost: probes x steps products; memory for 10 x steps vectors (more only while they are short).
    Source: Ubaru, Chen, Saad 2017; bracket: Golub and Meurant 2010, chapter 6.
    """
    began = time.perf_counter()
    limits = _limits(size, probes, steps, max_probes, max_steps)
    goal = _goal(probes, steps, rtol, atol, (0.01, 0.0))
    known = f if isinstance(f, SpectralFunction) else SpectralFunction(getattr(f, "__name__", "f"), f)
    drawn, shown = (seed, seed) if generator is None else (resolve_seed(generator), None)
    stream = derive_seed(drawn, _PROBE_STREAM)
    run = Run(
        matmat, size, known, lower_bound, seed=stream, dtype=dtype, device=device, memory=memory, progress=progress
    )
    with torch.no_grad():
        found, limit = grow(run, goal, limits)
    return _report(f"SLQ of {known.name}", found, limit, run, run.matvecs, shown, began)


def slq_logdet(
    matmat: Matmat,
    size: int,
    *,
    lower_bound: float,
    probes: int | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    max_probes: int = 2560,
    max_steps: int = 1000,
    memory: int | None = None,
    reduce_variance: bool = True,
    progress: bool = False,
) -> tuple[float, EstimateReport]:
    """log det A of a positive definite matrix, in nats, to a half-width of max(0.5, 1 %) unless told otherwise.

    10 probes of 20 steps come first. Where they do not do, a cost model on their quadrature decides between more of the
    same and a Nyström split (`curvops.linalg.split`), whose sketch is paid back by fewer probes and steps.

    Args:
        matmat: `(P, K) → (P, K)`, symmetric, A ≽ lower_bound·I.
        size: P.
        lower_bound: Proven lower bound of the spectrum, > 0.
        probes: As in `slq_trace`; given (or `steps` given), no split is tried.
        steps: As in `slq_trace`.
        rtol: Relative half-width wanted; default 0.01, or none when probes and steps are given.
        atol: Absolute half-width wanted, nats; default 0.5 when rtol is not given either.
        seed: Seed of probes and sketch.
        generator: Takes the place of `seed` (one draw).
        dtype: Type in which the matrix multiplies.
        device: Device on which the matrix multiplies.
        max_probes: Bound on growth.
        max_steps: Bound on growth.
        memory: Bytes that Lanczos bases may take side by side, and a sketch; runs whose basis does not fit are repeated
            when they must go deeper. None: no limit.
        reduce_variance: Allow the split.
        progress: Show progress bars.

    Returns:
        `(value, report)`; `report.converged` is False when the target was not met within the bounds.

    Raises:
        NotPositiveDefiniteError: `lower_bound` is not positive, is lost in the rounding of the products, or was
            disproved.
        DataError: A product is not finite, or the matrix is not symmetric.

    Cost: as `slq_trace`, plus rank products, P·rank numbers and O(P·rank²) for a split.
    """
    began = time.perf_counter()
    limits = _limits(size, probes, steps, max_probes, max_steps)
    goal = _goal(probes, steps, rtol, atol, (0.01, 0.5))
    if not (lower_bound > 0 and math.isfinite(lower_bound)):
        raise NotPositiveDefiniteError(
            f"logdet needs a proven positive lower bound of the spectrum, got {lower_bound}. Add a multiple of the "
            "identity with add_diagonal, or give lower_bound."
        )
    drawn, shown = (seed, seed) if generator is None else (resolve_seed(generator), None)
    stream = derive_seed(drawn, _PROBE_STREAM)
    largest = size if memory is None else memory // (SKETCH_VECTORS * size * dtype.itemsize)
    rank = None if reduce_variance and probes is None and steps is None else 0

    def runs(product: Matmat, floor: float) -> Run:
        f = quadrature.log()
        return Run(product, size, f, floor, seed=stream, dtype=dtype, device=device, memory=memory, progress=progress)

    def better_road(run: Run, target: float) -> bool:
        nonlocal rank
        _refuse_lost_floor(run, lower_bound)
        if rank is None:
            rank = choose_rank(run.rules[0], size, lower_bound, target, FIRST_PROBES, max_rank=largest)
            # The sketch's own rounding must stay far inside the bound 1 of the remainder.
            rank = rank if 100 * run.rounding < 0.5 * lower_bound else 0
        return rank > 0

    with torch.no_grad():
        plain = runs(matmat, lower_bound)
        found, limit = grow(plain, goal, limits, pause=better_road)
        _refuse_lost_floor(plain, lower_bound)
        if limit != "paused" or not rank:
            return _report("SLQ", found, limit, plain, plain.matvecs, shown, began)
        sketch = split(matmat, size, floor=lower_bound, rank=rank, seed=drawn, dtype=dtype, device=device)
        if sketch.margin > 0.05:
            found, limit = grow(plain, goal, limits)
            return _report("SLQ", found, limit, plain, plain.matvecs + sketch.matvecs, shown, began)
        plain.drop_bases()
        rest = runs(sketch.remainder(matmat), 1 - sketch.margin)
        shallow = replace(limits, first_steps=8)
        found, limit = grow(rest, goal, shallow, offset=sketch.logdet, slack=sketch.slack)
    spent = plain.matvecs + sketch.matvecs + rest.matvecs
    return _report(f"SLQ with a Nyström split of rank {rank}", found, limit, rest, spent, shown, began)


def _refuse_lost_floor(run: Run, lower_bound: float) -> None:
    if 4 * run.rounding >= lower_bound:
        raise NotPositiveDefiniteError(
            f"The lower bound {lower_bound:.3g} of the spectrum is lost in the rounding of the products "
            f"({run.rounding:.1e} absolute). Multiply in float64, or add a larger multiple of the identity."
        )
