"""The operator under test beside its dense matrix, and the comparisons that a broken law reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import CurvopsError, ShapeError
from curvops.operators import LinearOperator
from curvops.operators.methods import SOLVE_RTOL

RTOL = {torch.float64: 1e-10, torch.float32: 5e-6}
"""Relative error that products may have, per dtype."""


class LawBroken(AssertionError):
    """An operator broke a law; the message names the law, the operator and by how much."""


@dataclass(frozen=True)
class Subject:
    """An operator, its matrix, and vectors to try it on.

    Attributes:
        A: The operator.
        M: Its dense matrix, float64 on the CPU, found without the operator where the caller gave it.
        rtol: Relative error allowed to products.
        user: A network whose parameters, buffers, gradients, modes and hooks must stay as they are.
    """

    A: LinearOperator
    M: Tensor
    rtol: float
    user: nn.Module | None = None

    @property
    def eps(self) -> float:
        """Distance of 1 to the next number of the operator's dtype."""
        return torch.finfo(self.A.dtype).eps

    @property
    def norm(self) -> float:
        """‖M‖₂, at least the smallest normal number."""
        return max(float(torch.linalg.matrix_norm(self.M, 2)), 1e-30)

    @property
    def is_square(self) -> bool:
        """Whether rows and columns are as many."""
        return self.M.shape[0] == self.M.shape[1]

    @property
    def eigenvalues(self) -> Tensor:
        """Ascending eigenvalues of the symmetric M."""
        return torch.linalg.eigvalsh((self.M + self.M.T) / 2)

    @property
    def rounding(self) -> float:
        """Eigenvalues of a smaller size are rounding of the largest."""
        return 10 * self.M.shape[0] * self.eps * self.norm

    @property
    def condition(self) -> float:
        """Largest over smallest singular value; inf where singular to working precision."""
        values = torch.linalg.svdvals(self.M)
        low = float(values.min())
        return float(values.max()) / low if low > self.rounding else torch.inf

    @property
    def is_singular(self) -> bool:
        """Whether the symmetric M is singular however its rows and columns are scaled, which a wide range is not."""
        d = self.M.diagonal().abs()
        if not bool((d > 0).all()):
            return True
        values = torch.linalg.eigvalsh(self.M / (d[:, None] * d).sqrt()).abs()
        return float(values.min()) <= 10 * len(d) * self.eps * float(values.max())

    def solve_slack(self) -> float:
        """Error of a solve in units of rtol‖A⁻¹‖‖b‖: rounding, and what an iterative route may leave."""
        _, report = self.A.solve(self.A @ self.vector(self.M.shape[1]), return_report=True)
        return 10 * self.condition + (2 * SOLVE_RTOL[self.A.dtype] / self.rtol if report.iterations else 0.0)

    def vector(self, size: int, seed: int = 0) -> Tensor:
        """`(size,)` normal numbers in the operator's dtype and on its device."""
        return self.columns(size, 1, seed)[:, 0]

    def columns(self, size: int, count: int = 3, seed: int = 0) -> Tensor:
        """`(size, count)` normal numbers in the operator's dtype and on its device."""
        generator = torch.Generator().manual_seed(7919 + seed)
        drawn = torch.randn(size, count, generator=generator, dtype=torch.float64)
        return drawn.to(self.A.device, self.A.dtype)

    def fail(self, what: str) -> None:
        """Break the law that is running."""
        raise LawBroken(f"{what}\n  operator: {self.A!r}, {self.M.shape[0]} x {self.M.shape[1]}, {self.A.dtype}")

    def require(self, condition: bool, what: str) -> None:
        """Break the law unless a fact holds."""
        if not condition:
            self.fail(what)

    def close(self, got: Tensor | float, expected: Tensor | float, scale: float, what: str, slack: float = 1.0) -> None:
        """Break the law unless `got` is finite, of `expected`'s shape, and within `slack · rtol · scale` of it."""
        got = torch.as_tensor(got).detach().cpu().double()
        expected = torch.as_tensor(expected).detach().cpu().double()
        self.require(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        self.require(bool(torch.isfinite(got).all()), f"{what}: holds NaN or Inf")
        error = float((got - expected).norm())
        allowed = slack * self.rtol * scale
        self.require(error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}")

    def equals(self, operator: LinearOperator, matrix: Tensor, what: str, slack: float = 1.0) -> None:
        """Break the law unless `operator` multiplies, transposes and densifies as `matrix` does."""
        rows, columns = matrix.shape
        self.require(
            tuple(operator.shape) == (rows, columns), f"{what}: shape {operator.shape}, expected {(rows, columns)}"
        )
        self.require(operator.dtype == self.A.dtype, f"{what}: dtype {operator.dtype}, expected {self.A.dtype}")
        V, U = self.columns(columns, 2, 1), self.columns(rows, 2, 2)
        scale = max(float(torch.linalg.matrix_norm(matrix, 2)), 1e-30, 10 * self.eps / self.rtol * self.norm)
        self.close(operator @ V, matrix @ V.cpu().double(), scale * float(V.norm()), f"{what}, product", slack)
        if self.has_transpose(operator):
            self.close(
                operator.rmatvec(U),
                matrix.T @ U.cpu().double(),
                scale * float(U.norm()),
                f"{what}, transposed product",
                slack,
            )
        self.close(operator.to_dense(), matrix, scale * min(rows, columns) ** 0.5, f"{what}, to_dense", slack)

    def has_transpose(self, operator: LinearOperator | None = None) -> bool:
        """Whether transposed products exist: a closure may do without."""
        from curvops.errors import UnsupportedError

        operator = self.A if operator is None else operator
        try:
            operator.rmatvec(self.vector(operator.shape[0]))
        except UnsupportedError:
            return False
        return True

    def refuses(self, call: Callable[[], Any], error: type[CurvopsError], what: str) -> str:
        """The message of the error that `call` raises; breaks the law where it does not."""
        try:
            call()
        except error as refusal:
            return str(refusal)
        except Exception as other:
            self.fail(f"{what}: raised {type(other).__name__} ({other}), expected {error.__name__}")
        self.fail(f"{what}: was accepted, expected {error.__name__}")
        return ""

    def refuses_shape(self, call: Callable[[], Any], mentions: list[str], what: str) -> None:
        """Break the law unless `call` raises a ShapeError that mentions what was given and what was expected."""
        message = self.refuses(call, ShapeError, what)
        for mention in mentions:
            self.require(mention in message, f"{what}: the message does not mention {mention!r}: {message}")
