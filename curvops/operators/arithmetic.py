"""The rules of `+`, `·` and `@`: they simplify without computing anything, and make a composite of what is left."""

from __future__ import annotations

from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import LinearOperator, Scalar
from curvops.operators.composites import Product, Scaled, Sum
from curvops.operators.diagonal import Identity, Zero, is_zero


def add(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """`left + right`: equal operators are counted, structured pairs merge, zeros vanish."""
    _require_alike(left, right, "+")
    if left.shape != right.shape:
        raise ShapeError(f"cannot add {left!r} of shape {left.shape} and {right!r} of shape {right.shape}.")
    terms: list[LinearOperator] = []
    for term in (*_terms(left), *_terms(right)):
        terms = _with_term(terms, term)
    if not terms:
        return Zero(left.shape, left.dtype, left.device)
    return terms[0] if len(terms) == 1 else Sum(*terms)


def scale(factor: Scalar, operator: LinearOperator) -> LinearOperator:
    """`factor · operator`: scalars are pulled to the front of sums and products, 1 vanishes, 0 gives `Zero`."""
    if isinstance(factor, Tensor):
        if factor.dim() != 0:
            raise ShapeError(f"a scalar factor is a float or a 0-dim tensor; got shape {tuple(factor.shape)}.")
        factor = factor.to(operator.device, operator.dtype)
    elif factor == 1:
        return operator
    elif factor == 0:
        return Zero(operator.shape, operator.dtype, operator.device)
    if isinstance(operator, Scaled):
        return scale(factor * operator.factor, operator.operator)
    if isinstance(operator, Sum):
        return Sum(*(scale(factor, term) for term in operator.terms))
    simpler = operator._scaled(factor)
    return Scaled(factor, operator) if simpler is None else simpler


def multiply(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """`left @ right`: scalars move out, identities vanish, structured neighbours merge."""
    _require_alike(left, right, "@")
    inner = (left._known_shape()[1], right._known_shape()[0])
    if None not in inner and inner[0] != inner[1]:
        raise ShapeError(f"cannot multiply {left!r} of shape {left.shape} and {right!r} of shape {right.shape}.")
    front, left = _split_scalar(left)
    back, right = _split_scalar(right)
    if isinstance(right, Identity):
        return scale(front * back * right.scale, left)
    if isinstance(right, Zero):
        return Zero((left.shape[0], right.shape[1]), left.dtype, left.device)
    factors = [*_factors(left)]
    for factor in _factors(right):
        simpler = factors[-1]._times(factor)
        factors = [*factors, factor] if simpler is None else [*factors[:-1], simpler]
    return scale(front * back, factors[0] if len(factors) == 1 else Product(*factors))


def _with_term(terms: list[LinearOperator], term: LinearOperator) -> list[LinearOperator]:
    if isinstance(term, Zero) or (isinstance(term, Identity) and is_zero(term.scale)):
        return terms
    for index, present in enumerate(terms):
        merged = _merge(present, term)
        if merged is not None:
            rest = [*terms[:index], *terms[index + 1 :]]
            return rest if isinstance(merged, Zero) else [*terms[:index], merged, *terms[index + 1 :]]
    return [*terms, term]


def _merge(left: LinearOperator, right: LinearOperator) -> LinearOperator | None:
    (a, A), (b, B) = _split_scalar(left), _split_scalar(right)
    if A is B:
        return scale(a + b, A)
    merged = left._plus(right)
    return right._plus(left) if merged is None else merged


def _split_scalar(operator: LinearOperator) -> tuple[Scalar, LinearOperator]:
    return (operator.factor, operator.operator) if isinstance(operator, Scaled) else (1.0, operator)


def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _factors(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.factors if isinstance(operator, Product) else (operator,)


def _require_alike(left: LinearOperator, right: LinearOperator, sign: str) -> None:
    if (left.dtype, left.device) != (right.dtype, right.device):
        raise ShapeError(
            f"{left!r} {sign} {right!r}: {left.dtype} on {left.device} and {right.dtype} on {right.device}; "
            f"convert one with .to(...)."
        )
