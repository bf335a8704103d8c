"""Which parameters count, in which order, and the two ways between a flat vector and parameter-shaped tensors.

The order of the whole library: `model.named_parameters()` with `requires_grad`, each flattened row-major. A parameter
registered under several names (tied weights) counts once, under its first name.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.errors import DataError, ShapeError, UnsupportedError

Params = None | str | Sequence[str] | Tensor
"""None (all trainable) | "last_layer" | full names or dotted prefixes | a LongTensor of flat indices."""


class ParameterSelection:
    """The P parameters that an operator differentiates, as one flat vector.

    Args:
        model: The network. A compiled one is looked through to the module that it wraps.
        params: None selects every parameter with `requires_grad`; `"last_layer"` those of `model.last_layer`; a list
            selects by full names or dotted prefixes (a prefix takes the trainable parameters below it); a LongTensor
            selects single entries by their flat index among all trainable parameters, in the tensor's own order.

    Attributes:
        names: Names of the tensors touched, in the order of `model.named_parameters()`.
        tensors: The user's own `Parameter`s, each once.
        shapes, sizes, offsets: Shape, number of entries and first flat position of each of `tensors`.
        indices: `(P,)` positions within the concatenated `tensors`, or None where all entries count.
        size: P.

    Raises:
        DataError: nothing selected, unknown or frozen names, duplicate or out-of-range indices, NaN or infinite values.
        UnsupportedError: integer, half-precision or uninitialised parameters, or a mixture of dtypes or devices.

    Cost: one read of the parameters.
    """

    def __init__(self, model: nn.Module, params: Params = None) -> None:
        model = unwrap(model)
        trainable: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise UnsupportedError(
                    f"parameter {name!r} of a lazy module has no shape yet; run one forward to initialise it first"
                )
            if parameter.requires_grad:
                trainable[name] = parameter
        self.indices: Tensor | None = None
        if params is None or isinstance(params, Tensor):
            chosen = trainable
        elif isinstance(params, str):
            chosen = _last_layer(model, params)
        else:
            chosen = _by_name(model, list(params), trainable)
        if not chosen:
            raise DataError(
                "no parameter is selected: the model has none with requires_grad=True; set it on those that count"
            )
        self.names: tuple[str, ...] = tuple(chosen)
        self.tensors: tuple[nn.Parameter, ...] = tuple(chosen.values())
        self.shapes: tuple[torch.Size, ...] = tuple(p.shape for p in self.tensors)
        self.sizes: tuple[int, ...] = tuple(p.numel() for p in self.tensors)
        *offsets, self.full_size = itertools.accumulate(self.sizes, initial=0)
        self.offsets: tuple[int, ...] = tuple(offsets)
        self._check_kind()
        self.check_finite()
        if isinstance(params, Tensor):
            self.indices = _checked_indices(params, self.full_size).to(self.device)
        self.size: int = self.full_size if self.indices is None else int(self.indices.numel())

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of the selected parameters."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """The one device of the selected parameters."""
        return self.tensors[0].device

    def vector(self) -> Float[Tensor, " P"]:
        """A detached copy of the selected parameters as one flat vector."""
        flat = torch.cat([p.detach().reshape(-1) for p in self.tensors])
        return flat if self.indices is None else flat[self.indices]

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Vector `(P,)` or columns `(P, K)` → name → tensor of the parameter's shape (columns: a last axis K).

        With flat indices the entries that were not selected are zero.
        """
        self._check_length(v)
        full = self.scatter(v)
        trailing = v.shape[1:]
        pieces = full.split(list(self.sizes))
        return {n: t.reshape((*s, *trailing)) for n, t, s in zip(self.names, pieces, self.shapes, strict=True)}

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Inverse of `unflatten`: parameter-shaped tensors (with or without a last axis K) → `(P,)` or `(P, K)`."""
        if set(tree) != set(self.names):
            raise ShapeError(f"expected tensors for the names {list(self.names)}, got {list(tree)}")
        parts = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            tensor = tree[name]
            if tensor.shape[: len(shape)] != shape or tensor.ndim > len(shape) + 1:
                raise ShapeError(f"{name}: expected {tuple(shape)} or {(*shape, 'K')}, got {tuple(tensor.shape)}")
            parts.append(tensor.reshape(size, *tensor.shape[len(shape) :]))
        return self.gather(torch.cat(parts))

    def scatter(self, v: Tensor) -> Tensor:
        """`(P, ...)` → the full concatenated vectors of `tensors`, zero where nothing was selected."""
        if self.indices is None:
            return v
        return v.new_zeros(self.full_size, *v.shape[1:]).index_copy(0, self.indices, v)

    def gather(self, full: Tensor) -> Tensor:
        """The full concatenated vectors of `tensors` → `(P, ...)`."""
        return full if self.indices is None else full[self.indices]

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        """`(K, P)` rows → one `(K, *shape)` tensor per parameter."""
        if self.indices is not None:
            full = rows.new_zeros(rows.shape[0], self.full_size)
            full[:, self.indices] = rows
            rows = full
        pieces = rows.split(list(self.sizes), dim=1)
        return [t.reshape(rows.shape[0], *s) for t, s in zip(pieces, self.shapes, strict=True)]

    def split_row(self, row: Tensor) -> list[Tensor]:
        """`(P,)` → one tensor of its shape per parameter."""
        if self.indices is not None:
            return [t[0] for t in self.split_rows(row.unsqueeze(0))]
        pieces = torch.split_with_sizes(row, self.sizes)
        return [t.view(s) for t, s in zip(pieces, self.shapes, strict=True)]

    def join_rows(self, tensors: Sequence[Tensor | None], rows: int) -> Tensor:
        """Inverse of `split_rows`; None stands for zero (a parameter that the output does not depend on)."""
        like = self.tensors[0]
        parts = [
            like.new_zeros(rows, size) if t is None else t.reshape(rows, size)
            for t, size in zip(tensors, self.sizes, strict=True)
        ]
        # The gradient of a sum is one entry seen many times over, which nobody could write to.
        full = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
        return full if self.indices is None else full[:, self.indices]

    def join_row(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Inverse of `split_row`; None stands for zero."""
        return self.join_rows([None if t is None else t.unsqueeze(0) for t in tensors], 1)[0]

    def check_finite(self) -> None:
        """Refuse NaN and infinite parameters by name."""
        # A finite sum proves every entry finite and costs a tenth of `isfinite`; an infinite one may be an overflow.
        sums = torch.stack([p.detach().sum() for p in self.tensors])
        if math.isfinite(sums.sum()):
            return
        bad = [n for n, p in zip(self.names, self.tensors, strict=True) if not bool(p.detach().isfinite().all())]
        if bad:
            raise DataError(f"parameters hold NaN or infinite values: {', '.join(bad)}; restore a finite checkpoint")

    def _check_kind(self) -> None:
        for name, p in zip(self.names, self.tensors, strict=True):
            if p.dtype not in (torch.float32, torch.float64):
                raise UnsupportedError(
                    f"parameter {name!r} has dtype {p.dtype}; curvature needs float32 or float64: "
                    "convert a copy of the model with copy.deepcopy(model).float()"
                )
            if p.is_inference():
                raise UnsupportedError(
                    f"parameter {name!r} was made under torch.inference_mode, which autograd cannot track; "
                    "build the model outside of it (torch.no_grad is fine)"
                )
            if p.layout != torch.strided:
                raise UnsupportedError(f"parameter {name!r} has layout {p.layout}; dense (strided) is needed")
        for what in ("dtype", "device"):
            kinds = {str(getattr(p, what)) for p in self.tensors}
            if len(kinds) > 1:
                raise UnsupportedError(
                    f"the selected parameters mix {what}s ({', '.join(sorted(kinds))}); "
                    f"bring the model to one {what}, or select parameters of one {what} with params=[...]"
                )

    def _check_length(self, v: Tensor) -> None:
        if v.ndim not in (1, 2) or v.shape[0] != self.size:
            raise ShapeError(f"expected ({self.size},) or ({self.size}, K), got {tuple(v.shape)}")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ParameterSelection(P={self.size:,}, tensors={len(self.names)})"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, which does not differentiate twice."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def paired(tangent: Tensor) -> Tensor:
    """A part of a vector such that a network may see it as complex numbers, which PyTorch refuses at odd places."""
    odd = tangent.storage_offset() % 2 or any(stride % 2 for stride in tangent.stride()[:-1])
    return tangent.clone(memory_format=torch.contiguous_format) if tangent.shape[-1:] == (2,) and odd else tangent


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """Parameter-shaped tensors → one flat vector, in the mapping's order, each row-major.

    Raises:
        DataError: the mapping is empty.
    """
    if not tree:
        raise DataError("flatten() got an empty mapping; expected name → tensor")
    return torch.cat([t.reshape(-1) for t in tree.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """Flat vector `(P,)` or columns `(P, K)` → name → tensor shaped as in `like` (columns: a last axis K).

    Args:
        vector: As returned by `flatten`.
        like: A mapping of tensors, or a module (its parameters with `requires_grad`, in their order).

    Raises:
        ShapeError: `vector` has another length than `like`.
    """
    if isinstance(like, nn.Module):
        like = {n: p for n, p in unwrap(like).named_parameters() if p.requires_grad}
    total = sum(t.numel() for t in like.values())
    if vector.ndim not in (1, 2) or vector.shape[0] != total:
        raise ShapeError(f"expected ({total},) or ({total}, K), got {tuple(vector.shape)}")
    pieces = vector.split([t.numel() for t in like.values()])
    return {n: v.reshape((*t.shape, *vector.shape[1:])) for (n, t), v in zip(like.items(), pieces, strict=True)}


def _last_layer(model: nn.Module, params: str) -> dict[str, nn.Parameter]:
    if params != "last_layer":
        raise DataError(f"params={params!r}: a string must be 'last_layer'; names go into a list, params=[{params!r}]")
    last = getattr(model, "last_layer", None)
    if not isinstance(last, nn.Module):
        raise DataError(
            f"params='last_layer' needs a model with an attribute .last_layer that is a module; "
            f"{type(model).__name__} has {type(last).__name__}: wrap it in curvops.FeatureExtractor"
        )
    wanted = {id(p) for p in last.parameters() if p.requires_grad}
    chosen = {n: p for n, p in model.named_parameters() if id(p) in wanted}
    if not chosen:
        raise DataError("params='last_layer': model.last_layer has no parameter with requires_grad=True")
    return chosen


def _by_name(model: nn.Module, wanted: list[str], trainable: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    if not wanted:
        raise DataError("params is an empty list; expected names, dotted prefixes, or None for every trainable one")
    # A tied parameter may be asked for under any of its names; it is kept under its first.
    aliases = dict(model.named_parameters(remove_duplicate=False))
    chosen_ids: set[int] = set()
    for name in wanted:
        if not isinstance(name, str):
            raise DataError(f"params must hold strings, got {type(name).__name__}; flat indices go into a LongTensor")
        if name in aliases:
            if not aliases[name].requires_grad:
                raise DataError(f"parameter {name!r} is frozen (requires_grad=False); unfreeze it or leave it out")
            chosen_ids.add(id(aliases[name]))
            continue
        below = [p for n, p in aliases.items() if n.startswith(name + ".")]
        if not below:
            near = difflib.get_close_matches(name, list(aliases), n=3, cutoff=0.4)
            raise DataError(
                f"no parameter is named {name!r} or lies below it; "
                + (f"near: {', '.join(near)}" if near else f"there are: {', '.join(list(aliases)[:8])}")
            )
        if not any(p.requires_grad for p in below):
            raise DataError(f"every parameter below {name!r} is frozen (requires_grad=False); unfreeze or leave it out")
        chosen_ids.update(id(p) for p in below if p.requires_grad)
    return {n: p for n, p in trainable.items() if id(p) in chosen_ids}


def _checked_indices(indices: Tensor, size: int) -> Tensor:
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ShapeError(
            f"params as flat indices must be a 1-dimensional LongTensor, got {indices.dtype} {tuple(indices.shape)}"
        )
    if indices.numel() == 0:
        raise DataError("params holds no flat index; expected at least one")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise DataError(
            f"flat indices must lie in [0, {size}), the entries of the parameters with requires_grad "
            f"(frozen ones have no index); got {low} … {high}"
        )
    if torch.unique(indices).numel() != indices.numel():
        raise DataError(f"flat indices repeat: {indices.numel() - torch.unique(indices).numel()} duplicates")
    return indices.detach().clone()
