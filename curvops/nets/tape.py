"""A pass over a kept graph, replayed without autograd: recorded once, and believed once it agreed to the bit.

Every product on a kept graph makes the same calls, on other numbers. Autograd looks them up node by node, in Python for
the layers of this library, which takes as long as the arithmetic of a small network and a tenth of that of a larger
one. A tape is these calls in a row, and nothing else:

    replay = Replay()
    replay(run, v, row)        # run(v, row), which writes to row; the calls alone from the 23rd time on

Recorded are the calls that depend on v, below autograd. A pass that looks at numbers (branches on them, hands them to
NumPy, draws at random) has no tape. Numbers that are no tensors are on it as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from curvops.nets.patches import recording

Pass = Callable[[Tensor, Tensor], None]
"""Of a vector `(P,)` the product, written to another."""

_BEFORE = 20
"""Runs before one is recorded: recording and comparing cost about as much as a tape saves in thirty products."""

_LONGEST = 10_000
"""Calls beyond which a tape is not worth its compilation."""

_LEAVING = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})
"""Ways out of PyTorch, behind which nothing is seen."""

_BRANCHING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Replay:
    """Runs a pass, and replays it once there is a tape that agreed with it. Both give the same bits."""

    def __init__(self) -> None:
        self._runs = 0
        self._candidate: Tape | None = None
        self._tape: Tape | None = None
        self._refused = False

    @property
    def replays(self) -> bool | None:
        """Whether there is a tape; None before it was tried."""
        return False if self._refused else True if self._tape is not None else None

    def __call__(self, run: Pass, v: Tensor, row: Tensor) -> None:
        """`run(v, row)`, or what it would do; v and row may share memory."""
        candidate, tape = self._candidate, self._tape  # another thread may go on meanwhile
        if self._refused or not (_is_plain(v) and _is_plain(row)):
            run(v, row)
            return
        if tape is not None:
            if tape.is_current():
                tape(v, row)
                return
            self._tape, self._runs = None, 0  # to be taken again, if autograd does not object
        self._runs += 1
        if self._runs <= _BEFORE:
            run(v, row)
        elif candidate is None:
            self._candidate = record(run, v, row)
            self._refused = self._candidate is None
        else:
            self._refused = not _agrees(candidate, run, v, row)
            self._tape = None if self._refused else candidate
            self._candidate = None


def _agrees(candidate: Tape, run: Pass, v: Tensor, row: Tensor) -> bool:
    """`run(v, row)`, and whether the tape says the same, here and on a vector that nobody has seen.

    What the tape did not see would be a constant on it, and agree with a vector that comes again. The tape goes first,
    so that no memory holds what it is to find.
    """
    generator = torch.Generator().manual_seed(0)
    unseen = torch.randn(len(v), dtype=torch.float64, generator=generator, device="cpu").to(v.dtype)
    again, agreed = torch.empty_like(row), True
    for w in (unseen, v.clone()):
        if agreed:
            try:
                candidate(w, again)
            except Exception:  # the pass itself has an answer
                agreed = False
        run(w, row)
        agreed = agreed and torch.equal(again, row)
    return agreed


class Tape:
    """Calls in a row, as a function of v and row, and the tensors that they find in place.

    Args:
        calls: The function.
        constants: What it was given beside v and row.
    """

    def __init__(self, calls: Pass, constants: Iterable[Any]) -> None:
        self._calls = calls
        tensors = (value for value in constants if isinstance(value, Tensor))
        self._constants = [(t, t._version) for t in tensors if not t.is_inference()]

    def is_current(self) -> bool:
        """Whether nobody has written to the constants in place since."""
        for t, version in self._constants:  # noqa: SIM110  (three times as fast as all(), on the way of every product)
            if t._version != version:
                return False
        return True

    def __call__(self, v: Tensor, row: Tensor) -> None:
        with recording(), torch.no_grad():
            self._calls(v, row)


def record(run: Pass, v: Tensor, row: Tensor) -> Tape | None:
    """Run, and return the calls made as a function of v and row; None where they may be others another time."""
    v = v.detach()  # an object of its own, where both are one
    recorder = _Recorder(v, row)
    with recorder, _Exits(recorder):
        run(v, row)
    return recorder.compiled()


class _Recorder(TorchDispatchMode):
    """Writes down calls as lines of Python.

    Tensors are "moving" if they depend on v or are made on the way, and have a name each; all others are constants.
    None that moves is held: a recorded pass takes the memory of any other.
    """

    def __init__(self, v: Tensor, row: Tensor) -> None:
        super().__init__()
        self.refused = False
        self._v, self._row = (t.untyped_storage().data_ptr() for t in (v, row))
        self._moving = WeakTensorKeyDictionary({v: "v", row: "row"})
        self._named = 0
        self._constants: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._calls: list[tuple[str, list[str], list[str]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which would be imported for it, and that takes a second
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.refused:
            try:
                self._note(func, args, kwargs, result)
            except RuntimeError:  # a tensor without memory of its own; the pass shall not fail for its tape
                self.refused = True
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given, made = list(_tensors([*args, *kwargs.values()])), list(_tensors([result]))
        moving = any(t in self._moving for t in given)
        if self._is_unfit(func, args, kwargs, [*given, *made]):
            self.refused = True
            return
        # A view of a constant is one, and so is a number read from it.
        own = {t.untyped_storage().data_ptr() for t in given}
        if not moving and given and all(t.untyped_storage().data_ptr() in own for t in made):
            return
        used: list[str] = []
        call = ", ".join([
            *(self._text(arg, used) for arg in args), *(f"{k}={self._text(arg, used)}" for k, arg in kwargs.items())
        ])  # fmt: skip
        targets = list(self._targets(result))
        bound = [name for name, _ in targets]
        line = f"{self._constant(func)}({call})"
        if isinstance(result, Tensor) and targets:
            line = f"{bound[0]} = {line}"
        elif targets:
            line = "; ".join([f"r = {line}", *(f"{name} = r[{place}]" for name, place in targets), "del r"])
        self._calls.append((line, used, bound))
        self.refused = len(self._calls) > _LONGEST

    def _is_unfit(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return True
        # What an index selects is settled where the index is: only a mask that moves selects now more, now less.
        looked_at = args[1:] if func is torch.ops.aten.index.Tensor else [*args, *kwargs.values()]
        if any(t in self._moving for t in _tensors(looked_at)) and not _BRANCHING.isdisjoint(func.tags):
            return True
        if not all(_is_dense(t) for t in tensors):
            return True
        return any(not self._is_ours(t) for t in _written(func, args, kwargs))

    def _is_ours(self, t: Tensor) -> bool:
        """Whether a tensor may be written to: made on the way, or the result, but no constant and not v."""
        place = t.untyped_storage().data_ptr()
        return t in self._moving and (place != self._v or place == self._row)

    def _targets(self, result: Any) -> Iterator[tuple[str, int]]:
        """New names and where in the result they stand."""
        for place, t in enumerate(result if isinstance(result, tuple | list) else [result]):
            if isinstance(t, Tensor) and t not in self._moving:
                self._named += 1
                self._moving[t] = f"t{self._named}"
                yield self._moving[t], place

    def _text(self, value: Any, used: list[str]) -> str:
        if isinstance(value, Tensor) and value in self._moving:
            used.append(self._moving[value])
            return used[-1]
        if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
            return f"[{', '.join(self._text(item, used) for item in value)}]"
        return repr(value) if type(value) in (int, bool, type(None)) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = self._names.setdefault(id(value), f"c{len(self._names)}")
        self._constants[name] = value  # which also keeps its id its own
        return name

    def compiled(self) -> Tape | None:
        """The calls, each tensor dropped after its last use."""
        if self.refused:
            return None
        lines: list[str] = []
        dropped = {"v", "row"}
        for line, used, bound in reversed(self._calls):
            last = [name for name in dict.fromkeys([*used, *bound]) if name not in dropped]
            dropped.update(last)
            lines.append(f"    {line}" + (f"; del {', '.join(last)}" if last else ""))
        scope = dict(self._constants)
        exec("\n".join(["def calls(v, row):", "    pass", *reversed(lines)]), scope)
        calls = scope.pop("calls")  # the function knows its scope, which shall not know it
        return Tape(calls, self._constants.values())


class _Exits(TorchFunctionMode):
    """Refuses a tape to a pass that leaves PyTorch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING:
            self._recorder.refused = True
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that a call writes to."""
    if not func._schema.is_mutable:
        return
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors([given.get(argument.name)])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_plain(t: Tensor) -> bool:
    """Whether a vector is one that calls below autograd may be made with, on a processor, entry after entry."""
    return _is_dense(t) and t.device.type == "cpu" and t.stride() == (1,) and not t.is_inference()


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and nothing around them."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore[reportAttributeAccessIssue]
    )
