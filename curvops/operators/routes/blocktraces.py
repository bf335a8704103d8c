"""Which algorithm answers `block_traces`: sums of an exact diagonal, or Hutchinson's probes shared by all blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.linalg import traces
from curvops.linalg.probes import resolve_seed
from curvops.linalg.results import EstimateReport, settle
from curvops.operators import methods
from curvops.operators.routes import diagonal
from curvops.operators.routes.plan import FIRST_PROBES, Plan, dense_is_affordable, product, refuse_method, vectors

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator

Blocks = Mapping[str, slice | Tensor]
_ADVICE = 'Give more probes or a wider rtol, or on_failure="warn" to take the estimates with their half-widths.'


def plan(A: LinearOperator, blocks: Blocks | None, method: methods.Method | None) -> Plan:
    """The plan for `A.block_traces(blocks, method)`."""
    chosen = _checked(A, blocks)
    if isinstance(method, methods.Hutchinson):
        return _estimate(A, chosen, method, "asked for")
    if method is not None:
        raise refuse_method("block_traces", method, "Hutchinson")
    if A._exact("diagonal") or dense_is_affordable(A):
        return _exact(A, chosen)
    return _estimate(A, chosen, methods.Hutchinson(), f"P = {A.shape[0]:,} is too large for a dense copy")


def _checked(A: LinearOperator, blocks: Blocks | None) -> Blocks:
    chosen = A.layout if blocks is None else blocks
    if not chosen:
        raise ShapeError(
            f"block_traces: {A!r} has no named parameters; give blocks={{name: slice or indices}}, at least one."
        )
    size = A.shape[0]
    for name, part in chosen.items():
        if isinstance(part, Tensor):
            fits = part.numel() > 0 and bool(((part >= 0) & (part < size)).all()) and not part.is_floating_point()
        else:
            fits = 0 <= (part.start or 0) < (size if part.stop is None else part.stop) <= size
        if not fits:
            raise ShapeError(f"block_traces: block {name!r} is {part}; expected entries within 0 … {size - 1:,}.")
    return chosen


def _exact(A: LinearOperator, blocks: Blocks) -> Plan:
    inner = diagonal.plan(A, None)

    def run() -> tuple[dict[str, Tensor], EstimateReport]:
        d, report = inner.run()
        found = {name: d[part].sum() for name, part in blocks.items()}
        values = torch.stack([value.detach() for value in found.values()])
        return found, replace(report, value=values, bracket=(values, values))

    return Plan(inner.algorithm, inner.reason, run, need=inner.need)


def _estimate(A: LinearOperator, blocks: Blocks, method: methods.Hutchinson, reason: str) -> Plan:
    def run() -> tuple[dict[str, Tensor], EstimateReport]:
        seed = resolve_seed(method.generator)
        _, report = traces.block_traces(
            product(A), A.shape[0], blocks, rtol=method.rtol, probes=method.probes, seed=seed,
            dtype=A.dtype, device=A.device,
        )  # fmt: skip
        report = replace(report, reason=f"{reason}; {report.reason}", seed=None if method.generator else seed)
        found = dict(zip(blocks, report.value.unbind(), strict=True))
        settle(found, report, method.on_failure, _ADVICE)
        return found, report

    return Plan(
        "Hutchinson per block", reason, run,
        need=lambda: A._product_need(FIRST_PROBES).beside(vectors(A, 3 * FIRST_PROBES)),
    )  # fmt: skip
