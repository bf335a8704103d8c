"""The zoo of operators: one line each, an operator beside the dense matrix it must equal.

    >>> import torch
    >>> from curvops.testing.zoo import zoo
    >>> operator, matrix = zoo()[0].build(torch.float64)
    >>> float((operator.to_dense() - matrix).abs().max())
    0.0

Every law of `curvops.testing.laws` runs on every case: to test a new operator, add a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvops.operators import (
    BlockDiagonal,
    Closure,
    Deferred,
    Dense,
    Diagonal,
    Eigen,
    Identity,
    Kronecker,
    LinearOperator,
    LowRank,
    Permuted,
    Zero,
)

kron, block_diag, diag, inv = torch.kron, torch.block_diag, torch.diag, torch.linalg.inv


@dataclass(frozen=True)
class Parts:
    """Matrices and vectors to build with; the same arguments give the same numbers, rounded to `dtype`.

    Attributes:
        dtype: Precision of the operator.
        device: Device of the operator.
        exact: Give the rounded numbers as float64 on the CPU, for the dense matrix.
    """

    dtype: torch.dtype
    device: torch.device | str
    exact: bool = False

    def general(self, rows: int, columns: int, seed: int = 0) -> Tensor:
        """`(rows, columns)` of independent normal numbers."""
        return self._rounded(_normal(rows, columns, seed))

    def vector(self, size: int, seed: int = 0) -> Tensor:
        """`(size,)` normal numbers."""
        return self._rounded(_normal(size, 1, seed)[:, 0])

    def positive(self, size: int, seed: int = 0) -> Tensor:
        """`(size,)` numbers above 0.3."""
        return self._rounded(0.3 + _normal(size, 1, seed)[:, 0].abs())

    def pd(self, size: int, seed: int = 0) -> Tensor:
        """Positive definite `(size, size)`, condition number 16."""
        return self._symmetric(torch.logspace(-1, 3, size, base=2.0, dtype=torch.float64, device="cpu"), seed)

    def indefinite(self, size: int, seed: int = 0) -> Tensor:
        """Symmetric, eigenvalues between −2 and 3, none near 0."""
        values = torch.linspace(-2.0, 3.0, size, dtype=torch.float64, device="cpu")
        return self._symmetric(values + 0.25 * torch.sign(values + 0.01), seed)

    def psd(self, size: int, rank: int, seed: int = 0) -> Tensor:
        """Positive semidefinite `(size, size)` of a rank, of whole numbers: as singular in float32 as in float64."""
        U = (2 * _normal(size, rank, seed)).round()
        return self._rounded(U @ U.T)

    def orthonormal(self, size: int, rank: int | None = None, seed: int = 0) -> Tensor:
        """`(size, rank)` with orthonormal columns."""
        return self._rounded(_orthonormal(size, seed)[:, : size if rank is None else rank])

    def eye(self, size: int) -> Tensor:
        """The identity."""
        return self._rounded(torch.eye(size, dtype=torch.float64, device="cpu"))

    def closure(self, M: Tensor, **facts: Any) -> Closure:
        """M behind a function, with its transpose."""
        return Closure(
            lambda V: M @ V, (M.shape[0], M.shape[1]), dtype=self.dtype, device=self.device,
            rmatvec=lambda V: M.T @ V, batched=True, **facts,
        )  # type: ignore[arg-type]  # fmt: skip

    def deferred(
        self, kind: type[LinearOperator], build: Callable[[], LinearOperator], size: int, psd: bool
    ) -> Deferred:
        """`build()` at first need."""
        return Deferred(build, kind, (size, size), self.dtype, self.device, is_symmetric=True, is_psd=psd)

    def _symmetric(self, values: Tensor, seed: int) -> Tensor:
        Q = _orthonormal(len(values), seed)
        M = self._rounded((Q * values) @ Q.T)
        return (M + M.T) / 2

    def _rounded(self, M: Tensor) -> Tensor:
        M = M.to(self.dtype)
        return M.double() if self.exact else M.to(self.device)


@dataclass(frozen=True)
class Case:
    """An operator and its dense matrix, from the same parts.

    Attributes:
        name: What test output calls it.
        operator: Makes the operator.
        matrix: Makes the matrix, by plain torch.
    """

    name: str
    operator: Callable[[Parts], LinearOperator]
    matrix: Callable[[Parts], Tensor]

    def build(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[LinearOperator, Tensor]:
        """The operator in `dtype` on `device`, and its matrix as float64 on the CPU."""
        return self.operator(Parts(dtype, device)), self.matrix(Parts(dtype, device, exact=True))


def zoo() -> list[Case]:
    """Every operator of the algebra, at least once in every structure that has its own formulas."""
    return [
        Case("dense, positive definite", lambda m: Dense(m.pd(6)), lambda m: m.pd(6)),
        Case("dense, known positive semidefinite", lambda m: Dense(m.pd(6), is_psd=True), lambda m: m.pd(6)),
        Case("dense, indefinite", lambda m: Dense(m.indefinite(6)), lambda m: m.indefinite(6)),
        Case("dense, not symmetric", lambda m: Dense(m.general(5, 5)), lambda m: m.general(5, 5)),
        Case("dense, rectangular", lambda m: Dense(m.general(4, 6)), lambda m: m.general(4, 6)),
        Case("dense, singular", lambda m: Dense(m.psd(6, 3)), lambda m: m.psd(6, 3)),
        Case("dense, 1 x 1", lambda m: Dense(m.pd(1)), lambda m: m.pd(1)),
        Case("diagonal", lambda m: Diagonal(m.positive(7)), lambda m: diag(m.positive(7))),
        Case("diagonal, indefinite", lambda m: Diagonal(m.vector(7)), lambda m: diag(m.vector(7))),
        Case("diagonal, wide range", lambda m: Diagonal(m.positive(7) ** 12), lambda m: diag(m.positive(7) ** 12)),
        Case("identity", lambda m: Identity(5, m.dtype, m.device), lambda m: m.eye(5)),
        Case("scaled identity", lambda m: Identity(5, m.dtype, m.device, 0.25), lambda m: 0.25 * m.eye(5)),
        Case("zero", lambda m: Zero((4, 4), m.dtype, torch.device(m.device)), lambda m: 0 * m.eye(4)),
        Case("zero, rectangular", lambda m: Zero((3, 5), m.dtype, torch.device(m.device)),
             lambda m: 0 * m.general(3, 5)),
        Case("Kronecker", lambda m: Kronecker(m.pd(3), m.pd(4)), lambda m: kron(m.pd(3), m.pd(4))),
        Case("Kronecker, one factor", lambda m: Kronecker(m.pd(4)), lambda m: m.pd(4)),
        Case("Kronecker, three factors", lambda m: Kronecker(m.pd(2), m.pd(3), m.pd(2, 1)),
             lambda m: kron(kron(m.pd(2), m.pd(3)), m.pd(2, 1))),
        Case("Kronecker, diagonal factor", lambda m: Kronecker(Diagonal(m.positive(3)), m.pd(4)),
             lambda m: kron(diag(m.positive(3)), m.pd(4))),
        Case("Kronecker, low-rank factor", lambda m: Kronecker(m.pd(3), LowRank(m.general(4, 2))),
             lambda m: kron(m.pd(3), m.general(4, 2) @ m.general(4, 2).T)),
        Case("Kronecker, low-rank factors + δI",
             lambda m: _damped(Kronecker(LowRank(m.general(3, 2)), LowRank(m.general(4, 2))), 0.5),
             lambda m: kron(m.general(3, 2), m.general(4, 2)) @ kron(m.general(3, 2), m.general(4, 2)).T
             + 0.5 * m.eye(12)),
        Case("Kronecker, damped factors",
             lambda m: Kronecker(_damped(Dense(m.psd(3, 1)), 0.5), _damped(Dense(m.pd(3)), 2.0)),
             lambda m: kron(m.psd(3, 1) + 0.5 * m.eye(3), m.pd(3) + 2.0 * m.eye(3))),
        Case("Kronecker, singular", lambda m: Kronecker(Dense(m.psd(3, 2), is_psd=True), Dense(m.pd(3), is_psd=True)),
             lambda m: kron(m.psd(3, 2), m.pd(3))),
        Case("Kronecker, indefinite", lambda m: Kronecker(m.indefinite(3), m.indefinite(4)),
             lambda m: kron(m.indefinite(3), m.indefinite(4))),
        Case("Kronecker, rectangular factors", lambda m: Kronecker(m.general(2, 3), m.general(4, 2)),
             lambda m: kron(m.general(2, 3), m.general(4, 2))),
        Case("Kronecker, square of rectangular factors", lambda m: Kronecker(m.general(2, 3), m.general(3, 2)),
             lambda m: kron(m.general(2, 3), m.general(3, 2))),
        Case("Kronecker, not symmetric", lambda m: Kronecker(m.general(3, 3), m.general(2, 2)),
             lambda m: kron(m.general(3, 3), m.general(2, 2))),
        Case("Kronecker, transposed factor", lambda m: Kronecker(m.pd(2), m.general(3, 3).T),
             lambda m: kron(m.pd(2), m.general(3, 3).T.contiguous())),
        Case("Kronecker of a closure", lambda m: Kronecker(m.closure(m.pd(3), is_psd=True), m.pd(2)),
             lambda m: kron(m.pd(3), m.pd(2))),
        Case("blocks of different sizes", lambda m: BlockDiagonal(m.pd(3), m.pd(1), Kronecker(m.pd(2), m.pd(2, 1))),
             lambda m: block_diag(m.pd(3), m.pd(1), kron(m.pd(2), m.pd(2, 1)))),
        Case("nested blocks", lambda m: BlockDiagonal(BlockDiagonal(m.pd(2), Diagonal(m.positive(2))), m.indefinite(3)),
             lambda m: block_diag(m.pd(2), diag(m.positive(2)), m.indefinite(3))),
        Case("blocks of very different scales",
             lambda m: BlockDiagonal(2.0**-40 * Dense(m.pd(3)), 2.0**40 * Dense(m.pd(2))),
             lambda m: block_diag(2.0**-40 * m.pd(3), 2.0**40 * m.pd(2))),
        Case("blocks, not symmetric", lambda m: BlockDiagonal(m.general(3, 3), m.pd(2)),
             lambda m: block_diag(m.general(3, 3), m.pd(2))),
        Case("blocks, one matrix-free", lambda m: BlockDiagonal(m.closure(m.pd(3), is_psd=True), m.pd(2)),
             lambda m: block_diag(m.pd(3), m.pd(2))),
        Case("Eigen", lambda m: Eigen(m.orthonormal(5), m.positive(5)),
             lambda m: (m.orthonormal(5) * m.positive(5)) @ m.orthonormal(5).T),
        Case("Eigen in a Kronecker basis",
             lambda m: Eigen(Kronecker(m.orthonormal(2), m.orthonormal(3)), m.positive(6)),
             lambda m: _congruence(kron(m.orthonormal(2), m.orthonormal(3)).T, diag(m.positive(6)))),
        Case("Eigen, thin", lambda m: Eigen(m.orthonormal(6, 3), m.positive(3)),
             lambda m: (m.orthonormal(6, 3) * m.positive(3)) @ m.orthonormal(6, 3).T),
        Case("Eigen, thin with a rest", lambda m: Eigen(m.orthonormal(6, 3), m.positive(3), 0.5),
             lambda m: (m.orthonormal(6, 3) * (m.positive(3) - 0.5)) @ m.orthonormal(6, 3).T + 0.5 * m.eye(6)),
        Case("low rank", lambda m: LowRank(m.general(7, 3)), lambda m: m.general(7, 3) @ m.general(7, 3).T),
        Case("low rank, more columns than rows", lambda m: LowRank(m.general(4, 9), m.positive(9)),
             lambda m: (m.general(4, 9) * m.positive(9)) @ m.general(4, 9).T),
        Case("low rank, no columns + δI", lambda m: _damped(LowRank(m.general(4, 2)[:, :0]), 0.5),
             lambda m: 0.5 * m.eye(4)),
        Case("low rank, indefinite", lambda m: LowRank(m.general(6, 4), m.vector(4)),
             lambda m: (m.general(6, 4) * m.vector(4)) @ m.general(6, 4).T),
        Case("closure, positive definite", lambda m: m.closure(m.pd(8), is_psd=True, lower_bound=0.45),
             lambda m: m.pd(8)),
        Case("closure, singular", lambda m: m.closure(m.psd(7, 4), is_psd=True), lambda m: m.psd(7, 4)),
        Case("closure, indefinite", lambda m: m.closure(m.indefinite(7), is_symmetric=True), lambda m: m.indefinite(7)),
        Case("closure, not symmetric", lambda m: m.closure(m.general(6, 6)), lambda m: m.general(6, 6)),
        Case("closure, rectangular", lambda m: m.closure(m.general(5, 3)), lambda m: m.general(5, 3)),
        Case("principal submatrix of a closure", lambda m: m.closure(m.pd(7), is_psd=True).submatrix(_SOME),
             lambda m: m.pd(7)[_SOME][:, _SOME]),
        Case("submatrix of a closure", lambda m: m.closure(m.pd(7), is_psd=True).submatrix(_SOME, _OTHERS),
             lambda m: m.pd(7)[_SOME][:, _OTHERS]),
        Case("submatrix of Kronecker", lambda m: Kronecker(m.pd(3), m.pd(3, 1)).submatrix(_SOME),
             lambda m: kron(m.pd(3), m.pd(3, 1))[_SOME][:, _SOME]),
        Case("permuted Kronecker", lambda m: Permuted(Kronecker(m.pd(3), m.pd(2)), _ORDER),
             lambda m: kron(m.pd(3), m.pd(2))[_ORDER][:, _ORDER]),
        Case("permuted Kronecker, singular",
             lambda m: Permuted(Kronecker(Dense(m.psd(3, 2), is_psd=True), Dense(m.pd(2), is_psd=True)), _ORDER),
             lambda m: kron(m.psd(3, 2), m.pd(2))[_ORDER][:, _ORDER]),
        Case("permuted Kronecker + δI", lambda m: _damped(-0.5 * Permuted(Kronecker(m.pd(3), m.pd(2)), _ORDER), 40.0),
             lambda m: -0.5 * kron(m.pd(3), m.pd(2))[_ORDER][:, _ORDER] + 40.0 * m.eye(6)),
        Case("permuted Kronecker + diagonal",
             lambda m: Permuted(Kronecker(m.pd(3), m.pd(2)), _ORDER) + Diagonal(m.positive(6)),
             lambda m: kron(m.pd(3), m.pd(2))[_ORDER][:, _ORDER] + diag(m.positive(6))),
        Case("permuted, not symmetric", lambda m: Permuted(Kronecker(m.general(3, 3), m.general(2, 2)), _ORDER),
             lambda m: kron(m.general(3, 3), m.general(2, 2))[_ORDER][:, _ORDER]),
        Case("Eigen in a permuted Kronecker basis",
             lambda m: Permuted(Eigen(Kronecker(m.orthonormal(2), m.orthonormal(3)), m.positive(6)), _ORDER),
             lambda m: _congruence(kron(m.orthonormal(2), m.orthonormal(3)).T, diag(m.positive(6)))[_ORDER][:, _ORDER]),
        Case("all of a closure in another order", lambda m: m.closure(m.pd(6), is_psd=True).submatrix(_ORDER),
             lambda m: m.pd(6)[_ORDER][:, _ORDER]),
        Case("submatrix of low rank", lambda m: LowRank(m.general(7, 4)).submatrix(_SOME),
             lambda m: (m.general(7, 4) @ m.general(7, 4).T)[_SOME][:, _SOME]),
        Case("transpose", lambda m: m.closure(m.general(4, 6)).T, lambda m: m.general(4, 6).T),
        Case("transpose, square", lambda m: m.closure(m.general(5, 5)).T, lambda m: m.general(5, 5).T),
        Case("dense + δI", lambda m: _damped(Dense(m.indefinite(5)), 3.0), lambda m: m.indefinite(5) + 3.0 * m.eye(5)),
        Case("Kronecker + δI", lambda m: _damped(Kronecker(m.pd(3), m.pd(2)), 0.5),
             lambda m: kron(m.pd(3), m.pd(2)) + 0.5 * m.eye(6)),
        Case("singular Kronecker + δI",
             lambda m: _damped(Kronecker(Dense(m.psd(3, 1), is_psd=True), Dense(m.psd(3, 2), is_psd=True)), 0.5),
             lambda m: kron(m.psd(3, 1), m.psd(3, 2)) + 0.5 * m.eye(9)),
        Case("c Kronecker + δI", lambda m: _damped(0.25 * Kronecker(m.pd(3), m.pd(2)), 0.5),
             lambda m: 0.25 * kron(m.pd(3), m.pd(2)) + 0.5 * m.eye(6)),
        Case("Kronecker + diagonal", lambda m: Kronecker(m.pd(3), m.pd(2)) + Diagonal(m.positive(6)),
             lambda m: kron(m.pd(3), m.pd(2)) + diag(m.positive(6))),
        Case("blocks + diagonal", lambda m: BlockDiagonal(m.pd(3), m.pd(2)) + Diagonal(m.positive(5)),
             lambda m: block_diag(m.pd(3), m.pd(2)) + diag(m.positive(5))),
        Case("blocks + δI", lambda m: _damped(BlockDiagonal(Kronecker(m.pd(2), m.pd(2, 1)), m.pd(2)), 0.5),
             lambda m: block_diag(kron(m.pd(2), m.pd(2, 1)), m.pd(2)) + 0.5 * m.eye(6)),
        Case("low rank + diagonal", lambda m: LowRank(m.general(7, 3)) + Diagonal(m.positive(7)),
             lambda m: m.general(7, 3) @ m.general(7, 3).T + diag(m.positive(7))),
        Case("low rank + δI", lambda m: _damped(LowRank(m.general(7, 3)), 0.5),
             lambda m: m.general(7, 3) @ m.general(7, 3).T + 0.5 * m.eye(7)),
        Case("indefinite low rank + diagonal",
             lambda m: LowRank(m.general(6, 2), m.vector(2)) + Diagonal(m.positive(6)),
             lambda m: (m.general(6, 2) * m.vector(2)) @ m.general(6, 2).T + diag(m.positive(6))),
        Case("low rank + low rank + δI",
             lambda m: _damped(LowRank(m.general(7, 2)) + LowRank(m.general(7, 2, 1)), 0.5),
             lambda m: _square(m.general(7, 2)) + _square(m.general(7, 2, 1)) + 0.5 * m.eye(7)),
        Case("dense + diagonal", lambda m: Dense(m.pd(5)) + Diagonal(m.positive(5)),
             lambda m: m.pd(5) + diag(m.positive(5))),
        Case("dense + low rank + closure",
             lambda m: Dense(m.pd(5)) + LowRank(m.general(5, 2)) + m.closure(m.pd(5, 1), is_psd=True),
             lambda m: m.pd(5) + m.general(5, 2) @ m.general(5, 2).T + m.pd(5, 1)),
        Case("closure + δI", lambda m: _damped(m.closure(m.psd(8, 5), is_psd=True), 0.5),
             lambda m: m.psd(8, 5) + 0.5 * m.eye(8)),
        Case("closure + diagonal", lambda m: m.closure(m.psd(8, 5), is_psd=True) + Diagonal(m.positive(8)),
             lambda m: m.psd(8, 5) + diag(m.positive(8))),
        Case("difference", lambda m: Kronecker(m.pd(3), m.pd(2)) - Dense(m.pd(6)),
             lambda m: kron(m.pd(3), m.pd(2)) - m.pd(6)),
        Case("rectangular sum", lambda m: Dense(m.general(3, 5)) + 2.0 * m.closure(m.general(3, 5, 1)),
             lambda m: m.general(3, 5) + 2.0 * m.general(3, 5, 1)),
        Case("negative multiple", lambda m: -0.5 * Kronecker(m.pd(3), m.pd(2)),
             lambda m: -0.5 * kron(m.pd(3), m.pd(2))),
        Case("multiple by a tensor", lambda m: m.positive(1)[0] * Dense(m.pd(4)), lambda m: m.positive(1)[0] * m.pd(4)),
        Case("multiple of a closure", lambda m: 0.5 * m.closure(m.pd(5), is_psd=True, lower_bound=0.45),
             lambda m: 0.5 * m.pd(5)),
        Case("product", lambda m: Dense(m.pd(4)) @ Dense(m.general(4, 4)), lambda m: m.pd(4) @ m.general(4, 4)),
        Case("rectangular product", lambda m: Dense(m.general(3, 5)) @ m.closure(m.general(5, 4)),
             lambda m: m.general(3, 5) @ m.general(5, 4)),
        Case("A Aᵀ of a closure", lambda m: _times_transpose(m.closure(m.general(4, 6))),
             lambda m: m.general(4, 6) @ m.general(4, 6).T),
        Case("A Aᵀ of a matrix", lambda m: _times_transpose(Dense(m.general(4, 6))),
             lambda m: m.general(4, 6) @ m.general(4, 6).T),
        Case("Aᵀ M A", lambda m: _congruent(m.closure(m.general(6, 4)), m.closure(m.pd(6), is_psd=True)),
             lambda m: m.general(6, 4).T @ m.pd(6) @ m.general(6, 4)),
        Case("Kronecker times Kronecker", lambda m: Kronecker(m.pd(3), m.pd(2)) @ Kronecker(m.pd(3, 1), m.pd(2, 1)),
             lambda m: kron(m.pd(3) @ m.pd(3, 1), m.pd(2) @ m.pd(2, 1))),
        Case("inverse", lambda m: Dense(m.pd(5)).inverse(), lambda m: inv(m.pd(5))),
        Case("inverse of Kronecker + δI", lambda m: _damped(Kronecker(m.pd(3), m.pd(2)), 0.5).inverse(),
             lambda m: inv(kron(m.pd(3), m.pd(2)) + 0.5 * m.eye(6))),
        Case("inverse of blocks", lambda m: BlockDiagonal(m.pd(3), m.pd(2)).inverse(),
             lambda m: inv(block_diag(m.pd(3), m.pd(2)))),
        Case("inverse of a closure + δI", lambda m: _damped(m.closure(m.psd(6, 4), is_psd=True), 0.5).inverse(),
             lambda m: inv(m.psd(6, 4) + 0.5 * m.eye(6))),
        Case("inverse, not symmetric", lambda m: Dense(m.general(5, 5)).inverse(), lambda m: inv(m.general(5, 5))),
        Case("multiple of an inverse + δI", lambda m: _damped(2.0 * Dense(m.pd(4)).inverse(), 0.5),
             lambda m: 2.0 * inv(m.pd(4)) + 0.5 * m.eye(4)),
        Case("deferred Kronecker", lambda m: m.deferred(Kronecker, lambda: Kronecker(m.pd(3), m.pd(2)), 6, True),
             lambda m: kron(m.pd(3), m.pd(2))),
        Case("deferred dense", lambda m: m.deferred(Dense, lambda: Dense(m.indefinite(5)), 5, False),
             lambda m: m.indefinite(5)),
        Case("deferred diagonal", lambda m: m.deferred(Diagonal, lambda: Diagonal(m.positive(5)), 5, True),
             lambda m: diag(m.positive(5))),
        Case("deferred diagonal + diagonal",
             lambda m: m.deferred(Diagonal, lambda: Diagonal(m.positive(5)), 5, True) + Diagonal(m.positive(5, 1)),
             lambda m: diag(m.positive(5) + m.positive(5, 1))),
        Case("deferred low rank + δI",
             lambda m: _damped(m.deferred(LowRank, lambda: LowRank(m.general(6, 2)), 6, True), 0.5),
             lambda m: m.general(6, 2) @ m.general(6, 2).T + 0.5 * m.eye(6)),
        Case("deferred blocks + δI", lambda m: _damped(BlockDiagonal(
                 m.deferred(Kronecker, lambda: Kronecker(m.pd(2), m.pd(2, 1)), 4, True),
                 m.deferred(Dense, lambda: Dense(m.psd(3, 2)), 3, True)), 0.5),
             lambda m: block_diag(kron(m.pd(2), m.pd(2, 1)), m.psd(3, 2)) + 0.5 * m.eye(7)),
    ]  # fmt: skip


_SOME = torch.tensor([4, 0, 3, 6])
_ORDER = torch.tensor([2, 5, 0, 4, 1, 3])
_OTHERS = torch.tensor([1, 2, 6])


def _damped(operator: LinearOperator, delta: float) -> LinearOperator:
    return operator.add_diagonal(delta)


def _times_transpose(operator: LinearOperator) -> LinearOperator:
    return operator @ operator.T


def _square(M: Tensor) -> Tensor:
    return M @ M.T


def _congruence(A: Tensor, M: Tensor) -> Tensor:
    return A.T @ M @ A


def _congruent(A: LinearOperator, M: LinearOperator) -> LinearOperator:
    return A.T @ M @ A


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 100 * rows + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def _orthonormal(size: int, seed: int) -> Tensor:
    Q, R = torch.linalg.qr(_normal(size, size, seed))
    return Q * torch.sign(R.diagonal())
