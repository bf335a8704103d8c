"""Laws of products: linear, by columns, transposed, dense, and true to the facts that the operator states."""

from __future__ import annotations

import torch

from curvops.testing.lawbook.subject import Subject


def products_are_linear(s: Subject) -> None:
    """`A(αu + βv) = αAu + βAv`, and equal to the dense product."""
    u, v = s.columns(s.M.shape[1], 2).unbind(1)
    scale = s.norm * float(u.norm() + v.norm())
    s.close(s.A @ (0.5 * u - 2.0 * v), 0.5 * (s.A @ u) - 2.0 * (s.A @ v), scale, "A(0.5u - 2v) = 0.5Au - 2Av", slack=4)
    s.close(s.A @ v, s.M @ v.cpu().double(), scale, "A v")


def products_go_by_columns(s: Subject) -> None:
    """`A V` is the stack of `A v`; `@`, `matvec` and `matmat` are one."""
    V = s.columns(s.M.shape[1], 4)
    scale = s.norm * float(V.norm())
    AV = s.A @ V
    s.require(AV.dtype == s.A.dtype, f"A V has dtype {AV.dtype}")
    s.require(tuple(AV.shape) == (s.M.shape[0], 4), f"A V has shape {tuple(AV.shape)}")
    s.close(AV, torch.stack([s.A @ v for v in V.unbind(1)], 1), scale, "A V by columns")
    s.close(s.A.matvec(V[:, 0]), AV[:, 0], scale, "matvec")
    s.close(s.A.matmat(V), AV, scale, "matmat")


def products_are_counted(s: Subject) -> None:
    """`matvec_count` counts columns."""
    before = s.A.matvec_count
    s.A @ s.vector(s.M.shape[1])
    s.A @ s.columns(s.M.shape[1], 3)
    s.require(s.A.matvec_count - before == 4, f"1 + 3 columns were counted as {s.A.matvec_count - before}")


def transpose_is_adjoint(s: Subject) -> None:
    """`⟨u, Av⟩ = ⟨Aᵀu, v⟩`; `.T` multiplies by the transpose, and twice is the operator."""
    if not s.has_transpose():
        return
    u, v = s.vector(s.M.shape[0], 1), s.vector(s.M.shape[1], 2)
    scale = s.norm * float(u.norm() * v.norm())
    s.close(u @ (s.A @ v), s.A.rmatvec(u) @ v, scale, "<u, Av> = <Aᵀu, v>", slack=4)
    s.equals(s.A.T, s.M.T, "A.T")
    s.equals(s.A.T.T, s.M, "A.T.T")


def dense_is_the_products_with_unit_vectors(s: Subject) -> None:
    """`to_dense()` and `A @ I`, both equal to the matrix given; the user may write into it."""
    eye = torch.eye(s.M.shape[1], dtype=s.A.dtype, device=s.A.device)
    scale = s.norm * min(s.M.shape) ** 0.5
    dense = s.A.to_dense()
    s.close(dense, s.M, scale, "to_dense()")
    s.close(s.A @ eye, s.M, scale, "A @ I")
    with torch.no_grad():
        dense.zero_()
    s.close(s.A.to_dense(), s.M, scale, "to_dense() after the first answer was overwritten")


def facts_are_true(s: Subject) -> None:
    """What is called symmetric, positive semidefinite or bounded below is."""
    if s.A.is_symmetric:
        s.close(s.M, s.M.T, s.norm, "is_symmetric")
    if s.A.is_psd:
        s.require(s.A.is_symmetric, "is_psd without is_symmetric")
        s.require(
            float(s.eigenvalues[0]) >= -s.rounding,
            f"is_psd, and the smallest eigenvalue is {float(s.eigenvalues[0]):.3g}",
        )
    bound = s.A.lower_bound
    if bound is not None and s.is_square:
        s.require(
            bound <= float(s.eigenvalues[0]) + s.rounding,
            f"lower_bound is {bound:.6g}, and the smallest eigenvalue is {float(s.eigenvalues[0]):.6g}",
        )


def wrong_vectors_are_refused(s: Subject) -> None:
    """A wrong length, dtype, rank or type is a ShapeError that names both shapes and the operator's line."""
    rows, columns = s.M.shape
    line = repr(s.A)
    wrong = s.vector(columns + 1)
    s.refuses_shape(lambda: s.A @ wrong, [f"({columns + 1},)", f"({columns},)", line], "a vector one too long")
    s.refuses_shape(
        lambda: s.A.rmatvec(s.vector(rows + 2)), [f"({rows + 2},)", f"({rows},)", line], "a left vector two too long"
    )
    s.refuses_shape(lambda: s.A @ s.columns(columns)[None], [f"(1, {columns}, 3)"], "a three-dimensional tensor")
    other = torch.float32 if s.A.dtype == torch.float64 else torch.float64
    s.refuses_shape(lambda: s.A @ s.vector(columns).to(other), [str(other), str(s.A.dtype)], "another dtype")
    s.refuses_shape(lambda: s.A @ s.vector(columns).cpu().numpy(), ["ndarray"], "a NumPy array")
    if s.is_square:
        s.refuses_shape(
            lambda: s.A.solve(wrong), [f"({columns + 1},)", f"({columns},)", line], "a right-hand side too long"
        )


LAWS = (
    products_are_linear,
    products_go_by_columns,
    products_are_counted,
    transpose_is_adjoint,
    dense_is_the_products_with_unit_vectors,
    facts_are_true,
    wrong_vectors_are_refused,
)
