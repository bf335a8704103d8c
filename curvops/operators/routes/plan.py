"""What every choice shares: the plan, the cost thresholds, and the product closure that algorithms see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, UnsupportedError
from curvops.linalg.norms import spectral_norm
from curvops.linalg.results import EstimateReport
from curvops.memory import Need, default_budget, in_turn, require

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator
    from curvops.operators.functionspace import FunctionSpaceForm
    from curvops.operators.methods import Method

MAX_DENSE = 4096
"""Largest size at which a matrix-free operator is made dense: P products and P³/3 operations, a few seconds."""

MAX_DENSE_HELD = 16384
"""Largest size at which a matrix that is already made of tensors is factorised densely."""

NEGLIGIBLE = 2**20
"""Bytes up to which no verb is refused for its working memory: a megabyte hurts nobody."""

FIRST_PROBES = 10
"""Probes that estimators start with."""

EIGH = 4.5
"""Matrices alive in a symmetric eigendecomposition: the matrix, its vectors, and twice as much workspace."""

_DENSE_COPIES = 4  # the matrix, its factor, and workspace


@dataclass(frozen=True)
class Plan:
    """An algorithm chosen: its name, why, and what runs it, returning `(value, report)`.

    A refused plan's `run` raises the error that tells the user what stands in the way. `need`, where the algorithm
    takes memory worth the name, is what `explain` shows and `started` holds against the budget.
    """

    algorithm: str
    reason: str
    run: Callable[..., Any]
    refused: bool = False
    need: Callable[[], Need] | None = None

    def started(self, operator: LinearOperator, verb_name: str) -> Callable[..., Any]:
        """`run`, if what it needs is within the operator's memory budget, or too little to be worth a refusal.

        Raises:
            MemoryBudgetError: It is not.
        """
        needed = 0 if self.need is None else self.need().peak
        if needed > NEGLIGIBLE:
            require(
                needed, operator.memory_budget, operator.device,
                f"{verb_name} of {operator!r} by {self.algorithm}",
                "Ask for fewer columns or probes at a time, restrict params, or raise memory_budget.",
            )  # fmt: skip
        return self.run


def chosen_at_run(dual: FunctionSpaceForm, verb_name: str, choose: Callable[[], Plan]) -> Plan:
    """The plan where the rows of function space take a forward pass to find: run finds them, then chooses again."""

    def run(*arguments: Any) -> Any:
        assert dual.rows >= 0  # known from now on
        return choose().run(*arguments)

    return Plan(
        f"{dual.algorithm(verb_name)} or the route without it",
        f"how many rows function space has is found by the first forward; it is used where they are fewer than "
        f"P = {dual.operator.shape[0]:,}",
        run,
    )


def dense_is_affordable(operator: LinearOperator) -> bool:
    """Whether a dense copy is the cheaper road: small, or held as tensors anyway, and inside the budget."""
    size = operator.shape[0]
    limit = MAX_DENSE_HELD if operator._holds_tensors() else MAX_DENSE
    budget = default_budget(operator.device) if operator.memory_budget is None else operator.memory_budget
    return size <= limit and _DENSE_COPIES * size * size * operator.dtype.itemsize <= budget


def vectors(operator: LinearOperator, count: float) -> float:
    """Bytes of so many vectors of the operator's size."""
    return count * operator.shape[0] * operator.dtype.itemsize


def dense_need(operator: LinearOperator, matrices: float = 2.75) -> Need:
    """A dense copy, and then its factorisation, in which so many matrices are alive (Cholesky; `EIGH` otherwise)."""
    factorised = Need(int(vectors(operator, matrices * operator.shape[0])))
    return in_turn([operator._dense_need(), factorised])


def lanczos_need(operator: LinearOperator, probes: int, steps: int, *, grows: bool = False) -> Need:
    """Lanczos from `probes` vectors at a time: their bases, five vectors each, and a product."""
    return operator._product_need(probes).beside(vectors(operator, probes * (steps + 5)), grows=grows)


def sketch_need(operator: LinearOperator, probes: int | None) -> Need:
    """XTrace and XDiag: seven vectors for each probe, of which there are ten at first."""
    count = min(probes or FIRST_PROBES, operator.shape[0])
    return operator._product_need(count).beside(vectors(operator, 7 * count), grows=probes is None)


def basis_bytes(operator: LinearOperator) -> int:
    """Half of the budget: what Lanczos bases kept side by side may take."""
    budget = default_budget(operator.device) if operator.memory_budget is None else operator.memory_budget
    return max(budget, NEGLIGIBLE) // 2


def steps_within_memory(operator: LinearOperator, probes: int) -> int:
    """Lanczos steps that `probes` bases kept side by side may take in half of the budget; twenty at least."""
    return max(20, min(1000, basis_bytes(operator) // max(1, int(vectors(operator, probes)))))


def probes_within_memory(operator: LinearOperator) -> int:
    """Probes that an estimator which takes seven vectors for each, while they grow, may use."""
    budget = default_budget(operator.device) if operator.memory_budget is None else operator.memory_budget
    return max(10, min(5000, budget // (7 * operator.shape[0] * operator.dtype.itemsize)))


def dense_reason(operator: LinearOperator) -> str:
    """Why the dense road was chosen."""
    size = operator.shape[0]
    held = "is made of tensors" if operator._holds_tensors() else f"is at most {MAX_DENSE:,}"
    return f"P = {size:,} {held}: exact at {size:,} columns and P³/3 operations"


def product(operator: LinearOperator) -> Callable[[Tensor], Tensor]:
    """The operator as algorithms see it: columns in, columns out, without autograd."""

    def matmat(V: Tensor) -> Tensor:
        with torch.no_grad():
            return operator._apply(V.detach())

    return matmat


def counted(operator: LinearOperator) -> Callable[[], tuple[int, float]]:
    """Start counting: the function returned gives the products and seconds since.

    A dense copy of a sum multiplies its terms and not the sum, so the busiest part of the operator's own size counts.
    """
    before, start = _counts(operator), perf_counter()

    def spent() -> tuple[int, float]:
        busiest = max(now - before.get(part, 0) for part, now in _counts(operator).items())
        return busiest, perf_counter() - start

    return spent


def _counts(operator: LinearOperator) -> dict[int, int]:
    counts = {id(operator): operator.matvec_count}
    for child in operator._children():
        if child._known_shape() == operator._known_shape():
            counts.update(_counts(child))
    return counts


def refuse_method(verb_name: str, method: Method, *expected: str) -> UnsupportedError:
    """The error for a method value that does not answer this verb."""
    return UnsupportedError(f"{verb_name}: got method={method}; expected {', '.join(expected)}, or None to choose.")


def exact_report(value: Tensor, name: str, reason: str, spent: Callable[[], tuple[int, float]]) -> EstimateReport:
    """Report of an exact number."""
    matvecs, seconds = spent()
    number = float(value.detach()) if value.dim() == 0 else value.detach()
    return EstimateReport.exact(number, name, reason, matvecs, seconds)


def resolvable(A: LinearOperator) -> tuple[LinearOperator, str]:
    """A, or its float64 twin where products in float32 cannot resolve its smallest eigenvalues, and a note of it.

    A float32 product carries rounding of u‖A‖. Where that is not far below the spectrum's lower bound, logarithms and
    inverse powers of the small eigenvalues would be noise.
    """
    if A.dtype != torch.float32 or A._holds_tensors():
        return A, ""
    bound = A.lower_bound or 0.0
    norm, _ = spectral_norm(product(A), A.shape[0], rtol=0.1, dtype=A.dtype, device=A.device)
    if torch.finfo(torch.float32).eps / 2 * norm <= bound / 10:
        return A, ""
    try:
        twin = A.to(torch.float64)
    except UnsupportedError as refusal:
        if bound <= 0:
            return A, ""  # nothing is proven: the factorisation has to find its eigenvalues above rounding
        raise NotPositiveDefiniteError(
            f"float32 products with {A!r} carry rounding of {6e-8 * norm:.2g}, above a tenth of its smallest "
            f"eigenvalue {bound:.2g}, and it has no float64 twin ({refusal}); use float64, or a larger damping."
        ) from None
    return twin, f"; in float64, since u‖A‖ = {6e-8 * norm:.2g} is above a tenth of {bound:.2g}"
