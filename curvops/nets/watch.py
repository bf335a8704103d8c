"""Are the user's things still those that the operator was built on?

Two watches. The cheap one, before every product, compares identities, addresses, versions and modes. The thorough
one, at a verb's start and end, reads the values once, since writes through `.data`, NumPy views or
`vector_to_parameters` leave no version behind.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvops.errors import StaleOperatorError
from curvops.nets.parameters import unwrap

_ADVICE = "build the operator again, or build it with snapshot=True to work on a copy"

_SMALL = 4096
"""Tensors up to this many entries are copied rather than summed."""

_COPIED = 2**18
"""Entries of all tensors together up to which all of them are copied."""

_STRIDES = (1024, 1021)
"""Two coprime strides: a change or a permutation that keeps every sum at both is no accident."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Entry:
    """One watched tensor as it was."""

    label: str
    tensor: Tensor
    owner: dict[str, Any] | None
    key: str
    pointer: int
    version: int
    dtype: torch.dtype
    requires_grad: bool

    def moved(self) -> str | None:
        """Words for what differs, or None; a changed version alone counts as movement."""
        t = self.tensor
        if self.owner is not None and self.owner.get(self.key) is not t:
            return "was replaced by another tensor"
        if t.dtype != self.dtype:
            return f"changed dtype from {self.dtype} to {t.dtype}"
        if t.requires_grad != self.requires_grad:
            return f"changed requires_grad from {self.requires_grad} to {t.requires_grad}"
        return None

    def touched(self) -> bool:
        return self.tensor.data_ptr() != self.pointer or _version(self.tensor) != self.version

    def renew(self) -> None:
        self.pointer, self.version = self.tensor.data_ptr(), _version(self.tensor)


class Watch:
    """Remembers a model's parameters, buffers and modes, and tensors of data, and says when they have changed.

    Args:
        model: The user's module.
        tensors: Name → tensor of the batches handed in as tensors.

    Building reads the parameters and buffers once (about 0.1 ms per million float32 entries on one core) and copies
    O(1) of them, or all of a small model; of the data nothing is read.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[tuple[str, Tensor]] = ()) -> None:
        model = unwrap(model)
        self._modules = [(path, m, m.training, tuple(m._modules.items())) for path, m in model.named_modules()]
        self._state: list[_Entry] = []
        seen: set[int] = set()
        for path, module, _, _ in self._modules:
            for kind, owner in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in owner.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        label = f"{kind} {f'{path}.{key}'.lstrip('.')!r}"
                        self._state.append(_entry(label, tensor, owner, key))
        self._data = [_entry(f"data tensor {name}", t, None, "") for name, t in tensors]
        self._content = Content([e.tensor for e in self._state])

    def check(self) -> bool:
        """The cheap watch, for every product.

        Returns:
            True when something was written in place with the same content as before: kept graphs must be dropped,
            since autograd refuses them, though every number stays right.

        Raises:
            StaleOperatorError: a parameter, buffer, data tensor or mode has changed; the message names it.

        Cost: O(number of tensors and modules), nothing read, unless a version has moved.
        """
        for path, module, training, children in self._modules:
            if module.training != training:
                mode = "train" if module.training else "eval"
                raise StaleOperatorError(
                    f"module {path or '(the model itself)'!r} went to {mode} mode since the operator was built; "
                    f"put it back with .{'train' if training else 'eval'}(), or {_ADVICE}"
                )
            if len(module._modules) != len(children) or any(module._modules.get(k) is not c for k, c in children):
                where = path or "(the model itself)"
                raise StaleOperatorError(
                    f"submodules of {where!r} were replaced since the operator was built; {_ADVICE}"
                )
        touched = False
        for entry in self._state:
            if (words := entry.moved()) is not None:
                raise StaleOperatorError(f"{entry.label} {words} since the operator was built; {_ADVICE}")
            touched = touched or entry.touched()
        for entry in self._data:
            if entry.touched() or entry.tensor.dtype != entry.dtype:
                raise StaleOperatorError(f"{entry.label} was written to since the operator was built; {_ADVICE}")
        if touched:
            self.check_content()
            for entry in self._state:
                entry.renew()
        return touched

    def check_content(self) -> None:
        """The thorough watch, for a verb's start and end: one read of parameters and buffers.

        Raises:
            StaleOperatorError: values have changed; the message names the tensors.
        """
        changed = self._content.changed()
        if changed:
            labels = ", ".join(self._state[i].label for i in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise StaleOperatorError(f"{labels}{more} changed value since the operator was built; {_ADVICE}")


class Content:
    """What some tensors hold, remembered in O(1) memory per large tensor.

    Small tensors are copied, and all where they are few entries. Of large ones, the bit patterns, read as integers, are
    summed exactly (modulo 2^bits) over all entries with the same position modulo 1024 and modulo 1021: any single
    change shows, and so does a permutation.

    Cost: one read of every tensor, to build and to compare; two calls for each large one and two for all together.
    Copies are laid out for that when they are compared for the first time, which mostly never happens.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self._copies: list[Tensor] | None = None
        self._resized: list[int] = []
        with torch.no_grad():
            self._small = _COPIED if sum(t.numel() for t in tensors) <= _COPIED else _SMALL
            if self._small == _COPIED:
                self._copies = [t.detach().clone() for t in tensors]
            else:
                self._keep(tensors)

    def changed(self) -> list[int]:
        """Positions of the tensors that no longer hold what they held."""
        with self._lock, torch.no_grad():
            if self._copies is not None:
                self._keep(self._copies)
                self._copies = None  # where the tensors themselves lie is found out below
            moved = [i for i, t in enumerate(self._tensors) if self._views[i].key != _key(t)]
            if moved:
                for i in moved:
                    self._views[i] = _Bits(self._tensors[i], self._small)
                pairs = enumerate(zip(self._views, self._sizes, strict=True))
                self._resized = [i for i, (bits, size) in pairs if bits.size != size]
                if not self._resized:
                    self._arrange()
            if self._resized:  # until they are what they were, there is nothing to compare
                return list(self._resized)
            now = [digest.read() for digest in self._digests]
            if all(_same_bits(kept, values) for kept, values in zip(self._kept, now, strict=True)):
                return []
            pairs = zip(self._kept, self._digests, strict=True)
            return sorted({i for kept, digest in pairs for i in digest.differing(kept)})

    def _keep(self, tensors: Sequence[Tensor]) -> None:
        """Remember what these hold."""
        self._views = [_Bits(t, self._small) for t in tensors]
        self._sizes = [bits.size for bits in self._views]
        self._arrange()
        self._kept = [digest.read().clone() for digest in self._digests]

    def _arrange(self) -> None:
        """All pieces by type and device."""
        digests: dict[Any, _Digest] = {}
        for i, bits in enumerate(self._views):
            for pieces, dtype, summed in ((bits.whole, bits.size.dtype, False), (bits.rows, bits.width, True)):
                if pieces and (kind := (dtype, bits.size.device)) not in digests:
                    digests[kind] = _Digest(*kind)
                for piece in pieces:
                    digests[kind].add(i, piece, summed)
        self._digests = list(digests.values())
        for digest in self._digests:
            digest.lay_out()


class _Digest:
    """Integers of one type on one device: pieces that are kept whole, then the column sums of others.

    They are written to the same memory at every reading.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._whole: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._owners: tuple[list[int], list[int]] = [], []

    def add(self, owner: int, piece: Tensor, summed: bool) -> None:
        """Take in a piece of the tensor with the number `owner`."""
        (self._rows if summed else self._whole).append(piece)
        self._owners[summed].append(owner)

    def lay_out(self) -> None:
        """Make room, once all pieces are there."""
        sizes = [piece.numel() for piece in self._whole]
        first = sum(sizes)
        sizes += [piece.shape[1] for piece in self._rows]
        with torch.inference_mode(False):  # to be written to in any mode
            self._values = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
            self._parts = self._values.split(sizes)
            self._first = self._values[:first]
        self._sums = list(zip(self._rows, self._parts[len(self._whole) :], strict=True))

    def read(self) -> Tensor:
        """What the tensors hold now."""
        if self._whole:
            torch.cat(self._whole, out=self._first)
        for rows, part in self._sums:
            torch.sum(rows, 0, dtype=self._dtype, out=part)
        return self._values

    def differing(self, kept: Tensor) -> set[int]:
        """Numbers of the tensors whose integers were others than those kept at the last reading."""
        before = kept.split([len(part) for part in self._parts])
        owners = [*self._owners[False], *self._owners[True]]
        return {i for i, a, b in zip(owners, before, self._parts, strict=True) if not _same_bits(a, b)}


class _Size(NamedTuple):
    """What has to be equal before bits can be."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class _Bits:
    """A tensor's bits as integers, in views that stay valid for as long as it lies where it does.

    Args:
        small: Entries up to which they are compared one by one.

    Attributes:
        key: Where and how it lies.
        size: What it is as integers.
        whole: What is compared entry by entry, 1-dim: all of a small tensor, what exceeds the strides of a large one.
        rows: What is summed down its columns.
        width: The sums' integers. Wrap-around is exact and free of order, hence the same for any number of threads.
    """

    def __init__(self, tensor: Tensor, small: int) -> None:
        self.key = _key(tensor)
        t = tensor.detach().resolve_conj().resolve_neg()
        if t.layout != torch.strided:
            t = t.to_dense()
        if t.is_complex():
            t = torch.view_as_real(t)
        bits = t.reshape(-1).view(_INTEGERS[t.element_size()])
        self.size = _Size(bits.dtype, tensor.shape, bits.device)
        self.width = bits.dtype if bits.element_size() >= 4 else torch.int64
        if bits.numel() <= small:
            self.whole, self.rows = [bits], []
            return
        ends = [bits.numel() // stride * stride for stride in _STRIDES]
        self.whole = [bits[end:] for end in ends if end < bits.numel()]
        self.rows = [bits[:end].view(-1, stride) for end, stride in zip(ends, _STRIDES, strict=True)]


def _key(t: Tensor) -> Any:
    """Changes with whatever views depend on; never equal where a view would be a copy."""
    if t.layout != torch.strided or not t.is_contiguous() or t.is_conj() or t.is_neg():
        return object()
    return (t.data_ptr(), t.shape, t.dtype)


def snapshot(model: nn.Module) -> nn.Module:
    """A private copy of the model with its own parameters and buffers, in the same modes.

    Non-leaf tensors that hang on the module (kept activations) come detached, since they do not copy otherwise.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    with torch.inference_mode(False):
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        return copy.deepcopy(model, memo)


def _entry(label: str, tensor: Tensor, owner: dict[str, Any] | None, key: str) -> _Entry:
    return _Entry(label, tensor, owner, key, tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.requires_grad)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
