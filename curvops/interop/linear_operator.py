"""The door to linear_operator, the algebra under GPyTorch.

`A.to_linear_operator()` is a `linear_operator.LinearOperator` whose products, solves, log-determinants and roots are
A's own verbs: certified by the true residual or carrying an error bar, where linear_operator's CG stops at a tolerance
of 1. Sums with diagonals, matrices and scalar factors stay on this side of the door, so that δ added there is δ here.

    >>> import torch, curvops as co
    >>> A = co.Kronecker(torch.eye(30).double() + 1, torch.eye(20).double() + 1).to_linear_operator()
    >>> noise = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> damped = A.add_diagonal(noise)
    >>> damped
    CurvatureLinearOperator(Kronecker(30×20) + 0.5·I)
    >>> damped.logdet().backward()
    >>> bool(torch.isclose(noise.grad, torch.linalg.inv(damped.to_dense()).trace()))
    True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from linear_operator import LinearOperator as Theirs
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, RootLinearOperator
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.interop.entries import Verb, entries, exact_diagonal, folded, places, root
from curvops.interop.linear_operator_twins import convert, from_linear_operator, structured
from curvops.interop.tensors import swapped, tensors_of
from curvops.operators import Dense, LinearOperator
from curvops.operators.methods import Method

__all__ = ["CurvatureLinearOperator", "from_linear_operator"]


class CurvatureLinearOperator(Theirs):
    """One operator, or a batch made of several, as linear_operator expects it.

    linear_operator rebuilds an operator from its tensors at every autograd call. The tensors here are those of the
    algebra: δ, scalar factors, dense matrices, Kronecker factors. Gradients reach them and right-hand sides, through
    products, solves, log-determinants and dense roots; the parameters of a network are not among them.

    Args:
        index: Which of `operators` stands at each place of the batch, int64 of the batch's shape (0-dim: no batch).
            Expanding a batch copies nothing, and equal neighbours share one product.
        tensors: The floating-point tensors that the operators are made of, in the order of `tensors_of`; they take the
            places of those inside.
        operators: The different operators, of one shape, dtype and device.
        solve: How solves are answered; None to choose.
        logdet: How log-determinants are answered; None to choose.

    Differences from linear_operator: `diagonal` and indexing are exact, by one product per column that is asked for
    where the structure does not tell; nothing is remembered between calls, so that a stale network is noticed; negative
    eigenvalues are not clamped; `to` converts a private copy. Samples use torch's global generator, as GPyTorch's do.
    With one of theirs on the left (`D + A`) the sum is theirs, and so are its solves: write `A + D`.
    """

    def __init__(
        self,
        index: Tensor,
        *tensors: Tensor,
        operators: Sequence[LinearOperator],
        solve: Method | None = None,
        logdet: Method | None = None,
    ) -> None:
        super().__init__(index, *tensors, operators=tuple(operators), solve=solve, logdet=logdet)
        inside = tensors_of(operators)
        swap = {id(old): new for old, new in zip(inside, tensors, strict=True) if old is not new}
        self.index = index
        self.operators = [swapped(operator, swap) for operator in operators] if swap else list(operators)
        self.methods: dict[str, Method | None] = {"solve": solve, "logdet": logdet}

    @classmethod
    def of(cls, *operators: LinearOperator, index: Tensor | None = None, **methods: Method | None):
        """One operator, or a batch of them laid out by `index`; those that it does not name are left out."""
        places = torch.zeros((), dtype=torch.int64, device=operators[0].device) if index is None else index
        if len(operators) > 1:
            used, places = places.unique(return_inverse=True)
            operators = tuple(operators[i] for i in used.tolist())
        return cls(places, *tensors_of(operators), operators=operators, **methods)

    def _of(self, *operators: LinearOperator, index: Tensor | None = None) -> CurvatureLinearOperator:
        """Other operators (in the same places, unless told), answered by the same methods."""
        return self.of(*operators, index=self.index if index is None else index, **self.methods)

    # ---------------------------------------------------------------- facts

    @property
    def operator(self) -> LinearOperator:
        """The operator behind the door.

        Raises:
            UnsupportedError: There are several in this batch.
        """
        if len(self.operators) > 1:
            raise UnsupportedError(f"{self!r} is a batch of {len(self.operators)} operators; index its batch first.")
        return self.operators[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.operators[0].dtype

    @property
    def device(self) -> torch.device:
        return self.operators[0].device

    def _size(self) -> torch.Size:
        return torch.Size((*self.index.shape, *self.operators[0].shape))

    def __repr__(self) -> str:
        batch = f", batch={tuple(self.index.shape)}" if self.index.dim() else ""
        return f"CurvatureLinearOperator({', '.join(map(repr, self.operators))}{batch})"

    # ---------------------------------------------------------------- products

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._through(rhs, LinearOperator.__matmul__)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self._through(rhs, LinearOperator.rmatvec)

    def matmul(self, other: Any) -> Any:
        """`A @ other` for a tensor (batches broadcast) or an operator."""
        if isinstance(other, Tensor):
            return self._matmul(other)
        other_here = self._here(other)
        return super().matmul(other) if other_here is None else self._paired(other_here, lambda A, B: A @ B)

    def rmatmul(self, other: Any) -> Any:
        """`other @ A`, by transposed products, so that a gradient reaches each entry of a matrix inside."""
        if not isinstance(other, Tensor):
            return super().rmatmul(other)
        return self._t_matmul(other) if other.dim() == 1 else self._t_matmul(other.mT).mT

    def _through(self, rhs: Tensor, verb: Verb) -> Tensor:
        """`verb(operator, columns)` over the broadcast batch; every different operator is asked once."""
        if rhs.dim() == 1:
            return self._through(rhs[:, None], verb).squeeze(-1)
        batch = torch.broadcast_shapes(self.index.shape, rhs.shape[:-2])
        if len(self.operators) == 1:
            result = folded(self.operators[0], rhs, verb)
            return result.expand((*batch, *result.shape[-2:]))
        flat = rhs.expand(*batch, *rhs.shape[-2:]).reshape(-1, *rhs.shape[-2:])
        index = self.index.expand(batch).reshape(-1)
        where = [(index == i).nonzero()[:, 0] for i in range(len(self.operators))]
        parts = [folded(A, flat[place], verb) for A, place in zip(self.operators, where, strict=True) if len(place)]
        ordered = torch.cat(parts)[torch.cat(where).argsort()]
        return ordered.reshape(*batch, *ordered.shape[-2:])

    def _stacked(self, value: Callable[[LinearOperator], Tensor]) -> Tensor:
        """`value(operator)` at every place of the batch; every different operator is asked once."""
        if len(self.operators) == 1:
            result = value(self.operators[0])
            return result.expand((*self.index.shape, *result.shape))
        return torch.stack([value(operator) for operator in self.operators])[self.index]

    # ---------------------------------------------------------------- entries

    def to_dense(self) -> Tensor:
        """The matrix or matrices; a MemoryBudgetError where they do not fit."""
        return self._stacked(LinearOperator.to_dense)

    def _diagonal(self) -> Tensor:
        return self._stacked(exact_diagonal)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Theirs:
        index = self.index[batch_indices] if batch_indices else self.index
        rows, columns = (
            places(i, n, self.device) for i, n in zip((row_index, col_index), self.shape[-2:], strict=True)
        )
        if rows is None and columns is None:
            return self._of(*self.operators, index=index)
        every_row, every_column = (torch.arange(n, device=self.device) for n in self.shape[-2:])
        rows, columns = every_row if rows is None else rows, every_column if columns is None else columns
        if any(part.dim() != 1 or not len(part) or len(part.unique()) != len(part) for part in (rows, columns)):
            return super()._getitem(row_index, col_index, *batch_indices)  # repeated rows: theirs, on our products
        return self._of(*(A.submatrix(rows, columns) for A in self.operators), index=index)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        index = self.index[batch_indices] if batch_indices else self.index
        shape = torch.broadcast_shapes(index.shape, row_index.shape, col_index.shape)
        index, rows, columns = index.expand(shape), row_index.expand(shape), col_index.expand(shape)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for i, operator in enumerate(self.operators):
            here = index == i
            result = result.masked_scatter(here, entries(operator, rows[here], columns[here]))
        return result

    # ---------------------------------------------------------------- algebra, which stays on this side

    def add_diagonal(self, diag: Tensor) -> CurvatureLinearOperator:
        """`A + diag(d)` for d `()`, `(1,)`, `(N,)`, or those with the batch's shape in front; structure kept."""
        target = (*self.index.shape, 1 if diag.shape[-1:] in ((), (1,)) else self.shape[-1])
        if not self.is_square or not _expands(diag.shape, target):
            raise ShapeError(
                f"add_diagonal: got a diagonal of shape {tuple(diag.shape)} for shape {tuple(self.shape)}; expected "
                f"(), (1,), (N,), or those with the batch {tuple(self.index.shape)} in front, for square operators."
            )
        if diag.dim() < 2:
            delta = diag.reshape(()) if target[-1] == 1 else diag
            return self._of(*(operator.add_diagonal(delta) for operator in self.operators))
        places = self.index.reshape(-1).tolist()
        deltas = diag.expand(target).reshape(-1, target[-1]).unbind()
        damped = (
            self.operators[i].add_diagonal(delta.squeeze(0) if target[-1] == 1 else delta)
            for i, delta in zip(places, deltas, strict=True)
        )
        return self._of(*damped, index=torch.arange(len(places), device=self.device).reshape(self.index.shape))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other == 0:
            return self
        if isinstance(other, DiagLinearOperator):
            constant = getattr(other, "diag_values", None)  # of a multiple of the identity
            here = self._expand_batch(torch.broadcast_shapes(self.index.shape, other.batch_shape))
            return here.add_diagonal(other._diagonal() if constant is None else constant)
        other_here = self._here(other)
        return super().__add__(other) if other_here is None else self._paired(other_here, add)

    def _mul_constant(self, other: float | Tensor) -> CurvatureLinearOperator:
        if not isinstance(other, Tensor) or other.dim() == 0:
            return self._of(*(other * operator for operator in self.operators))
        batch = torch.broadcast_shapes(self.index.shape, other.shape)
        places, factors = self.index.expand(batch).reshape(-1).tolist(), other.expand(batch).reshape(-1).unbind()
        scaled = (factor * self.operators[i] for i, factor in zip(places, factors, strict=True))
        return self._of(*scaled, index=torch.arange(len(places), device=self.device).reshape(batch))

    def inverse(self) -> CurvatureLinearOperator:
        """`A⁻¹`, whose products are solves."""
        return self._of(*(operator.inverse() for operator in self.operators))

    def _transpose_nonbatch(self) -> CurvatureLinearOperator:
        return self._of(*(operator.T for operator in self.operators))

    def _here(self, other: Any) -> CurvatureLinearOperator | None:
        """`other` as one of ours, where nothing of its structure or of its gradients is lost by that."""
        if isinstance(other, CurvatureLinearOperator):
            return other
        if isinstance(other, Tensor):
            other = DenseLinearOperator(other)
        if isinstance(other, DenseLinearOperator):
            matrices = other.tensor.reshape(-1, *other.shape[-2:]).unbind()
            index = torch.arange(len(matrices), device=self.device).reshape(other.batch_shape)
            return self._of(*map(Dense, matrices), index=index)
        single = None if other.batch_shape else structured(other)
        return None if single is None else self._of(single, index=torch.zeros_like(self.index))

    def _paired(self, other: CurvatureLinearOperator, combine: Any) -> CurvatureLinearOperator:
        """`combine(A, B)` over the broadcast batch, once for every different pair."""
        mine, theirs = torch.broadcast_tensors(self.index, other.index)
        pairs, index = torch.stack([mine.reshape(-1), theirs.reshape(-1)], 1).unique(dim=0, return_inverse=True)
        combined = (combine(self.operators[i], other.operators[j]) for i, j in pairs.tolist())
        return self._of(*combined, index=index.reshape(mine.shape))

    # ---------------------------------------------------------------- batches: arithmetic of the index

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> CurvatureLinearOperator:
        return self._of(*self.operators, index=self.index.expand(tuple(batch_shape)))

    def _permute_batch(self, *dims: int) -> CurvatureLinearOperator:
        return self._of(*self.operators, index=self.index.permute(dims))

    def _unsqueeze_batch(self, dim: int) -> CurvatureLinearOperator:
        return self._of(*self.operators, index=self.index.unsqueeze(dim))

    def repeat(self, *sizes: Any) -> CurvatureLinearOperator:
        """Copies along the batch; the two last sizes must be 1."""
        sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if tuple(sizes[-2:]) != (1, 1):
            raise ShapeError(f"repeat{tuple(sizes)}: only batches repeat; expected (…, 1, 1).")
        return self._of(*self.operators, index=self.index.repeat(*sizes[:-2]) if sizes[:-2] else self.index)

    def _sum_batch(self, dim: int) -> CurvatureLinearOperator:
        rows = self.index.movedim(dim, -1)
        sums = [reduce(add, (self.operators[i] for i in row)) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
        return self._of(*sums, index=torch.arange(len(sums), device=self.device).reshape(rows.shape[:-1]))

    # ---------------------------------------------------------------- answers

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """`A⁻¹ R`, or `L A⁻¹ R`, by the operator's certified `solve`."""
        method = self.methods["solve"]
        X = self._through(right_tensor, lambda A, B: A.solve(B, method))
        return X if left_tensor is None else left_tensor @ X

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        return super()._solve(rhs, preconditioner, num_tridiag) if num_tridiag else self.solve(rhs)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """`tr RᵀA⁻¹R`, or the diagonal of it for every column."""
        R = inv_quad_rhs[:, None] if inv_quad_rhs.dim() == 1 else inv_quad_rhs
        terms = (R * self.solve(R)).sum(-2)
        return terms.sum(-1) if reduce_inv_quad else terms

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor, Tensor]:
        """`(tr RᵀA⁻¹R, log det A)`, zeros for what was not asked."""
        if inv_quad_rhs is None and not logdet:
            raise ShapeError("inv_quad_logdet: asked for nothing; give inv_quad_rhs=, or logdet=True.")
        zeros = torch.zeros(self.index.shape, dtype=self.dtype, device=self.device)
        quadratic = zeros if inv_quad_rhs is None else self.inv_quad(inv_quad_rhs, bool(reduce_inv_quad))
        method = self.methods["logdet"]
        return quadratic, self._stacked(lambda A: A.logdet(method).to(A.dtype)) if logdet else zeros

    def sqrt_inv_matmul(self, rhs: Tensor, lhs: Tensor | None = None) -> Any:
        """`A^-½ R`; with L the pair of `L A^-½ R` and the diagonal of `L A⁻¹ Lᵀ`."""
        X = self._through(rhs, LinearOperator.inv_sqrt_matvec)
        return X if lhs is None else (lhs @ X, self.inv_quad(lhs.mT, reduce_inv_quad=False))

    def root_decomposition(self, method: str | None = None) -> Theirs:
        """R with `R Rᵀ = A`, square: a Cholesky factor where a dense matrix is affordable, else the symmetric root.

        Args:
            method: One of linear_operator's own (they drop all but the leading 100 eigenvalues); None for the above.
        """
        if method is not None:
            return super().root_decomposition(method)
        return RootLinearOperator(self._of(*map(root, self.operators)))

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draws from N(0, A), `(num_samples, *batch, N)`, as `A^½ ε`; ε from torch's global generator."""
        noise = torch.randn(*self.shape[:-1], num_samples, dtype=self.dtype, device=self.device)
        return self._through(noise, LinearOperator.sqrt_matvec).movedim(-1, 0).contiguous()

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, Theirs | None]:
        """All eigenvalues and eigenvectors, dense, unless linear_operator's "lanczos" is asked for."""
        return super().diagonalization("symeig" if method is None else method)

    def _symeig(
        self, eigenvectors: bool = False, return_evals_as_lazy: bool | None = False
    ) -> tuple[Tensor, Theirs | None]:
        values, vectors = torch.linalg.eigh(self.to_dense())
        return values, DenseLinearOperator(vectors) if eigenvectors else None

    # ---------------------------------------------------------------- copies

    def to(self, *args: Any, **kwargs: Any) -> CurvatureLinearOperator:
        """Another dtype or device, as `Tensor.to`, on a private copy: a network inside stays as it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        device, dtype = self.device if device is None else device, self.dtype if dtype is None else dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        moved = [operator.to(dtype).to(device) for operator in self.operators]
        return self._of(*moved, index=self.index.to(device))

    def type(self, dtype: torch.dtype) -> CurvatureLinearOperator:
        """Another dtype, float32 or float64."""
        return self.to(dtype)

    def cpu(self) -> CurvatureLinearOperator:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self, device_id: int | None = None) -> CurvatureLinearOperator:
        """On a CUDA device."""
        return self.to("cuda" if device_id is None else f"cuda:{device_id}")


def _expands(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of one shape expands to another."""
    try:
        return torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        return False


@convert.register
def _(operator: CurvatureLinearOperator, strict: bool) -> LinearOperator:
    return operator.operator
