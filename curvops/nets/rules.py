"""What each operation means for its parameter: the one table of layer rules.

A rule turns a `Site` into a `Tap`: at which edge of the graph to take the output's derivative g, and how to read off
it, and off what the operation saved, the terms of which the per-example gradient is the sum:

    outer    Σ_t g_t a_tᵀ           Linear, matrix products, convolutions of every kind, recurrent cells, attention
    lookup   Σ_t e_{index_t} g_tᵀ   Embedding
    shift    Σ_t g_t                biases
    direct   Σ_t r_t                norm layers, scales, positional parameters: r_t read off g and the input

To teach the library a new operation, write a rule and enter it in `RULES` under the name that the graph gives the
operation (`f.grad_fn.name()`). A site without a rule sends its parameter to the exact fallback of `capture`. What an
operation does to the order of the examples is told in another table, that of `order`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.nets.layers import Placement, Site, shape_at

Kind = Literal["outer", "lookup", "shift", "direct"]


@dataclass(frozen=True)
class Tap:
    """How to read one site. Rows R hold the examples and, where a layer folds them in, positions; T are positions.

    Attributes:
        kind: See the module's docstring.
        edge: Where to take g.
        rows: R.
        cotangent: `(K, *shape at edge)` → outer `(K, R, T, G, O)`, lookup and shift `(K, R, T, O)`, direct `(K, R, p)`.
        value: The input, outer `(R, T, G, I)`, lookup `(R, T)` indices; None otherwise.
        flipped: outer: the parameter is `(G, I, O)` rather than `(G, O, I)`.
        size: lookup: rows of the table.
        made: `(T, G, I)` of an input that is no view of what the graph keeps, but made anew.
        by_position: The input once more, convolutions `(R, T, G, kernel, I / kernel)`, in memory in that order.
    """

    kind: Kind
    edge: GradientEdge
    rows: int
    cotangent: Callable[[Tensor], Tensor]
    value: Callable[[], Tensor] | None = None
    flipped: bool = False
    size: int = 0
    made: tuple[int, int, int] | None = None
    by_position: Callable[[], Tensor] | None = None


Rule = Callable[[Site, Placement, torch.Size], Tap | None]
"""Site, where its operand lies in the parameter, the parameter's shape → how to read it; None where unsure."""


def tap(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """The site read by the rule of its operation; None where there is no rule, or it does not apply."""
    rule = RULES.get(site.name)
    return None if rule is None else rule(site, place, shape)


# ---- matrix products ------------------------------------------------------------------------------------------------


def _addmm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """alpha · mat1 @ mat2 + beta · self."""
    node = site.node
    if site.slot == 0:
        return None if node._saved_beta != 1 else _broadcast_sum(site, place, shape)
    if node._saved_alpha != 1:
        return None
    return _product(site, place, shape, node._saved_mat1 if site.slot == 2 else node._saved_mat2, site.slot == 2)


def _mm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """self @ mat2, matrices or stacks of one matrix."""
    node = site.node
    other = node._saved_self if site.slot == 1 else node._saved_mat2
    if other.ndim == 3:
        if other.shape[0] != 1:
            return None
        other = other[0]
    return _product(site, place, shape, other, site.slot == 1)


def _linear(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """The fused operation of some backends: weight `(out, in)` at slot 1, bias at slot 2."""
    if site.slot == 2:
        return _broadcast_sum(site, place, shape)
    if site.slot != 1 or not place.whole:
        return None
    return _outer(site, site.node._saved_input.flatten(0, -2), lambda g: g.flatten(1, -2), flipped=False)


def _product(site: Site, place: Placement, shape: torch.Size, other: Tensor, right: bool) -> Tap | None:
    """X @ W (`right`) or W @ X, the operand W being the parameter, its transpose, or some of its rows."""
    *ones, m, n = site.operand_shape
    inner, outer = (m, n) if right else (n, m)
    X = other if right else other.T  # (R, inner)

    def columns_last(g: Tensor) -> Tensor:  # (K, [1,] R, outer)
        g = g.reshape(g.shape[0], *g.shape[-2:])
        return g if right else g.transpose(1, 2)

    if len(shape) < 2 or any(one != 1 for one in ones):
        return None
    if place.whole or place.transposed:
        return _outer(site, X, columns_last, flipped=place.whole == right)
    rows = place.labels.reshape(shape[0], -1)
    used = (rows != 0).any(1)
    part = rows[used] - 1
    grid = torch.arange(inner * outer, device=rows.device).reshape(m, n)
    grid = grid if right else grid.T  # entry (i, o) of the map from inner to outer
    where = None if bool(used.all()) else used.nonzero()[:, 0]
    if part.shape == (outer, inner) and torch.equal(part, grid.T):
        return _outer(site, X, lambda g: _spread(columns_last(g), where, shape[0]), flipped=False)
    if part.shape == (inner, outer) and torch.equal(part, grid):
        return _outer(site, _spread(X, where, shape[0]), columns_last, flipped=True)
    return None


def _outer(site: Site, X: Tensor, columns_last: Callable[[Tensor], Tensor], *, flipped: bool) -> Tap:
    """X `(R, I)`, and g brought to `(K, R, O)`."""
    return Tap(
        "outer",
        GradientEdge(site.node, 0),
        X.shape[0],
        lambda g: columns_last(g).unsqueeze(2).unsqueeze(2),
        lambda: X.unsqueeze(1).unsqueeze(1),
        flipped=flipped,
    )


def _spread(t: Tensor, where: Tensor | None, size: int) -> Tensor:
    """The last axis put at the places `where` of one of length `size`, zero elsewhere."""
    if where is None:
        return t
    return t.new_zeros(*t.shape[:-1], size).index_copy(-1, where, t)


# ---- convolutions -----------------------------------------------------------------------------------------------


def _convolution(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """Every convolution: 1 to 3 dimensions, strided, padded, dilated, grouped; its input comes already padded if "same"
    or circular. Positions are those of the output; of the input for a transposed convolution, whose roles are swapped.
    """
    node, shape = site.node, site.operand_shape  # the weight of a Linear serves as a kernel of width 1
    if not place.whole:
        return None
    edge, x = GradientEdge(node, 0), node._saved_input.detach()  # patches, made later, shall not keep the graph
    if site.slot == 2:
        return Tap("shift", edge, x.shape[0], lambda g: g.flatten(3).transpose(2, 3))
    if site.slot != 1:
        return None
    G = node._saved_groups
    window = _Window(shape[2:], node._saved_stride, node._saved_padding, node._saved_dilation)

    def plain(t: Tensor) -> Tensor:  # (…, channels, *space) → (…, T, G, channels / G)
        return t.flatten(t.ndim - len(shape) + 2).transpose(-1, -2).unflatten(-1, (G, -1))

    if node._saved_transposed:
        patches = lambda g: window(g.flatten(0, 1), G, x.shape[2:]).unflatten(0, g.shape[:2])  # noqa: E731
        return Tap("outer", edge, x.shape[0], patches, lambda: plain(x), flipped=True)
    space = shape_at(edge)[2:]
    made = space.numel(), G, shape[1:].numel()
    rows = lambda: window.by_position(x, G, space)  # noqa: E731
    return Tap("outer", edge, x.shape[0], plain, lambda: window(x, G, space), made=made, by_position=rows)


class _Window:
    """The patches of a convolution: `(N, channels, *space)` → `(N, T, G, channels / G · kernel)`.

    In memory `(G, channels / G, kernel, N, T)`: whole rows of the image are copied at once, and all patches of a group
    are one matrix.
    """

    def __init__(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> None:
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def __call__(self, x: Tensor, groups: int, out: Sequence[int]) -> Tensor:
        d = len(self.kernel)
        x = self._unfolded(x, 2, out)  # (N, channels, *positions, *kernel)
        x = x.permute(1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d)).contiguous()
        x = x.flatten(2 + d).unflatten(0, (groups, -1)).flatten(1, 1 + d)  # (G, channels / G · kernel, N, T)
        return x.permute(2, 3, 0, 1)

    def by_position(self, x: Tensor, groups: int, out: Sequence[int]) -> Tensor:
        """The same as `(N, T, G, kernel, channels / G)`, in memory in that order: whole rows of pixels are copied."""
        d = len(self.kernel)
        x = self._unfolded(x.movedim(1, -1).contiguous(), 1, out)  # (N, *positions, channels, *kernel)
        x = x.unflatten(1 + d, (groups, -1)).movedim(2 + d, -1).contiguous()
        return x.flatten(1, d).flatten(3, 2 + d)

    def _unfolded(self, x: Tensor, first: int, out: Sequence[int]) -> Tensor:
        """Axes of space from `first` on become positions, and the kernel's are put last; a view of the padded image."""
        d = len(self.kernel)
        # Saved arguments of 1-d convolutions may be expanded to two dimensions; the last ones count.
        stride, padding, dilation = (list(s)[-d:] for s in (self.stride, self.padding, self.dilation))
        behind = x.ndim - first - d
        x = F.pad(x, [0, 0] * behind + [p for pad in reversed(padding) for p in (pad, pad)])
        for axis in range(d):
            reach = (self.kernel[axis] - 1) * dilation[axis] + 1
            x = x.unfold(first + axis, reach, stride[axis])[..., :: dilation[axis]]
        # A ragged end may leave positions that the convolution drops.
        for axis in range(d):
            x = x.narrow(first + axis, 0, out[axis])
        return x


# ---- lookups ----------------------------------------------------------------------------------------------------


def _embedding(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """Rows of a table; the padding row has gradient zero, as autograd has it."""
    node, shape = site.node, site.operand_shape
    if not place.whole or node._saved_scale_grad_by_freq:
        return None
    index, padding = node._saved_indices, signed(node._saved_padding_idx)

    def cotangent(g: Tensor) -> Tensor:
        g = g.reshape(g.shape[0], -1, 1, shape[1])
        return g if padding < 0 else g * (index.reshape(-1, 1, 1) != padding)

    return Tap(
        "lookup",
        GradientEdge(node, 0),
        index.numel(),
        cotangent,
        lambda: index.reshape(-1, 1),
        flipped=True,
        size=shape[0],
    )


def signed(n: int) -> int:
    """Saved negative integers come back as unsigned 64-bit ones."""
    return n - 2**64 if n >= 2**63 else n


# ---- norms ------------------------------------------------------------------------------------------------------


def _layer_norm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    node = site.node
    return _normed(site, place, shape, node._saved_result1, node._saved_result2)


def _rms_norm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """The fused operation of accelerators; processors scale and multiply."""
    return _normed(site, place, shape, None, site.node._saved_result1)


def _normed(site: Site, place: Placement, shape: torch.Size, mean: Tensor | None, rstd: Tensor) -> Tap | None:
    """Weight at slot 1, bias at slot 2."""
    if not place.whole:
        return None
    p = shape.numel()
    x = site.node._saved_input
    rows = x.numel() // p

    @functools.cache
    def normal() -> Tensor:
        centred = x.reshape(rows, p) if mean is None else x.reshape(rows, p) - mean.reshape(rows, 1)
        return centred * rstd.reshape(rows, 1)

    def cotangent(g: Tensor) -> Tensor:
        g = g.reshape(g.shape[0], rows, p)
        return g if site.slot == 2 else g * normal()

    return Tap("direct", GradientEdge(site.node, 0), rows, cotangent)


def _group_norm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    node = site.node
    if not place.whole:
        return None
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    N, C, groups = x.shape[0], x.shape[1], node._saved_group

    @functools.cache
    def normal() -> Tensor:
        return ((x.reshape(N, groups, -1) - mean.reshape(N, groups, 1)) * rstd.reshape(N, groups, 1)).reshape(N, C, -1)

    return Tap("direct", GradientEdge(node, 0), N, lambda g: _channelwise(g, N, C, None if site.slot == 2 else normal))


def _batch_norm(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """By running statistics only; InstanceNorm, which normalises by its own, arrives here with repeated parameters."""
    node = site.node
    if not place.whole or node._saved_training:
        return None
    x, eps = node._saved_input, getattr(node, "_saved_eps", None) or node._saved_epsilon
    mean, variance = node._saved_running_mean, node._saved_running_var
    N, C = x.shape[:2]

    @functools.cache
    def normal() -> Tensor:
        return (x.reshape(N, C, -1) - mean[:, None]) * (variance[:, None] + eps).rsqrt()

    return Tap("direct", GradientEdge(node, 0), N, lambda g: _channelwise(g, N, C, None if site.slot == 2 else normal))


def _channelwise(g: Tensor, N: int, C: int, factor: Callable[[], Tensor] | None) -> Tensor:
    """`(K, N, C, …)` → the sums over positions `(K, N, C)`, times the factor `(N, C, positions)`."""
    g = g.reshape(g.shape[0], N, C, -1)
    return g.sum(-1) if factor is None else torch.einsum("kncs,ncs->knc", g, factor())


# ---- recurrent cells --------------------------------------------------------------------------------------------


def _gates(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """The fused cells of accelerators: biases at slots 3 and 4, added to the gates at slots 0 and 1, which are products
    made for the cell alone; a bias has the derivatives of its gates.
    """
    if site.slot < 3 or not place.whole:
        return None
    gates, number = site.node.next_functions[site.slot - 3]
    if gates is None:
        return None
    edge = GradientEdge(gates, number)
    return Tap("shift", edge, shape_at(edge)[0], lambda g: g.unsqueeze(2))


# ---- sums, scales and copies ------------------------------------------------------------------------------------


def _add(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """self + alpha · other."""
    return None if site.slot == 1 and site.node._saved_alpha != 1 else _broadcast_sum(site, place, shape)


def _mul(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    other = site.node._saved_other if site.slot == 0 else site.node._saved_self
    return _broadcast_sum(site, place, shape, other)


def _expand(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    return _broadcast_sum(site, place, shape)


def _repeat(site: Site, place: Placement, shape: torch.Size) -> Tap | None:
    """Along axes of length 1 the same as an expansion; else a vector laid down several times in a row."""
    operand = (1,) * (len(shape_at(GradientEdge(site.node, 0))) - len(site.operand_shape)) + tuple(site.operand_shape)
    if all(n == 1 or times == 1 for n, times in zip(operand, site.node._saved_repeats, strict=True)):
        return _broadcast_sum(site, place, shape)
    if len(site.operand_shape) != 1 or not place.whole:
        return None
    p = shape.numel()
    edge = GradientEdge(site.node, 0)
    return Tap("direct", edge, shape_at(edge).numel() // p, lambda g: g.reshape(g.shape[0], -1, p))


def _broadcast_sum(site: Site, place: Placement, shape: torch.Size, factor: Tensor | None = None) -> Tap | None:
    """A parameter broadcast to the output and added to it, or multiplied with `factor`.

    Added along the last axis it is a bias; otherwise its leading axes of length 1 are where the examples are.
    """
    edge = GradientEdge(site.node, 0)
    full = shape_at(edge)
    operand = (1,) * (len(full) - len(site.operand_shape)) + tuple(site.operand_shape)

    def placed(e: Tensor) -> Tensor:  # (…, operand's entries) → (…, p)
        return e if place.whole else e[..., (place.labels - 1).clamp(min=0)] * (place.labels > 0)

    if factor is None and len(full) > 1 and operand == (*(1,) * (len(full) - 1), full[-1]):
        rows = full[:-1].numel()
        return Tap("shift", edge, rows, lambda g: placed(g.reshape(g.shape[0], rows, 1, full[-1])))
    lead = next((i for i, n in enumerate(operand) if n != 1), len(full))
    if lead == 0:
        return None
    rows = full[:lead].numel()

    def cotangent(g: Tensor) -> Tensor:
        g = (g if factor is None else g * factor).flatten(1, lead)
        for axis in range(lead, len(full)):
            if operand[axis] == 1:
                g = g.sum(2 + axis - lead, keepdim=True)
        return placed(g.reshape(g.shape[0], rows, -1))

    return Tap("direct", edge, rows, cotangent)


RULES: dict[str, Rule] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "BmmBackward0": _mm,
    "LinearBackward0": _linear,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "MiopenBatchNormBackward0": _batch_norm,
    "ThnnFusedLstmCellBackward0": _gates,
    "ThnnFusedGruCellBackward0": _gates,
    "AddBackward0": _add,
    "MulBackward0": _mul,
    "ExpandBackward0": _expand,
    "RepeatBackward0": _repeat,
}
"""Operation → rule."""
