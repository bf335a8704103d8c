"""What an operator is: its facts, and the hooks that a subclass answers.

A subclass writes `_matmat` (and `_rmatmat` unless it is symmetric), passes its facts to `__init__`, and overrides those
hooks that it can answer better. What users call is in `base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.memory import Need, in_turn, require
from curvops.operators import formula
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from curvops.operators.base import LinearOperator
    from curvops.operators.eigen import Eigen

_T = TypeVar("_T")
Scalar = float | Tensor
Layout = Mapping[str, slice]


def number(value: Scalar) -> float:
    """A float or a 0-dim tensor as a float, outside autograd."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def numbered(device: torch.device | str) -> torch.device:
    """The device as tensors on it name theirs: "cuda" is the current one of several."""
    device = torch.device(device)
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.empty(0, device=device).device


class Structure:
    """Facts, hooks and the machinery that verbs share; the base of `LinearOperator`."""

    _dtype: torch.dtype
    _device: torch.device

    def __init__(
        self,
        shape: tuple[int | None, int | None],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        is_symmetric: bool = False,
        is_psd: bool = False,
        lower_bound: float | None = None,
        layout: Layout | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"{type(self).__name__} of dtype {dtype}: expected torch.float32 or torch.float64.")
        self._shape = (int(shape[0] or 0), int(shape[1] or 0))  # unknown sizes: the subclass overrides `shape`
        self._dtype, self._device = dtype, numbered(device)
        self._symmetric = bool(is_symmetric or is_psd)
        self._psd = bool(is_psd)
        self._lower_bound = lower_bound if lower_bound is not None else (0.0 if is_psd else None)
        self._layout = layout
        self.memory_budget = memory_budget
        self._count = 0
        self._cache: dict[str, Any] = {}

    # ---------------------------------------------------------------- facts

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device."""
        return self._device

    @property
    def is_symmetric(self) -> bool:
        """Whether the matrix is known to be symmetric."""
        return self._symmetric

    @property
    def is_psd(self) -> bool:
        """Whether the matrix is known to be positive semidefinite."""
        return self._psd

    @property
    def lower_bound(self) -> float | None:
        """A proven lower bound on the spectrum; None where there is none."""
        return self._lower_bound

    @property
    def layout(self) -> Layout | None:
        """Where each named parameter lies in a vector; None for operators without names."""
        if self._layout is not None:
            return self._layout
        return next((child.layout for child in self._children() if child.layout is not None), None)

    @property
    def matvec_count(self) -> int:
        """Columns multiplied so far, in either direction."""
        return self._count

    # ---------------------------------------------------------------- hooks: what a subclass must or may answer

    def _matmat(self, V: Tensor) -> Tensor:
        """`A V`, V `(columns, K)`; differentiable in V and in whatever tensors the operator holds."""
        raise UnsupportedError(f"{type(self).__name__} has no product; write `_matmat`.")

    def _rmatmat(self, V: Tensor) -> Tensor:
        """`Aᵀ V`."""
        if self.is_symmetric:
            return self._matmat(V)
        raise UnsupportedError(f"{self!r} is not symmetric and has no transposed product.")

    def _exact(self, verb_name: str) -> str | None:
        """Name of the closed form that answers `verb_name`, or None. Reads facts alone: computes nothing.

        Verbs: solve, logdet, slogdet, diagonal, trace, function, sample, dense.
        """
        return "eigendecomposition" if self._has_spectral() and verb_name != "dense" else None

    def _has_spectral(self) -> bool:
        """Whether `_spectral` can answer; reads facts alone."""
        return False

    def _spectral(self) -> Eigen:
        """The structured eigendecomposition."""
        raise UnsupportedError(f"{self!r} has no structured eigendecomposition.")

    def _solve(self, B: Tensor) -> Tensor:
        return self._spectral()._solve(B)

    def _logdet(self) -> Tensor:
        """Log-determinant by closed form; NotPositiveDefiniteError unless positive definite."""
        return self._spectral()._logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self._spectral()._slogdet()

    def _diagonal(self) -> Tensor:
        return self._spectral()._diagonal()

    def _trace(self) -> Tensor:
        return self._spectral()._trace()

    def _function(self, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return self._spectral()._function(f, V)

    def _inverse_root(self, E: Tensor) -> Tensor:
        """`R E` for some R with `R Rᵀ = A⁻¹`: draws from N(0, A⁻¹) when E is standard normal."""
        return self._spectral()._power(-0.5)._matmat(E)

    def _power_apply(self, power: float, V: Tensor) -> Tensor:
        """`A^p V`, p = ±½, by closed form."""
        return self._spectral()._power(power)._matmat(V)

    def _hadamard_square(self) -> LinearOperator:
        """The matrix with every entry squared."""
        from curvops.operators.dense import Dense

        rows, columns = self.shape
        self._require_memory(rows * columns * self.dtype.itemsize)
        return Dense(self._dense() ** 2)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self._apply(eye)

    def _dense_kept(self) -> Tensor:
        """The dense matrix, which may be one that is kept: not to be written to."""
        return self._dense()

    def _holds_tensors(self) -> bool:
        """Whether the matrix is made of tensors alone, so that a dense copy costs no products with a network."""
        return all(child._holds_tensors() for child in self._children()) if self._children() else False

    def _gram(self) -> LinearOperator | None:
        """`B Bᵀ` of a curvature `A = BᵀB` in function space, or None."""
        return None

    def _weighs_parameters(self) -> bool:
        """Whether `_weighted_gram` answers; may look at a few data."""
        return False

    def _weighted_gram(self, weights: Tensor) -> Tensor | None:
        """Dense `B W Bᵀ` of a curvature `A = BᵀB`, W constant on each parameter of the layout; differentiable in W."""
        return None

    def _factor(self) -> LinearOperator | None:
        """B of `A = BᵀB`, or None."""
        return None

    def _transpose(self) -> LinearOperator:
        from curvops.operators.composites import Transpose

        return Transpose(cast("LinearOperator", self))

    def _scaled(self, factor: Scalar) -> LinearOperator | None:
        """`factor · A` in a form simpler than `Scaled`, or None."""
        return None

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        """`A + other` in a form simpler than `Sum`, or None."""
        return None

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        """`A @ other` in a form simpler than `Product`, or None."""
        return None

    def _inverse(self) -> LinearOperator | None:
        """`A⁻¹` in a form simpler than `Inverse`, or None."""
        return None

    def _submatrix(self, rows: Tensor, columns: Tensor) -> LinearOperator | None:
        """`A[rows][:, columns]` in a form simpler than `Submatrix`, or None."""
        return None

    def _children(self) -> tuple[LinearOperator, ...]:
        """The operators that this one is made of."""
        return ()

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        raise UnsupportedError(f"{self!r} cannot be converted; build it again from converted parts.")

    def _formula(self) -> Formula:
        return Formula("leaf", f"{type(self).__name__}({formula.size_text(self._known_shape())})")

    def _requires_grad(self) -> bool:
        """Whether gradients are asked of a tensor inside the operator (damping, a factor, a matrix)."""
        held = (value.requires_grad for value in vars(self).values() if isinstance(value, Tensor))
        return any(held) or any(child._requires_grad() for child in self._children())

    def _known_shape(self) -> tuple[int | None, int | None]:
        """The shape as far as it is known without computing."""
        return self.shape

    def _bound_is_free(self) -> bool:
        """Whether reading `lower_bound` computes nothing."""
        return all(child._bound_is_free() for child in self._children())

    def _product_need(self, columns: int) -> Need:
        """Memory of one product with so many columns, its result included; reads facts alone.

        By default the parts' products one after the other beside a running result; for tensors a result and a copy.
        """
        known = [size for size in self._known_shape() if size is not None]
        result = columns * max(known, default=0) * self.dtype.itemsize
        parts = self._children()
        return in_turn(part._product_need(columns) for part in parts).beside(result if parts else 2 * result)

    def _dense_need(self) -> Need:
        """Memory of `_dense`, its result included; reads facts alone."""
        rows, columns = self.shape
        parts = self._children()
        matrix = rows * columns * self.dtype.itemsize
        if not parts:
            return Need(matrix) if self._holds_tensors() else self._product_need(columns).beside(matrix)
        return in_turn(part._dense_need() for part in parts).beside(matrix)

    def _explain_dense(self) -> str:
        """What `_dense` does where there is no closed form, in words."""
        return f"products with {self.shape[1]:,} unit columns"

    def _explain_product(self) -> str:
        """What one product does, in words."""
        return f"{type(self).__name__} of tensors" if self._holds_tensors() else f"{type(self).__name__}, matrix-free"

    def _check_content(self) -> None:
        """Compare the content that the operator was built on; only operators that hold a network do."""

    def _keeps_all(self) -> bool:
        """Whether a product runs no network, since all that it needs of it is kept."""
        return False

    # ---------------------------------------------------------------- shared machinery

    def _kept(self, key: str, build: Callable[[], _T], *sources: Tensor) -> _T:
        """What `build` makes of `sources`, kept until one of them is written to.

        Not kept where autograd runs through it: a graph is walked once. Built outside inference mode, whose tensors
        could not take part in a later backward pass.
        """
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return build()
        versions = tuple(None if source.is_inference() else source._version for source in sources)
        kept = self._cache.get(key)
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._cache[key] = (versions, build())
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}, "_count": 0}

    def _apply(self, V: Tensor) -> Tensor:
        """The counted product on columns; what algorithms and other operators call."""
        self._count += V.shape[1]
        return self._matmat(V)

    def _rapply(self, V: Tensor) -> Tensor:
        self._count += V.shape[1]
        return self._rmatmat(V)

    def _watched(self) -> Iterator[LinearOperator]:
        for child in self._children():
            yield from child._watched()

    def _multiply(self, v: Tensor, length: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        result = product(self._columns(v, length))
        return result[:, 0] if v.dim() == 1 else result

    def _columns(self, v: Tensor, length: int) -> Tensor:
        """v as columns `(length, K)`, or a ShapeError that says what would have fitted."""
        if not isinstance(v, Tensor):
            raise ShapeError(
                f"got {type(v).__name__} where {self!r} expects a torch.Tensor; NumPy arrays go through to_scipy()."
            )
        if v.dim() not in (1, 2) or v.shape[0] != length:
            raise ShapeError(
                f"got a vector of shape {tuple(v.shape)}, expected ({length},) or ({length}, K) for {self!r}."
            )
        if v.dtype != self.dtype or v.device != self.device:
            raise ShapeError(
                f"got {v.dtype} on {v.device}, expected {self.dtype} on {self.device} for {self!r}; "
                f"convert the vector with .to(dtype, device), or the operator with .to(...)."
            )
        return v.unsqueeze(1) if v.dim() == 1 else v

    def _require_square(self, verb_name: str) -> None:
        rows, columns = self.shape
        if rows != columns:
            raise ShapeError(f"{verb_name} needs a square operator; {self!r} is {rows} x {columns}.")

    def _require_symmetric(self, verb_name: str) -> None:
        self._require_square(verb_name)
        if not self.is_symmetric:
            raise UnsupportedError(
                f"{verb_name} needs an operator known to be symmetric; {self!r} is not. "
                f"Say so where it is built (is_symmetric=True), or use SciPy's solvers through to_scipy()."
            )

    def _require_memory(self, needed: int) -> None:
        require(
            needed, self.memory_budget, self.device, f"the dense matrix of {self!r}",
            "Stay matrix-free (products, CG, SLQ), take a submatrix, or raise memory_budget.",
        )  # fmt: skip
