"""Doors to other libraries; what needs one of them is imported when the door is opened, not with curvops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from curvops.operators.doors import enter

if TYPE_CHECKING:
    from linear_operator import LinearOperator as Theirs

    from curvops.operators.base import LinearOperator


def from_linear_operator(operator: Theirs, **facts: Any) -> LinearOperator:
    """An operator of linear_operator (or GPyTorch) as one of ours, structure and gradients kept.

    Args:
        operator: One matrix; index a batch first.
        facts: `is_symmetric`, `is_psd`, `lower_bound` of an operator whose structure does not tell them.

    Told in full at `curvops.interop.linear_operator.from_linear_operator`.
    """
    from curvops.interop.linear_operator import from_linear_operator as convert

    return convert(operator, **facts)


def _to_linear_operator(operator: LinearOperator, **methods: Any) -> Theirs:
    from curvops.interop.linear_operator import CurvatureLinearOperator

    return CurvatureLinearOperator.of(operator, **methods)


enter("linear_operator", _to_linear_operator)
