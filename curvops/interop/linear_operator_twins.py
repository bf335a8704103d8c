"""Operators of linear_operator as ours: structure where there is structure, a closure over the products elsewhere."""

from __future__ import annotations

from functools import reduce, singledispatch
from operator import add
from typing import Any

import torch
from linear_operator import LinearOperator as Theirs
from linear_operator import operators as theirs
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators import (
    BlockDiagonal,
    Closure,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    LinearOperator,
    LowRank,
    Zero,
)


def from_linear_operator(
    operator: Theirs, *, is_symmetric: bool = False, is_psd: bool = False, lower_bound: float | None = None
) -> LinearOperator:
    """An operator of linear_operator (or GPyTorch) as one of ours, on the same tensors; gradients reach them.

    Diagonal, dense, triangular, Kronecker, block-diagonal, root (low-rank) and Cholesky operators, their sums, products
    and multiples keep their structure and their closed forms. Any other becomes a `Closure` over its products, which is
    not differentiated through. What came through `to_linear_operator` comes back as it was.

    Args:
        operator: One matrix; index a batch first.
        is_symmetric, is_psd, lower_bound: Facts of an operator whose structure does not tell them.

    Raises:
        ShapeError: A batch, or not a `linear_operator.LinearOperator`, or of a dtype other than float32 and float64.
    """
    if not isinstance(operator, Theirs):
        raise ShapeError(
            f"from_linear_operator: got {type(operator).__name__}; expected a linear_operator.LinearOperator. "
            "A matrix goes into Dense(M), a SciPy operator into Closure.from_scipy(A)."
        )
    if operator.batch_shape:
        raise ShapeError(
            f"from_linear_operator: got a batch of shape {tuple(operator.shape)}; expected one matrix. Index the "
            "batch, or put its matrices into BlockDiagonal(…)."
        )
    try:
        return convert(operator, True)
    except _UnstructuredError:
        facts = {"is_symmetric": is_symmetric, "is_psd": is_psd, "lower_bound": lower_bound}
        return _closure(operator, **facts) if any(facts.values()) else convert(operator, False)


def structured(operator: Theirs) -> LinearOperator | None:
    """One of ours that keeps the structure of theirs and every gradient; None where that takes a closure."""
    try:
        return convert(operator, True)
    except _UnstructuredError:
        return None


class _UnstructuredError(Exception):
    """Some part has no twin here."""


@singledispatch
def convert(operator: Any, strict: bool) -> LinearOperator:
    """The twin by type; where a part has none, an error (strict) or a closure over its products."""
    evaluated = operator.evaluate_kernel()  # GPyTorch's kernels stay unevaluated until someone asks
    if type(evaluated) is not type(operator):
        return convert(evaluated, strict)
    if strict:
        raise _UnstructuredError
    return _closure(operator)


def _closure(operator: Theirs, **facts: Any) -> Closure:
    if isinstance(operator, theirs.ToeplitzLinearOperator):
        facts["is_symmetric"] = True
    if isinstance(operator, theirs.RootLinearOperator):
        facts["is_psd"] = True

    def product(V: Tensor) -> Any:
        with torch.no_grad():
            return operator.matmul(V)

    def transposed(V: Tensor) -> Any:
        with torch.no_grad():
            return operator.mT.matmul(V)

    rows, columns = operator.matrix_shape
    return Closure(
        product, (rows, columns), dtype=_dtype(operator), device=_device(operator), rmatvec=transposed, batched=True,
        name=type(operator).__name__, **facts,
    )  # fmt: skip


def _dtype(operator: Theirs) -> torch.dtype:
    return operator.dtype or torch.get_default_dtype()


def _device(operator: Theirs) -> torch.device:
    return operator.device or torch.device("cpu")


@convert.register
def _(operator: theirs.DenseLinearOperator, strict: bool) -> LinearOperator:
    return Dense(operator.tensor)


@convert.register
def _(operator: theirs.TriangularLinearOperator, strict: bool) -> LinearOperator:
    return Dense(operator.to_dense())


@convert.register
def _(operator: theirs.DiagLinearOperator, strict: bool) -> LinearOperator:
    return Diagonal(operator._diagonal())


@convert.register
def _(operator: theirs.ConstantDiagLinearOperator, strict: bool) -> LinearOperator:
    return Identity(operator.shape[-1], _dtype(operator), _device(operator), operator.diag_values.reshape(()))


@convert.register
def _(operator: theirs.ZeroLinearOperator, strict: bool) -> LinearOperator:
    rows, columns = operator.matrix_shape
    return Zero((rows, columns), _dtype(operator), _device(operator))


@convert.register
def _(operator: theirs.KroneckerProductLinearOperator, strict: bool) -> LinearOperator:
    return Kronecker(*(convert(factor, strict) for factor in operator.linear_ops))


@convert.register
def _(operator: theirs.RootLinearOperator, strict: bool) -> LinearOperator:
    rows, columns = operator.root.matrix_shape
    held = isinstance(operator.root, theirs.DenseLinearOperator | theirs.TriangularLinearOperator)
    if not held and (columns >= rows or structured(operator.root) is None):
        return convert.dispatch(object)(operator, strict)
    root = operator.root.to_dense()
    if isinstance(operator, theirs.CholLinearOperator) and operator.upper:
        root = root.mT
    return LowRank(root) if columns < rows else Dense(root @ root.mT, is_psd=True)


@convert.register
def _(operator: theirs.SumLinearOperator, strict: bool) -> LinearOperator:
    return reduce(add, (convert(term, strict) for term in operator.linear_ops))


@convert.register
def _(operator: theirs.ConstantMulLinearOperator, strict: bool) -> LinearOperator:
    return operator.expanded_constant.reshape(()) * convert(operator.base_linear_op, strict)


@convert.register
def _(operator: theirs.MatmulLinearOperator, strict: bool) -> LinearOperator:
    return convert(operator.left_linear_op, strict) @ convert(operator.right_linear_op, strict)


@convert.register
def _(operator: theirs.BlockDiagLinearOperator, strict: bool) -> LinearOperator:
    return BlockDiagonal(*(convert(block, strict) for block in _unbatched(operator.base_linear_op)))


@convert.register
def _(operator: theirs.SumBatchLinearOperator, strict: bool) -> LinearOperator:
    return reduce(add, (convert(term, strict) for term in _unbatched(operator.base_linear_op)))


def _unbatched(operator: Theirs) -> list[Any]:
    """The matrices of a batch with one batch dimension, which is what blocks of one matrix have."""
    return [operator[i] for i in range(operator.shape[0])]
