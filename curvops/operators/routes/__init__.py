"""The choice of the algorithm behind every verb, one module per verb.

Each module has `plan(operator, …) -> Plan`: the algorithm's name, the reason, and `run`. `explain` prints what a verb
would run, so the two cannot disagree. The choice reads facts and sizes alone, never a stopwatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from curvops.errors import CurvopsError
from curvops.operators.routes import (
    blocktraces,
    diagonal,
    eigenpairs,
    function,
    logdet,
    norms,
    sample,
    solve,
    spectrum,
    trace,
)
from curvops.operators.routes.plan import Plan

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

__all__ = [
    "Plan",
    "blocktraces",
    "diagonal",
    "eigenpairs",
    "explain",
    "function",
    "logdet",
    "norms",
    "sample",
    "solve",
    "spectrum",
    "trace",
]

_PLANS = {
    "solve": lambda A: solve.plan(A, None),
    "logdet": lambda A: logdet.plan(A, None),
    "slogdet": logdet.plan_signed,
    "trace": lambda A: trace.plan(A, None),
    "block_traces": lambda A: blocktraces.plan(A, None, None),
    "diagonal": lambda A: diagonal.plan(A, None),
    "function": lambda A: function.plan(A, torch.exp, None),
    "sqrt_matvec": lambda A: function.plan_power(A, 0.5, None),
    "inv_sqrt_matvec": lambda A: function.plan_power(A, -0.5, None),
    "frobenius_norm": lambda A: norms.frobenius(A, None),
    "spectral_norm": lambda A: norms.spectral(A, 1e-3),
    "sample": lambda A: sample.plan(A, None),
    "eigsh": eigenpairs.describe,
    "spectrum": spectrum.describe,
}


def explain(operator: LinearOperator, verb_name: str) -> str:
    """`verb: algorithm (reason); about so much memory`, or why the verb would refuse."""
    if verb_name not in ("matvec", "matmat", "rmatvec") and None in operator._known_shape():
        return f"{verb_name}: decided by the shape, which the first forward pass finds (read A.shape first)"
    if verb_name == "to_dense":
        return f"to_dense: {operator._exact('dense') or operator._explain_dense()}; {operator._dense_need()}"
    if verb_name in ("matvec", "matmat", "rmatvec"):
        return f"{verb_name}: {operator._explain_product()}; {operator._product_need(1)}"
    if verb_name not in _PLANS:
        raise ValueError(f"explain({verb_name!r}): expected one of {[*_PLANS, 'to_dense', 'matvec']}.")
    try:
        if verb_name not in ("frobenius_norm", "spectral_norm"):
            operator._require_square(verb_name)
        plan = _PLANS[verb_name](operator)
    except CurvopsError as refusal:
        return f"{verb_name}: refused: {refusal}"
    memory = "" if plan.need is None or plan.refused else f"; {plan.need()}"
    return f"{verb_name}: {'refused' if plan.refused else plan.algorithm} ({plan.reason}){memory}"
