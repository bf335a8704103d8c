"""What to do where positive definiteness is needed and no bound proves it: look for it, or for what stands in the way.

A Lanczos run of k steps from a start uniform on the sphere brackets both ends of the spectrum (Kuczyński and
Woźniakowski 1992, theorem 4.2): with extreme Ritz values θ₁ ≤ θ_k and ε = (ln(1.648 √P / p) / (2k − 1))²,

    λ_min ≥ θ₁ − ε/(1 − 2ε) · (θ_k − θ₁)        with probability at least 1 − 2p over the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from curvops.errors import NotPositiveDefiniteError
from curvops.linalg.lanczos import extend, lanczos
from curvops.linalg.probes import gaussian
from curvops.operators.routes.plan import Plan, product

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

FAILURE_PROBABILITY = 1e-3
"""Probability, over the random start, with which an established bound may be wrong."""

_FIRST_LOOK, _LONGEST_LOOK = 40, 320
_ADVISED_LOOK = 160  # the damping advised is one that a look of so many steps establishes


class Look(NamedTuple):
    """Extreme Ritz values after so many steps, and the lower bound of the spectrum that they establish."""

    low: float
    high: float
    bound: float
    steps: int


def indefinite(
    A: LinearOperator, verb_name: str, reason: str, proceed: Callable[[float, str], Plan] | None = None
) -> Plan:
    """The plan of a verb that needs A to be positive definite, where no positive lower bound is known.

    Its `run` takes a look of 40 to 320 products (never to explain): if that establishes a positive bound, it goes on,
    otherwise it refuses with the smallest eigenvalue met and the damping that would do.

    Args:
        A: The operator.
        verb_name: The verb, for the message.
        reason: Why no exact route answers.
        proceed: Makes the plan from a lower bound and a sentence about it; None to refuse in any case.
    """
    # A curvature of a network, bounded by 0 and not damped, is singular as a rule: no look is spent on hope.
    singular = A.lower_bound is not None and next(A._watched(), None) is not None
    hopeless = proceed is None or singular

    def run(*arguments: Any) -> Any:
        look = _look(A, _FIRST_LOOK if hopeless else _LONGEST_LOOK)
        if proceed is not None and not hopeless and look.bound > 0:
            sentence = (
                f"positive definite by a Lanczos run of {look.steps} steps: eigenvalues above {look.bound:.3g} with "
                f"probability {1 - FAILURE_PROBABILITY:g}"
            )
            return proceed(look.bound, f"{reason}; {sentence}").run(*arguments)
        share = _share(A.shape[0], min(_ADVISED_LOOK, A.shape[0]))
        damping = max(-look.low, 0.0) + 2 * share * (look.high - look.low) + 1e-6 * max(abs(look.low), look.high)
        raise NotPositiveDefiniteError(
            f"{verb_name}: {A!r} is not known to be positive definite, and the smallest eigenvalue met in "
            f"{look.steps} Lanczos steps is {look.low:.3g}; add_diagonal(δ) with δ above {damping:.2g} would do as far "
            f"as was seen, and a GGN is positive semidefinite by construction."
        )

    name = "none" if hopeless else f"{verb_name} after a Lanczos run that must establish positive definiteness"
    return Plan(name, f"{reason}; not known to be positive definite", run, refused=hopeless)


def _look(A: LinearOperator, longest: int) -> Look:
    """Extreme Ritz values, the run extended while they are positive and establish nothing."""
    size = A.shape[0]
    start = gaussian(size, 0, 1, seed=0, dtype=A.dtype, device=A.device)
    run = lanczos(product(A), start, min(_FIRST_LOOK, size))
    while True:
        depth = int(run.depth[0])
        alphas, betas = run.alphas[0, :depth], run.betas[0, : depth - 1]
        values = torch.linalg.eigvalsh(torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1))
        low, high = float(values[0]), float(values[-1])
        exhausted = bool(run.exact[0]) or depth >= size
        share = 0.0 if exhausted else _share(size, depth)
        bound = low - share * (high - low) - 4 * float(run.rounding[0])
        if bound > 0 or low <= 0 or exhausted or depth >= min(longest, size):
            return Look(low, high, bound, depth)
        run = extend(product(A), run, min(depth, longest - depth, size - depth))


def _share(size: int, steps: int) -> float:
    """ε/(1 − 2ε): what may hide beyond an extreme Ritz value, relative to the distance between the two."""
    epsilon = (math.log(1.648 * math.sqrt(size) / (FAILURE_PROBABILITY / 2)) / (2 * steps - 1)) ** 2
    return epsilon / (1 - 2 * epsilon) if epsilon < 0.5 else math.inf
