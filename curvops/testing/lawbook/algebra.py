"""Laws of the algebra: every expression multiplies as its dense counterpart does."""

from __future__ import annotations

import torch

from curvops.operators import Dense, Identity, Zero
from curvops.testing.lawbook.subject import Subject


def sums_and_multiples(s: Subject) -> None:
    """`A + A = 2A`, `cA`, `-A`, `A / c`, `A - A = 0`, `0 A = 0`, and Python's `sum`."""
    s.equals(s.A + s.A, 2.0 * s.M, "A + A")
    s.equals(3.0 * s.A, 3.0 * s.M, "3 A")
    s.equals(s.A * torch.tensor(0.5, dtype=s.A.dtype), 0.5 * s.M, "A times a tensor")
    s.equals(-s.A, -s.M, "-A")
    s.equals(s.A / 4, s.M / 4, "A / 4")
    s.equals(s.A - s.A, 0.0 * s.M, "A - A")
    s.equals(0.0 * s.A, 0.0 * s.M, "0 A")
    s.equals(sum([s.A, s.A, 2.0 * s.A]), 4.0 * s.M, "sum([A, A, 2 A])")  # type: ignore[arg-type]
    s.equals(s.A + Zero((s.M.shape[0], s.M.shape[1]), s.A.dtype, s.A.device), s.M, "A + 0")


def sums_with_a_matrix(s: Subject) -> None:
    """`A + B`, `B - A` with a dense B."""
    B = s.columns(s.M.shape[0], s.M.shape[1], 5)
    s.equals(s.A + Dense(B), s.M + B.cpu().double(), "A + B", slack=10)
    s.equals(Dense(B) - 2.0 * s.A, B.cpu().double() - 2.0 * s.M, "B - 2 A", slack=10)


def damping(s: Subject) -> None:
    """`add_diagonal` of a number, a 0-dim tensor, a vector, and of a dict where names are known."""
    if not s.is_square:
        return
    size = s.M.shape[0]
    eye = torch.eye(size, dtype=torch.float64)
    d = s.vector(size, 3).abs()
    slack = max(1.0, 10.0 / s.norm)
    s.equals(s.A.add_diagonal(0.5), s.M + 0.5 * eye, "A.add_diagonal(0.5)", slack)
    s.equals(s.A.add_diagonal(0.0), s.M, "A.add_diagonal(0.0)", slack)
    s.equals(s.A.add_diagonal(torch.tensor(0.5, dtype=s.A.dtype)), s.M + 0.5 * eye, "add_diagonal of a tensor", slack)
    s.equals(s.A.add_diagonal(d), s.M + torch.diag(d.cpu().double()), "add_diagonal of a vector", slack)
    s.equals(
        s.A.add_diagonal(0.5).add_diagonal(d), s.M + torch.diag(0.5 + d.cpu().double()), "add_diagonal twice", slack
    )
    layout = s.A.layout
    if layout is not None:
        names = {name: 0.5 + index for index, name in enumerate(layout)}
        expected = torch.cat([torch.full((where.stop - where.start,), names[n]) for n, where in layout.items()])
        s.equals(s.A.add_diagonal(names), s.M + torch.diag(expected.double()), "add_diagonal of a dict", 10 * slack)


def products_of_operators(s: Subject) -> None:
    """`A @ B`, `B @ A`, `A @ I`, `A @ Aᵀ` as operators."""
    rows, columns = s.M.shape
    B, C = s.columns(columns, 3, 6), s.columns(3, rows, 7)
    s.equals(s.A @ Dense(B), s.M @ B.cpu().double(), "A @ B", slack=10 * float(B.norm()))
    s.equals(Dense(C) @ s.A, C.cpu().double() @ s.M, "C @ A", slack=10 * float(C.norm()))
    s.equals(s.A @ Identity(columns, s.A.dtype, s.A.device, 2.0), 2.0 * s.M, "A @ 2I")
    s.equals(Identity(rows, s.A.dtype, s.A.device, 2.0) @ s.A, 2.0 * s.M, "2I @ A")
    if s.has_transpose():
        s.equals(s.A @ s.A.T, s.M @ s.M.T, "A @ A.T", slack=10)
        s.require((s.A @ s.A.T).is_symmetric or not s.A.is_symmetric, "A @ A of a symmetric A is symmetric")


def submatrices(s: Subject) -> None:
    """`A.submatrix(rows, columns)`, principal and not, and of a submatrix."""
    rows, columns = s.M.shape
    some = torch.arange(rows).flip(0)[: max(1, rows - 1)]
    others = torch.arange(columns)[: max(1, columns // 2)]
    s.equals(s.A.submatrix(some, others), s.M[some][:, others], "A.submatrix(rows, columns)")
    if s.is_square:
        principal = s.A.submatrix(some)
        s.equals(principal, s.M[some][:, some], "A.submatrix(rows)")
        s.equals(principal.submatrix(torch.tensor([0])), s.M[some[:1]][:, some[:1]], "a submatrix of a submatrix")
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[some[0]] = True
        s.equals(s.A.submatrix(mask), s.M[mask][:, mask], "A.submatrix(mask)")


def inverses(s: Subject) -> None:
    """`A.inverse()` multiplies by A⁻¹, and twice is A."""
    if not s.is_square or s.condition * s.eps > 1e-4:
        return
    inverse = torch.linalg.inv(s.M)
    scale = float(torch.linalg.matrix_norm(inverse, 2))
    V = s.columns(s.M.shape[0], 2)
    s.close(s.A.inverse() @ V, inverse @ V.cpu().double(), scale * float(V.norm()), "A.inverse() @ V", s.solve_slack())
    s.equals(s.A.inverse().inverse(), s.M, "A.inverse().inverse()", 10)
    s.close(
        (2.0 * s.A).inverse() @ V,
        inverse @ V.cpu().double() / 2,
        scale * float(V.norm()),
        "(2A).inverse()",
        s.solve_slack(),
    )


LAWS = (sums_and_multiples, sums_with_a_matrix, damping, products_of_operators, submatrices, inverses)
