"""Which algorithm answers `function(f, v)`, `sqrt_matvec` and `inv_sqrt_matvec`.

structure with an eigendecomposition    exact
tensors held or P small                 dense eigendecomposition
anything else                           Lanczos, its depth grown until successive answers agree
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.errors import UnsupportedError
from curvops.linalg.functions import FIRST_STEPS, apply_function, inv_sqrt, slab, sqrt
from curvops.linalg.results import Report, settle
from curvops.memory import Need
from curvops.operators import methods
from curvops.operators.autograd import linear_map
from curvops.operators.routes.definiteness import indefinite
from curvops.operators.routes.plan import (
    EIGH,
    Plan,
    basis_bytes,
    counted,
    dense_is_affordable,
    dense_need,
    dense_reason,
    lanczos_need,
    product,
    refuse_method,
    resolvable,
)

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

_ADVICE = 'Give more steps (Lanczos(steps=)), a larger damping, or on_failure="warn" to take the best answer.'

Elementwise = Callable[[Tensor], Tensor]


def plan(A: LinearOperator, f: Elementwise, method: methods.Method | None, columns: int = 1) -> Plan:
    """The plan for `A.function(f, v, method)`; its `run` takes v as columns, as many as announced."""
    closed_form = A._exact("function")
    if method is None and closed_form:
        return _exact(A, closed_form, "closed form of the structure", lambda V: A._function(f, V))
    if isinstance(method, methods.Eigh) or (method is None and dense_is_affordable(A)):
        reason = dense_reason(A) if method is None else "asked for"
        return _exact(A, "dense eigendecomposition", reason, lambda V: _dense_eigen(A)._function(f, V), dense=True)
    if method is None or isinstance(method, methods.Lanczos):
        reason = f"P = {A.shape[0]:,} is too large for a dense copy" if method is None else "asked for"

        def driver(matmat: Elementwise, V: Tensor, **options: Any) -> tuple[Tensor, Report]:
            return apply_function(matmat, f, V, **options)

        return _lanczos(A, driver, method or methods.Lanczos(), reason, A.lower_bound, columns)
    raise refuse_method("function", method, "Eigh", "Lanczos")


def plan_power(
    A: LinearOperator,
    power: float,
    method: methods.Method | None,
    established: float | None = None,
    columns: int = 1,
) -> Plan:
    """The plan for `A^power v`, power ±½: definiteness is checked by the exact routes and required by Lanczos."""
    if not isinstance(method, methods.Eigh | methods.Lanczos | None):
        raise refuse_method("sqrt_matvec" if power > 0 else "inv_sqrt_matvec", method, "Eigh", "Lanczos")
    closed_form = A._exact("function")
    if method is None and closed_form:
        return _exact(A, closed_form, "closed form of the structure", lambda V: A._power_apply(power, V))
    if isinstance(method, methods.Eigh) or (method is None and dense_is_affordable(A)):
        reason = dense_reason(A) if method is None else "asked for"
        return _exact(A, "dense eigendecomposition", reason, lambda V: _dense_power(A, power, V), dense=True)
    reason = f"P = {A.shape[0]:,} is too large for a dense copy" if method is None else "asked for"
    bound = A.lower_bound if established is None else established
    if bound is None or bound < 0 or (power < 0 and bound == 0):
        return indefinite(A, f"A^{power:+g} v", reason, lambda found, why: plan_power(A, power, method, found, columns))
    return _lanczos(A, inv_sqrt if power < 0 else sqrt, method or methods.Lanczos(), reason, bound, columns)


def _dense_power(A: LinearOperator, power: float, V: Tensor) -> Tensor:
    operator, _ = resolvable(A) if power < 0 else (A, "")
    return _dense_eigen(operator)._power(power)._matmat(V.to(operator.dtype)).to(V.dtype)


def _dense_eigen(A: LinearOperator):
    from curvops.operators.dense import Dense

    return Dense(A.to_dense(), is_symmetric=True)._spectral()


def _exact(A: LinearOperator, name: str, reason: str, compute: Elementwise, *, dense: bool = False) -> Plan:
    def run(V: Tensor) -> tuple[Tensor, Report]:
        spent = counted(A)
        X = compute(V)
        matvecs, seconds = spent()
        return X, Report(algorithm=name, reason=reason, matvecs=matvecs, seconds=seconds)

    return Plan(name, reason, run, need=(lambda: dense_need(A, EIGH)) if dense else None)


def _lanczos(
    A: LinearOperator,
    driver: Callable[..., tuple[Tensor, Report]],
    method: methods.Lanczos,
    reason: str,
    bound: float | None,
    columns: int,
) -> Plan:
    def memory() -> int | None:
        return basis_bytes(A) if method.steps is None else None

    def need() -> Need:
        steps = min(method.steps or FIRST_STEPS, A.shape[0])
        together = min(columns, slab(A.shape[0], A.dtype, memory()))
        return lanczos_need(A, together, steps, grows=method.steps is None)

    def run(V: Tensor) -> tuple[Tensor, Report]:
        if torch.is_grad_enabled() and A._requires_grad():
            raise UnsupportedError(
                f"f(A) v by Lanczos has no gradient with respect to the damping or factors of {A!r}; use Eigh(), or "
                f"detach them."
            )
        reports: list[Report] = []

        def apply(W: Tensor) -> Tensor:
            rtol = methods.SOLVE_RTOL[A.dtype] if method.rtol is None else method.rtol
            X, report = driver(
                product(A), W.detach(), rtol=rtol, max_steps=method.steps, lower_bound=bound, memory=memory()
            )
            # Exactly the asked number of steps, without a target, is an answer as asked.
            if method.steps is not None and method.rtol is None:
                report = replace(report, converged=True)
            settle(X, report, method.on_failure, _ADVICE)
            reports.append(report)
            return X

        X = linear_map(V, apply, apply)
        return X, replace(reports[0], reason=f"{reason}; {reports[0].reason}")

    return Plan("Lanczos", reason, run, need=need)
