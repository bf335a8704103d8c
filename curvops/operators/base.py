"""What users call: the verbs of every operator, the same on each.

Verbs are final: they check shapes once, ask `routes` for a plan, and run it. What a subclass answers is in `structure`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor

from curvops.errors import ConvergenceError, DataError
from curvops.operators import formula
from curvops.operators.structure import Layout, Scalar, Structure, number

if TYPE_CHECKING:
    from linear_operator import LinearOperator as GPyTorchOperator
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from curvops.linalg.spectrum import Spectrum
    from curvops.operators.methods import Method

__all__ = ["Layout", "LinearOperator", "Scalar", "number", "verb"]

_F = TypeVar("_F", bound=Callable[..., Any])


def verb(function: _F) -> _F:
    """Mark a public verb: networks inside the operator are checked for change when it starts and when it ends."""

    return _guarded(function, twice=True)


def product(function: _F) -> _F:
    """Mark a verb of one pass: what multiplies with what it keeps runs no network, and is checked once, at the end."""
    return _guarded(function, twice=False)


def _guarded(function: _F, *, twice: bool) -> _F:
    @functools.wraps(function)
    def guarded(self: LinearOperator, *args: Any, **kwargs: Any) -> Any:
        watched = list(dict.fromkeys(self._watched()))  # the blocks of one curvature share a network
        for operator in watched:
            if twice or not operator._keeps_all():
                operator._check_content()
        answer = function(self, *args, **kwargs)
        for operator in watched:
            operator._check_content()
        return answer

    return cast(_F, guarded)


class LinearOperator(Structure):
    """A matrix known by what it does to vectors; nothing is materialised before someone asks.

    Attributes:
        dtype: Element type of vectors in and out (float32 or float64).
        device: Device of vectors in and out.
        is_symmetric: Whether the matrix is known to be symmetric.
        is_psd: Whether it is known to be positive semidefinite.
        lower_bound: A proven lower bound on the spectrum, or None.
        memory_budget: Peak bytes a verb may take; None for half of what is free.
    """

    # ---------------------------------------------------------------- products

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @product
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

    @product
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

    @product
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
        return _of_columns(solve.plan(self, method, B.shape[1]).started(self, "solve"), B, b, return_report)

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
        value, report = logdet.plan(self, method).started(self, "logdet")()
        return _answer(value, report, return_report)

    @verb
    def slogdet(self) -> tuple[Tensor, Tensor]:
        """`(sign, log |det A|)` by an exact route; 0 and −inf for a singular matrix."""
        from curvops.operators.routes import logdet

        self._require_square("slogdet")
        return logdet.plan_signed(self).started(self, "slogdet")()

    @verb
    def trace(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """Sum of the diagonal; exact where structure or size allow, otherwise estimated to 1 %."""
        from curvops.operators.routes import trace

        self._require_square("trace")
        value, report = trace.plan(self, method).started(self, "trace")()
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
        value, report = blocktraces.plan(self, blocks, method).started(self, "block_traces")()
        return _answer(value, report, return_report)

    @verb
    def diagonal(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """The diagonal `(P,)`; exact where structure or size allow, otherwise estimated to 5 % in the 2-norm."""
        from curvops.operators.routes import diagonal

        self._require_square("diagonal")
        value, report = diagonal.plan(self, method).started(self, "diagonal")()
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
        method: Method | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Spectrum:
        """Quadrature nodes and weights of the spectral density, one Lanczos run serving every later question.

        Args:
            probes: Random start vectors.
            steps: Lanczos steps per probe; `probes · steps` products.
            method: None; `FunctionSpace` to multiply with the Gram matrix of a curvature instead, which is made once;
                `Eigh` for all eigenvalues, exactly.
        """
        from curvops.operators.routes import spectrum

        self._require_symmetric("spectrum")
        plan = spectrum.plan(self, probes, steps, method, generator=generator, progress=progress)
        return plan.started(self, "spectrum")()

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
        V = self._columns(v, self.shape[1])
        return _of_columns(function.plan(self, f, method, V.shape[1]).started(self, "function"), V, v, return_report)

    @verb
    def frobenius_norm(self, method: Method | None = None, *, return_report: bool = False) -> Any:
        """`‖A‖_F`; exact where a dense matrix is affordable, otherwise estimated to 1 %."""
        from curvops.operators.routes import norms

        value, report = norms.frobenius(self, method).started(self, "frobenius_norm")()
        return _answer(value, report, return_report)

    @verb
    def spectral_norm(self, *, rtol: float = 1e-3, return_report: bool = False) -> Any:
        """`‖A‖₂`, the largest singular value, with a bracket in the report."""
        from curvops.operators.routes import norms

        value, report = norms.spectral(self, rtol).started(self, "spectral_norm")()
        return _answer(value, report, return_report)

    @verb
    def to_dense(self) -> Tensor:
        """The matrix: the one road to a P x P tensor.

        Raises:
            MemoryBudgetError: The tensor and what makes it would not fit into the memory budget.
        """
        self._require_memory(self._dense_need().peak)
        return self._dense()

    # ---------------------------------------------------------------- doors

    def to_scipy(self) -> ScipyOperator:
        """A `scipy.sparse.linalg.LinearOperator` of the operator's NumPy dtype, on CPU arrays."""
        from curvops.linalg.scipy import to_scipy

        return to_scipy(self.matmat, self.rmatmat, self.shape, self.dtype, self.device)

    def to_linear_operator(self, *, solve: Method | None = None, logdet: Method | None = None) -> GPyTorchOperator:
        """A `linear_operator.LinearOperator`, for GPyTorch; its verbs are answered by this operator's.

        Args:
            solve: How its solves are answered (`CG(rtol=1e-8)`, …); None to choose.
            logdet: How its log-determinants are answered; None to choose.
        """
        from curvops.operators.doors import through

        return through("linear_operator", self, solve=solve, logdet=logdet)

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

    def _power_matvec(self, power: float, v: Tensor, method: Method | None, return_report: bool) -> Any:
        from curvops.operators.routes import function

        name = "sqrt_matvec" if power > 0 else "inv_sqrt_matvec"
        self._require_symmetric(name)
        V = self._columns(v, self.shape[1])
        plan = function.plan_power(self, power, method, columns=V.shape[1])
        return _of_columns(plan.started(self, name), V, v, return_report)


def _of_columns(run: Callable[[Tensor], Any], V: Tensor, v: Tensor, return_report: bool) -> Any:
    """What `run` makes of the columns V, in the shape that v came in; the best value that an error carries too."""
    try:
        X, report = run(V)
    except ConvergenceError as error:
        if v.dim() == 1 and isinstance(error.value, Tensor) and error.value.dim() == 2:
            error.value = error.value[:, 0]
        raise
    return _answer(X[:, 0] if v.dim() == 1 else X, report, return_report)


def _answer(value: Any, report: Any, return_report: bool) -> Any:
    return (value, report) if return_report else value
