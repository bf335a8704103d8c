"""A structured operator whose content is computed at first need, once, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvops.errors import ShapeError
from curvops.operators.base import Layout, LinearOperator
from curvops.operators.eigen import Eigen
from curvops.operators.formula import Formula, size_text


class Deferred(LinearOperator):
    """A leaf of known kind and shape, built by `build()` at the first verb that needs its content.

    Args:
        build: Makes the operator; called once (again after `release()`). None for a subclass that overrides `_built`:
            a method of its own, kept in itself, would hold all that it holds until Python's collector comes round.
        kind: Class that `build` returns; answers which closed forms there are before anything is computed.
        shape, dtype, device: As of the result.
        label: What `repr` prints in the class's brackets, e.g. `16×64`; the shape by default.
        note: Provenance shown behind the line, e.g. "by curvlinops 3.0.1".
        watch: The operator over the network whose content must not change before `build` has run.
        facts: `is_symmetric`, `is_psd`, `lower_bound`, `memory_budget`, as in `LinearOperator`.
    """

    def __init__(
        self,
        build: Callable[[], LinearOperator] | None,
        kind: type[LinearOperator],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        label: str | None = None,
        note: str | None = None,
        watch: LinearOperator | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(shape, dtype, device, **facts)
        self.build, self.kind, self.note = build, kind, note
        self.label = size_text(shape) if label is None else label
        self.watch = watch
        self._lock = threading.Lock()
        self._content: LinearOperator | None = None

    @property
    def is_computed(self) -> bool:
        """Whether the content is there."""
        return self._content is not None

    def content(self) -> LinearOperator:
        """The operator itself, computed now if it was not."""
        with self._lock:
            if self._content is None:
                # Kept for calls in every mode, so not made of inference tensors; gradients never reach a network.
                with torch.inference_mode(False), torch.no_grad():
                    content = self._built()
                if content.shape != self.shape or content.dtype != self.dtype:
                    raise ShapeError(
                        f"{self!r} was built as {content!r} of shape {content.shape}, {content.dtype}; "
                        f"expected {self.shape}, {self.dtype}."
                    )
                self._content = content
        return self._content

    def _built(self) -> LinearOperator:
        """Make the content."""
        assert self.build is not None
        return self.build()

    @property
    def is_symmetric(self) -> bool:
        return self._symmetric if self._content is None else self._symmetric or self._content.is_symmetric

    @property
    def is_psd(self) -> bool:
        return self._psd if self._content is None else self._psd or self._content.is_psd

    def _exact(self, verb_name: str) -> str | None:
        if self._content is not None:
            return self._content._exact(verb_name)
        return f"closed form of {self.kind.__name__}, which is computed first"

    def _has_spectral(self) -> bool:
        return self.is_symmetric if self._content is None else self._content._has_spectral()

    def _spectral(self) -> Eigen:
        return self.content()._spectral()

    def _matmat(self, V: Tensor) -> Tensor:
        return self.content()._apply(V)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return self.content()._rapply(V)

    def _solve(self, B: Tensor) -> Tensor:
        return self.content()._solve(B)

    def _logdet(self) -> Tensor:
        return self.content()._logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self.content()._slogdet()

    def _diagonal(self) -> Tensor:
        return self.content()._diagonal()

    def _trace(self) -> Tensor:
        return self.content()._trace()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self.content()._function(f, V)

    def _power_apply(self, power: float, V: Tensor) -> Tensor:
        return self.content()._power_apply(power, V)

    def _dense(self) -> Tensor:
        return self.content()._dense()

    def _holds_tensors(self) -> bool:
        return True

    def _hadamard_square(self) -> LinearOperator:
        return self.content()._hadamard_square()

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator:
        return self.content().submatrix(rows, columns)

    def _children(self) -> tuple[LinearOperator, ...]:
        # What is computed stays true of the parameters it was computed on, so the network is watched only before.
        return () if self.watch is None or self._content is not None else (self.watch,)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Deferred(
            lambda: self.content()._to(dtype, device),
            self.kind,
            self.shape,
            dtype,
            device,
            label=self.label,
            note=self.note,
            watch=self.watch,
            is_symmetric=self._symmetric,
            is_psd=self._psd,
            lower_bound=self._lower_bound,
            layout=self._layout,
            memory_budget=self.memory_budget,
        )

    def release(self) -> None:
        super().release()
        self._content = None

    def _formula(self) -> Formula:
        if self._content is not None:
            inner = self._content._formula()
            notes = inner.notes if self.note is None else (*inner.notes, self.note)
            return Formula(inner.kind, inner.text, inner.children, notes)
        notes = tuple(filter(None, ("not computed", self.note)))
        return Formula("leaf", f"{self.kind.__name__}({self.label})", notes=notes)

    def _bound_is_free(self) -> bool:
        return self._content is None

    def __reduce__(self) -> Any:
        return _named, (self.content(), self.layout)


def _named(operator: LinearOperator, layout: Layout | None) -> LinearOperator:
    """The content, which has no names of its own, with those of the operator that computed it."""
    if operator.layout is None:
        operator._layout = layout
    return operator
