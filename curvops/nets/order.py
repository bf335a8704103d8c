"""Where the examples of a batch lie, in every tensor between the outputs and the parameters.

The outputs hold the examples along their first axis. From there the graph is followed backwards, one operation after
the other: a view leaves all entries where they are, a permutation moves whole axes, a matrix product takes the rows of
its first factor, a sum brings back an axis. So it is known in which order the rows of a layer hold the examples, and
that no row is shared by two: for this batch, whatever its size, without a pass. An operation that is not in the table,
or works along the examples' axis, ends the matter; then passes over the batch find it out, see `ownership`.

Everything is said by one number per tensor: the *stride* of the examples, how many entries lie from one example's to
the next one's, in the tensor's own row-major order (it has nothing to do with memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.nets.attention import Attention
from curvops.nets.elementwise import Elementwise
from curvops.nets.layers import Node
from curvops.nets.rules import signed

Edge = tuple[Any, int]
"""A node and the number of its output."""

Strides = dict[Edge, "int | None"]
"""Stride of the examples at an edge; None where the tensor has none of them."""


class _Unknown(Exception):
    """Where the examples lie cannot be told."""


def example_strides(f: Tensor) -> Strides | None:
    """The stride of the examples in every tensor behind `f`, whose first axis they are, at least two; without leaves.

    Returns:
        None where an operation is not known, works along the examples' axis, or a tensor would have two strides.

    Cost: one visit per node.
    """
    if f.grad_fn is None:
        return {}
    B = f.shape[0]
    if B < 2:
        return None
    found: Strides = {(f.grad_fn, f.output_nr): f.numel() // B}
    pending: list[tuple[Node, torch.Size, int | None]] = [(f.grad_fn, f.shape, f.numel() // B)]
    try:
        while pending:
            for edge, shape, stride in _entering(*pending.pop(), B):
                if edge not in found:
                    found[edge] = stride
                    pending.append((edge[0], shape, stride))
                elif found[edge] != stride:
                    return None
    except _Unknown:
        return None
    return found


def _entering(
    node: Node, shape: torch.Size, stride: int | None, B: int
) -> Iterator[tuple[Edge, torch.Size, int | None]]:
    """The tensors that an operation made its result of, with their shapes and strides."""
    name, axis, within = type(node).__name__, -1, 0
    rule = _RULES.get(name) or _OWN.get(type(node))
    for slot, edge in enumerate(node.next_functions):
        parent, number = edge
        if parent is None or type(parent).__name__ == "AccumulateGrad":
            continue
        theirs = parent._input_metadata[number].shape
        if stride is None or name in _VIEWS:
            yield edge, theirs, stride
            continue
        if rule is None:
            raise _Unknown
        if axis < 0:
            axis, within = _axis(shape, stride, B)
        if rule is _broadcast and theirs == shape:
            yield edge, theirs, stride
            continue
        there = rule(_At(node, slot, axis, within, shape, theirs))
        if there is None:
            yield edge, theirs, None
        elif there < len(theirs) and theirs[there] == shape[axis]:
            yield edge, theirs, within * math.prod(theirs[there + 1 :])
        else:
            raise _Unknown


def _axis(shape: torch.Size, stride: int, B: int) -> tuple[int, int]:
    """The axis that holds the examples whole, and their stride along it."""
    behind = 1
    for axis in range(len(shape) - 1, -1, -1):
        along = behind * shape[axis]
        if stride < along:
            if stride % behind or along % (stride * B):
                break
            return axis, stride // behind
        behind = along
    raise _Unknown


# ---- rules: which axis of an operand is that of the examples in the result; None where it has no examples -----------


class _At(NamedTuple):
    """An operand of an operation.

    Attributes:
        node: The operation.
        slot: Position of the operand.
        axis: That of the examples in the result.
        within: Their stride along it.
        shape, theirs: Of the result and of the operand.
    """

    node: Node
    slot: int
    axis: int
    within: int
    shape: torch.Size
    theirs: torch.Size


Rule = Callable[[_At], "int | None"]


def _broadcast(at: _At) -> int | None:
    """Entry by entry, operands broadcast to one shape."""
    there = at.axis - len(at.shape) + len(at.theirs)
    return None if there < 0 or at.theirs[there] == 1 else there


def _along_others(at: _At) -> int:
    """Along axes that the operation was told; all axes stay."""
    told = _told(at.node, len(at.shape))
    if not told or at.axis in told:
        raise _Unknown
    return at.axis


def _reduction(at: _At) -> int:
    told = _told(at.node, len(at.theirs))
    kept = [i for i in range(len(at.theirs)) if at.node._saved_keepdim or i not in told]
    if kept[at.axis] in told:
        raise _Unknown
    return kept[at.axis]


def _taken_apart(at: _At) -> int:
    """One slice along an axis that the result has no more."""
    (told,) = _told(at.node, len(at.theirs))
    return at.axis + (at.axis >= told)


def _stack(at: _At) -> int:
    (told,) = _told(at.node, len(at.shape))
    if at.axis == told:
        raise _Unknown
    return at.axis - (at.axis > told)


def _unfold(at: _At) -> int:
    """Windows along an axis, laid along a new last one."""
    if at.axis in (signed(at.node._saved_dimension) % len(at.theirs), len(at.theirs)):
        raise _Unknown
    return at.axis


def _index(at: _At) -> int:
    """Entries by number, along axes next to each other: behind the examples', or one for each of them in turn."""
    indices = at.node._saved_indices
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise _Unknown
    if at.axis < used[0]:
        return at.axis
    if at.axis or any(indices[i].shape != (at.shape[0],) or indices[i].dtype == torch.bool for i in used):
        raise _Unknown
    in_turn = [i for i in used if indices[i].tolist() == list(range(at.shape[0]))]
    if len(in_turn) != 1:
        raise _Unknown
    return in_turn[0]


def _pad(at: _At) -> int:
    pad = at.node._saved_pad  # two numbers per axis, from the last one on
    if any(pad[2 * (len(at.shape) - 1 - at.axis) :][:2]):
        raise _Unknown
    return at.axis


def _repeat(at: _At) -> int | None:
    there = at.axis - len(at.shape) + len(at.theirs)
    if there >= 0 and at.node._saved_repeats[at.axis] == 1:
        return there
    if there < 0 or at.within % at.theirs[there] == 0:  # whole copies for each example
        return None
    raise _Unknown


def _transpose(at: _At) -> int:
    one, other = (signed(dim) % len(at.shape) for dim in (at.node._saved_dim0, at.node._saved_dim1))
    return {one: other, other: one}.get(at.axis, at.axis)


def _turn(at: _At) -> int:
    """A matrix turned, all its axes."""
    return len(at.shape) - 1 - at.axis


def _permute(at: _At) -> int:
    return signed(at.node._saved_dims[at.axis]) % len(at.shape)


def _product(at: _At) -> int | None:
    """Matrix products, also many at a time: rows are the first operand's, columns the second's."""
    other = len(at.shape) - 2 + at.slot  # of the result's last two axes, the one that the operand has
    return at.axis if at.axis < len(at.shape) - 2 or at.axis == other else None


def _added_product(at: _At) -> int | None:
    return _product(at._replace(slot=at.slot - 1)) if at.slot else _broadcast(at)


def _linear(at: _At) -> int | None:
    """The fused operation of some backends: input, weight `(out, in)`, bias."""
    last = at.axis == len(at.shape) - 1
    if at.slot:
        return 0 if last else None
    return None if last else at.axis


def _first(at: _At) -> int | None:
    """Along the first axis of the first operand, one after the other; the others are parameters."""
    if at.axis:
        raise _Unknown
    return None if at.slot else 0


def _layer_norm(at: _At) -> int | None:
    if at.axis >= len(at.shape) - len(at.node._saved_normalized_shape):
        raise _Unknown
    return None if at.slot else at.axis


def _batch_norm(at: _At) -> int | None:
    """By running statistics each entry for itself; by its own, each channel: InstanceNorm has examples for channels."""
    if at.axis > 1 or (at.axis == 0 and at.node._saved_training):
        raise _Unknown
    if at.slot:
        return 0 if at.axis == 1 else None
    return at.axis


def _attention(at: _At) -> int | None:
    """Queries, keys, values and a mask, `(*, T, d)` and `(*, T, T)`."""
    if at.axis >= len(at.shape) - 2:
        raise _Unknown
    return _broadcast(at)


def _cell(at: _At) -> int | None:
    """The fused cells of accelerators: two products, the state, and two biases."""
    return _first(at._replace(slot=max(0, at.slot - 2)))


def _lookup(at: _At) -> None:
    """The table is everybody's, and the indices are not on the graph."""
    if at.axis == len(at.shape) - 1:
        raise _Unknown


def _told(node: Node, dims: int) -> tuple[int, ...]:
    """The axes that an operation was told, of so many; all of them where it was told none."""
    told = node._saved_dim if hasattr(node, "_saved_dim") else node._saved_dims
    if told is None:
        return tuple(range(dims))
    return tuple(signed(dim) % dims for dim in (told if isinstance(told, tuple | list) else (told,)))


def _nodes(*names: str) -> tuple[str, ...]:
    """Names as the graph has them; most are the first of their kind."""
    return tuple(name if "Backward" in name else f"{name}Backward0" for name in names)


_VIEWS = frozenset(
    _nodes("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "SqueezeBackward1", "SqueezeBackward2",
           "Alias", "Clone", "ToCopy")
)  # fmt: skip
"""Operations that leave all entries where they are, row-major."""

_TABLE: dict[Rule, tuple[str, ...]] = {
    _broadcast: _nodes(
        # of several operands
        "Add", "AddBackward1", "Sub", "SubBackward1", "Rsub", "RsubBackward1", "Mul", "MulBackward1", "Div",
        "DivBackward1", "Pow", "PowBackward1", "PowBackward2", "Minimum", "Maximum", "Fmin", "Fmax", "Where", "Lerp",
        "LerpBackward1", "Addcmul", "Addcdiv", "Atan2", "Hypot", "Xlogy", "PreluKernel", "MaskedFill", "Clamp",
        "ClampBackward1", "ClampMin", "ClampMax", "Expand",
        # of one
        "Abs", "Neg", "Exp", "Exp2", "Expm1", "Log", "Log10", "Log1P", "Log2", "Sqrt", "Rsqrt", "Reciprocal", "Sin",
        "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Tanh", "Sigmoid", "Logit",
        "Erf", "Erfc", "Sinc", "Sign", "Floor", "Ceil", "Round", "Trunc", "NanToNum", "Relu", "LeakyRelu", "Elu",
        "Celu", "Gelu", "Silu", "Mish", "Softplus", "LogSigmoid", "Hardtanh", "Hardswish", "Hardsigmoid", "Hardshrink",
        "Softshrink", "Threshold", "NativeDropout",
    ),
    _along_others: _nodes(
        "Softmax", "LogSoftmax", "SafeSoftmax", "Cumsum", "Cumprod", "Flip", "Roll", "Glu", "Slice", "Cat", "Split",
        "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Gather", "IndexSelect", "Sort", "Topk", "Cummax",
        "Cummin",
    ),
    _reduction: _nodes(
        "SumBackward1", "MeanBackward1", "Nansum", "Amax", "Amin", "Max", "Min", "MedianBackward1", "ProdBackward1",
        "Logsumexp", "LinalgVectorNorm", "Std", "Var", "StdMean", "VarMean", "Kthvalue", "Mode",
    ),
    _taken_apart: _nodes("Select", "Unbind"),
    _stack: _nodes("Stack"),
    _unfold: _nodes("Unfold"),
    _index: _nodes("Index"),
    _pad: _nodes("ConstantPadNd"),
    _repeat: _nodes("Repeat"),
    _transpose: _nodes("Transpose", "TransposeBackward1"),
    _turn: _nodes("T"),
    _permute: _nodes("Permute"),
    _product: _nodes("Mm", "Bmm"),
    _added_product: _nodes("Addmm", "Baddbmm"),
    _linear: _nodes("Linear"),
    _first: _nodes(
        "Convolution", "NativeGroupNorm", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D",
        "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "UpsampleNearest1D",
        "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D",
        "UpsampleTrilinear3D", "PixelShuffle", "PixelUnshuffle", "Im2Col", "Col2Im", "ReflectionPad1D",
        "ReflectionPad2D", "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D",
    ),
    _layer_norm: _nodes("NativeLayerNorm", "FusedRmsNorm"),
    _batch_norm: _nodes("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
    _attention: _nodes(
        "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
        "ScaledDotProductCudnnAttention",
    ),
    _cell: _nodes("ThnnFusedLstmCell", "ThnnFusedGruCell"),
    _lookup: _nodes("Embedding"),
}  # fmt: skip
_RULES = {name: rule for rule, names in _TABLE.items() for name in names}
_OWN: dict[type, Rule] = {Elementwise._backward_cls: _broadcast, Attention._backward_cls: _attention}
"""This library's functions, by their nodes: names are anybody's."""
