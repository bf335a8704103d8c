"""The contract of every operator: facts, verbs, and the hooks that a subclass answers.

A subclass writes `_matmat` (and `_rmatmat` unless it is symmetric), passes its facts to `__init__`, and overrides those
hooks that it can answer better. Verbs are final: they check shapes once, ask `routes` for a plan, and run it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor

from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.memory import require
from curvops.operators import formula
from curvops.operators.formula import Formula

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from curvops.linalg.spectrum import Spectrum
    from curvops.operators.eigen import Eigen
    from curvops.operators.methods import Method

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
Scalar = float | Tensor
Layout = Mapping[str, slice]


def number(value: Scalar) -> float:
    """A float or a 0-dim tensor as a float, outside autograd."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def verb(function: _F) -> _F:
    """Mark a public verb: networks inside the operator are checked for change when it starts and when it ends."""

    @functools.wraps(function)
    def guarded(self: LinearOperator, *args: Any, **kwargs: Any) -> Any:
        watched = list(self._watched())
        for operator in watched:
            operator._check_content()
        answer = function(self, *args, **kwargs)
        for operator in watched:
            operator._check_content()
        return answer

    return cast(_F, guarded)


class LinearOperator:
    """A matrix known by what it does to vectors; nothing is materialised before someone asks.

    Attributes:
        dtype: Element type of vectors in and out (float32 or float64).
        device: Device of vectors in and out.
        is_symmetric: Whether the matrix is known to be symmetric.
        is_psd: Whether it is known to be positive semidefinite.
        lower_bound: A proven lower bound on the spectrum, or None.
        memory_budget: Peak bytes a verb may take; None for half of what is free.
    """

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
        self._dtype, self._device = dtype, torch.device(device)
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

    # ---------------------------------------------------------------- products

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @verb
    def __matmul__(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        if isinstance(other, LinearOperator):
            from curvops.operators.arithmetic import multiply

            return multiply(self, other)
        return self._multiply(other, self.shape[1], self._apply)

    def matvec(self, v: Tensor) -> Tensor:
        """`A v` for v `(P,)` or `(P, K)`; the result has as many columns."""
        return self @ v

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for V `(P, K)` or `(P,)`."""
        return self @ V

    @verb
    def rmatvec(self, v: Tensor) -> Tensor:
        """`Aᵀ v` for v of as many entries as A has rows, `(rows,)` or `(rows, K)`."""
        return self._multiply(v, self.shape[0], self._rapply)

    def rmatmat(self, V: Tensor) -> Tensor:
        """`Aᵀ V`."""
        return self.rmatvec(V)

    @property
    def T(self) -> LinearOperator:
        """The transpose; a symmetric operator is its own."""
        return self if self.is_symmetric else self._transpose()

    @verb
    def quadratic_form(self, v: Tensor) -> Tensor:
        """`vᵀ A v`: 0-dim for `(P,)`, `(K,)` for `(P, K)`."""
        self._require_square("quadratic_form")
        return (v * self._multiply(v, self.shape[1], self._apply)).sum(0)

    # ---------------------------------------------------------------- algebra

    def add_diagonal(self, delta: Scalar | Tensor | Mapping[str, Scalar | Tensor]) -> LinearOperator:
        """`A + diag(δ)`, structure kept.

        Args:
            delta: A scalar, a `(P,)` tensor, or a dict from every parameter name to a scalar or a tensor.
        """
        from curvops.operators.diagonal import damping

        self._require_square("add_diagonal")
        return self + damping(delta, self)

    def __radd__(self, other: object) -> LinearOperator:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # what the built-in sum() starts with

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from curvops.operators.arithmetic import add

        return add(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: Scalar) -> LinearOperator:
        from curvops.operators.arithmetic import scale

        if isinstance(factor, Real) and not isinstance(factor, bool):
            factor = float(factor)
        return scale(factor, self) if isinstance(factor, float | Tensor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: Scalar) -> LinearOperator:
        return self * (1.0 / factor)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def submatrix(self, rows: Tensor, columns: Tensor | None = None) -> LinearOperator:
        """`A[rows][:, columns]` for index tensors; a principal submatrix when `columns` is left out."""
        from curvops.operators.submatrix import select

        return select(self, rows, rows if columns is None else columns)

    def inverse(self) -> LinearOperator:
        """`A⁻¹` as an operator; its products are solves."""
        from curvops.operators.inverse import invert

        self._require_square("inverse")
        return invert(self)

    # ---------------------------------------------------------------- answers

    @verb
    def solve(self, b: Tensor, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`A⁻¹ b` for b `(P,)` or `(P, K)`; for a singular PSD operator the consistent minimum-norm solution.

        Args:
            b: Right-hand side or sides.
            method: An algorithm value (`CG`, `MINRES`, `Cholesky`, `Eigh`, `LU`, `FunctionSpace`); None to choose.
            return_report: Return `(x, SolveReport)`; its `residual` is the true relative one per column.

        Raises:
            ConvergenceError: The target was not reached; carries the best x and the report.
            NotPositiveDefiniteError: The method needs definiteness, and a direction of negative curvature was met.
        """
        from curvops.operators.routes import solve

        self._require_square("solve")
        B = self._columns(b, self.shape[0])
        if not bool(torch.isfinite(B.detach()).all()):
            raise DataError(f"solve: the right-hand side holds NaN or Inf; expected finite numbers for {self!r}.")
        X, report = solve.plan(self, method).run(B)
        return _answer(X[:, 0] if b.dim() == 1 else X, report, return_report)

    @verb
    def logdet(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`log det A` of a positive definite operator, a 0-dim tensor (float64 for estimated routes).

        Args:
            method: `Cholesky`, `Eigh`, `FunctionSpace` or `SLQ`; None to choose.
            return_report: Return `(value, EstimateReport)`.

        Raises:
            NotPositiveDefiniteError: Definiteness is not known and no factorisation could establish it.
            ConvergenceError: The half-width target of the stochastic route was not met.
        """
        from curvops.operators.routes import logdet

        self._require_square("logdet")
        value, report = logdet.plan(self, method).run()
        return _answer(value, report, return_report)

    @verb
    def slogdet(self) -> tuple[Tensor, Tensor]:
        """`(sign, log |det A|)` by an exact route; 0 and −inf for a singular matrix."""
        from curvops.operators.routes import logdet

        self._require_square("slogdet")
        return logdet.plan_signed(self).run()

    @verb
    def trace(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """Sum of the diagonal; exact where structure or size allow, otherwise estimated to 1 %."""
        from curvops.operators.routes import trace

        self._require_square("trace")
        value, report = trace.plan(self, method).run()
        return _answer(value, report, return_report)

    @verb
    def block_traces(
        self,
        blocks: Mapping[str, slice | Tensor] | None = None,
        method: Method | None = None,
        *,
        return_report: bool = False,
    ) -> Any:
        """Trace of each diagonal block as a dict, all from one run; by default one block per parameter.

        Args:
            blocks: Name → slice or indices of the block's entries; None for the operator's named parameters.
            method: `Hutchinson`; None for the exact diagonal where structure or size allow, otherwise an estimate whose
                half-widths are 1 % of the larger of the block's own trace and the mean block's.
            return_report: Return `(traces, EstimateReport)`; its numbers are tensors in the blocks' order.
        """
        from curvops.operators.routes import blocktraces

        self._require_square("block_traces")
        return _answer(*blocktraces.plan(self, blocks, method).run(), return_report)

    @verb
    def diagonal(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """The diagonal `(P,)`; exact where structure or size allow, otherwise estimated to 5 % in the 2-norm."""
        from curvops.operators.routes import diagonal

        self._require_square("diagonal")
        value, report = diagonal.plan(self, method).run()
        return _answer(value, report, return_report)

    @verb
    def eigsh(
        self,
        k: int = 6,
        which: str | None = None,
        sigma: float | None = None,
        *,
        rtol: float = 0.0,
        max_iters: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        on_failure: Any = "raise",
        return_report: bool = False,
    ) -> Any:
        """k eigenpairs of a symmetric operator as `Eigenpairs(values ascending, vectors (P, k), residuals)`.

        Args:
            k: How many.
            which: "LA", "SA", "LM", "SM" or "BE", as in `scipy.sparse.linalg.eigsh`; "LA" by default, "LM" with sigma.
            sigma: Eigenvalues nearest to it, by shift-invert through `solve`.
            rtol: ARPACK's tolerance, 0 for machine precision.
            max_iters: ARPACK's restarts at most.
            generator: Source of the start vector; seed 0 by default.
            on_failure: "raise", or "warn" to take the pairs found.

        Cost: about `2k` products a restart; residuals ‖Av − λv‖ are recomputed, copies of multiple eigenvalues found.
        """
        from curvops.operators.routes import eigenpairs

        self._require_symmetric("eigsh")
        pairs, report = eigenpairs.eigsh(
            self, k, which=which, sigma=sigma, rtol=rtol, max_iters=max_iters, generator=generator,
            progress=progress, on_failure=on_failure,
        )  # fmt: skip
        return _answer(pairs, report, return_report)

    @verb
    def spectrum(
        self,
        probes: int = 10,
        steps: int = 64,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Spectrum:
        """Quadrature nodes and weights of the spectral density, one Lanczos run serving every later question.

        Args:
            probes: Random start vectors.
            steps: Lanczos steps per probe; `probes · steps` products.
        """
        from curvops.operators.routes import spectrum

        self._require_symmetric("spectrum")
        return spectrum.spectrum(self, probes, steps, generator=generator, progress=progress)

    @verb
    def sqrt_matvec(self, v: Tensor, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`A^½ v` with the symmetric root of a positive semidefinite operator."""
        return self._power_matvec(0.5, v, method, return_report)

    @verb
    def inv_sqrt_matvec(self, v: Tensor, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`A^-½ v` with the symmetric root of a positive definite operator."""
        return self._power_matvec(-0.5, v, method, return_report)

    @verb
    def function(
        self, f: Callable[[Tensor], Tensor], v: Tensor, method: Method | None = None, *, return_report: bool = False
    ) -> Any:
        """`f(A) v` for a symmetric operator and an elementwise f of the eigenvalues."""
        from curvops.operators.routes import function

        self._require_symmetric("function")
        X, report = function.plan(self, f, method).run(self._columns(v, self.shape[1]))
        return _answer(X[:, 0] if v.dim() == 1 else X, report, return_report)

    @verb
    def frobenius_norm(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`‖A‖_F`; exact where a dense matrix is affordable, otherwise estimated to 1 %."""
        from curvops.operators.routes import norms

        value, report = norms.frobenius(self, method).run()
        return _answer(value, report, return_report)

    @verb
    def spectral_norm(self, *, rtol: float = 1e-3, return_report: bool = False) -> Any:
        """`‖A‖₂`, the largest singular value, with a bracket in the report."""
        from curvops.operators.routes import norms

        value, report = norms.spectral(self, rtol).run()
        return _answer(value, report, return_report)

    @verb
    def to_dense(self) -> Tensor:
        """The matrix: the one road to a P x P tensor.

        Raises:
            MemoryBudgetError: When the tensor would not fit into the memory budget.
        """
        rows, columns = self.shape
        self._require_memory(rows * columns * self.dtype.itemsize)
        return self._dense()

    # ---------------------------------------------------------------- doors

    def to_scipy(self) -> ScipyOperator:
        """A `scipy.sparse.linalg.LinearOperator` of the operator's NumPy dtype, on CPU arrays."""
        from curvops.linalg.scipy import to_scipy

        return to_scipy(self.matmat, self.rmatmat, self.shape, self.dtype, self.device)

    def to(self, target: torch.dtype | torch.device | str) -> LinearOperator:
        """The operator in another dtype or on another device, on a private copy; the original stays as it was."""
        if isinstance(target, torch.dtype):
            return self._to(target, self.device)
        return self._to(self.dtype, torch.device(target))

    def release(self) -> None:
        """Drop whatever was computed and kept; it is computed again when needed."""
        self._cache.clear()
        for child in self._children():
            child.release()

    # ---------------------------------------------------------------- words

    def __repr__(self) -> str:
        return formula.line(self._formula())

    def describe(self) -> str:
        """The structure as a tree, with what is not computed yet and which library computes what."""
        facts = ["symmetric" if self.is_symmetric else "", "positive semidefinite" if self.is_psd else ""]
        if self._bound_is_free() and self.lower_bound is not None:
            facts.append(f"spectrum >= {formula.scalar_text(self.lower_bound)}")
        size = formula.times_text(self._known_shape())
        head = ", ".join([size, formula.dtype_text(self.dtype), str(self.device), *filter(None, facts)])
        return f"{head}\n{formula.tree(self._formula())}"

    def explain(self, verb_name: str) -> str:
        """Which algorithm would answer a verb, and why; computes nothing."""
        from curvops.operators.routes import explain

        return explain(self, verb_name)

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

        return Dense(self.to_dense() ** 2)

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self._apply(eye)

    def _holds_tensors(self) -> bool:
        """Whether the matrix is made of tensors alone, so that a dense copy costs no products with a network."""
        return all(child._holds_tensors() for child in self._children()) if self._children() else False

    def _gram(self) -> LinearOperator | None:
        """`B Bᵀ` of a curvature `A = BᵀB` in function space, or None."""
        return None

    def _factor(self) -> LinearOperator | None:
        """B of `A = BᵀB`, or None."""
        return None

    def _transpose(self) -> LinearOperator:
        from curvops.operators.arithmetic import Transpose

        return Transpose(self)

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

    def _explain_product(self) -> str:
        """What one product does, in words."""
        return f"{type(self).__name__} of tensors" if self._holds_tensors() else f"{type(self).__name__}, matrix-free"

    def _check_content(self) -> None:
        """Compare the content that the operator was built on; only operators that hold a network do."""

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

    def _power_matvec(self, power: float, v: Tensor, method: Method | None, return_report: bool) -> Any:
        from curvops.operators.routes import function

        self._require_symmetric("sqrt_matvec" if power > 0 else "inv_sqrt_matvec")
        X, report = function.plan_power(self, power, method).run(self._columns(v, self.shape[1]))
        return _answer(X[:, 0] if v.dim() == 1 else X, report, return_report)

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


def _answer(value: Any, report: Any, return_report: bool) -> Any:
    return (value, report) if return_report else value
