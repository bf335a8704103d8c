"""Bad input gets a clear error: what was given, what was expected, the way out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from curvops.errors import (
    ConvergenceError,
    DataError,
    MemoryBudgetError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeError,
    UnsupportedError,
)
from curvops.operators import BlockDiagonal, Closure, Deferred, Dense, Diagonal, Eigen, Kronecker, LowRank
from curvops.operators.methods import (
    CG,
    LU,
    MINRES,
    SLQ,
    Cholesky,
    Eigh,
    FunctionSpace,
    Hutchinson,
    Lanczos,
    Nystrom,
    XTrace,
)
from curvops.testing.zoo import Parts

m = Parts(torch.float64, "cpu")
A = Dense(m.pd(4))
K = Kronecker(m.pd(3), m.pd(2)).add_diagonal(0.5)
H = m.closure(m.indefinite(5), is_symmetric=True)
G = m.closure(m.psd(5, 3), is_psd=True)
N = m.closure(m.general(5, 5))
v4, v5, v6 = m.vector(4), m.vector(5), m.vector(6)


def _bad(value: float) -> torch.Tensor:
    b = v6.clone()
    b[2] = value
    return b


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # vectors
        (lambda: K @ v5, ShapeError, r"shape \(5,\), expected \(6,\) or \(6, K\) for Kronecker\(3×2\) \+ 0\.5·I"),
        (lambda: K.rmatvec(m.general(5, 2)), ShapeError, r"\(5, 2\), expected \(6,\)"),
        (lambda: K.solve(v5), ShapeError, r"\(5,\), expected \(6,\)"),
        (lambda: K.quadratic_form(v5), ShapeError, r"\(5,\), expected \(6,\)"),
        (lambda: K.sqrt_matvec(v5), ShapeError, r"\(5,\), expected \(6,\)"),
        (lambda: K @ v6.float(), ShapeError, r"torch\.float32 on cpu, expected torch\.float64 on cpu"),
        (lambda: K @ v6.to("meta"), ShapeError, r"on meta, expected torch\.float64 on cpu"),
        (lambda: K @ v6.tolist(), ShapeError, "got list"),
        (lambda: K.matvec(v6.numpy()), ShapeError, r"ndarray.*to_scipy\(\)"),
        (lambda: K.solve(_bad(torch.nan)), DataError, "right-hand side holds NaN or Inf"),
        (lambda: K.solve(_bad(-torch.inf)), DataError, "right-hand side holds NaN or Inf"),
        # constructors
        (lambda: Dense(v4), ShapeError, r"Dense expects a matrix \(rows, columns\), got shape \(4,\)"),
        (lambda: Dense(torch.eye(3, dtype=torch.int64)),
         ShapeError, r"torch\.int64: expected torch\.float32 or torch\.float64"),
        (lambda: Dense([[1.0]]), ShapeError, "got list"),
        (lambda: Diagonal(m.pd(3)), ShapeError, r"vector \(P,\), got shape \(3, 3\)"),
        (lambda: LowRank(m.general(4, 2), v4), ShapeError, r"U has 2 columns, so s must be \(2,\); got \(4,\)"),
        (lambda: LowRank(_bad(torch.nan).reshape(3, 2)), DataError, r"LowRank: U \(3, 2\) holds NaN or infinity"),
        (lambda: LowRank(m.general(4, 6), _bad(torch.inf)), DataError, r"LowRank: s \(6,\) holds NaN or infinity"),
        (lambda: Eigen(m.orthonormal(4), v5), ShapeError, r"Q is 4 x 4, so values must be \(4,\); got \(5,\)"),
        (lambda: Kronecker(), ShapeError, "at least one factor"),
        (lambda: Kronecker(m.pd(2), m.pd(2).float()), ShapeError, r"torch\.float32.*expected one"),
        (lambda: BlockDiagonal(), ShapeError, "at least one block"),
        (lambda: BlockDiagonal(m.pd(2), m.general(2, 3)), ShapeError, r"square blocks; Dense\(2×3\) is 2 x 3"),
        (lambda: BlockDiagonal(m.pd(2), m.pd(2).float()), ShapeError, "one dtype"),
        (lambda: Deferred(lambda: A, Dense, (5, 5), torch.float64, "cpu") @ v5,
         ShapeError, r"was built as Dense\(4\).*expected \(5, 5\)"),
        (lambda: Closure(lambda v: v[:2], (5, 5)) @ v5, ShapeError, r"returned .*\(2, 1\).*expected .*\(5, 1\)"),
        # algebra
        (lambda: A + K, ShapeError, r"cannot add Dense\(4\) of shape \(4, 4\) and .*\(6, 6\)"),
        (lambda: A @ K, ShapeError, r"cannot multiply Dense\(4\)"),
        (lambda: A + A.to(torch.float32), ShapeError, r"torch\.float64 on cpu and torch\.float32 on cpu; convert one"),
        (lambda: v4 * A, ShapeError, r"0-dim tensor; got shape \(4,\)"),
        (lambda: A.add_diagonal(v5), ShapeError, r"δ has shape \(5,\), expected a scalar, \(4,\) or a dict"),
        (lambda: A.add_diagonal(torch.nan), DataError, "δ holds NaN or Inf"),
        (lambda: A.add_diagonal({"w": 1.0}),
         UnsupportedError, r"does not know parameter names; pass a scalar or a \(P,\)"),
        (lambda: BlockDiagonal(m.pd(2), layout={"w": slice(0, 2)}).add_diagonal({"b": 1.0}),
         ShapeError, r"misses \['w'\] and does not know \['b'\]"),
        (lambda: BlockDiagonal(m.pd(2), layout={"w": slice(0, 2)}).add_diagonal({"w": v5}),
         ShapeError, r"δ\['w'\] has 5 entries, expected 2"),
        (lambda: Dense(m.general(3, 4)).add_diagonal(1.0), ShapeError, "add_diagonal needs a square operator.*3 x 4"),
        (lambda: Dense(m.general(3, 4)).inverse(), ShapeError, "inverse needs a square operator"),
        (lambda: Dense(m.general(3, 4)).solve(v4), ShapeError, "solve needs a square operator"),
        (lambda: A.submatrix(torch.tensor([0, 4])), ShapeError, r"row indices must lie in 0\.\.3"),
        (lambda: A.submatrix(torch.tensor([0, 0])), ShapeError, "repeat"),
        (lambda: A.submatrix(torch.tensor([0.5])), ShapeError, "vector of integers"),
        (lambda: A.submatrix(torch.tensor([], dtype=torch.long)), ShapeError, "non-empty"),
        # definiteness
        (lambda: H.logdet(SLQ()), NotPositiveDefiniteError, "not known to be positive definite"),
        (lambda: H.logdet(), NotPositiveDefiniteError, "smallest eigenvalue is -2"),
        (lambda: G.logdet(), NotPositiveDefiniteError, "add_diagonal"),
        (lambda: G.logdet(SLQ()), NotPositiveDefiniteError, "add_diagonal"),
        (lambda: Dense(m.psd(5, 3)).logdet(), NotPositiveDefiniteError, "add_diagonal"),
        (lambda: A.add_diagonal(-100.0).logdet(), NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: A.add_diagonal(-100.0).inv_sqrt_matvec(v4), NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: Diagonal(-v4.abs()).logdet(), NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: Diagonal(-v4.abs()).sqrt_matvec(v4), NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: H.inv_sqrt_matvec(v5, Lanczos()), NotPositiveDefiniteError, "not known to be positive definite"),
        (lambda: H.solve(v5, CG()), NotPositiveDefiniteError, r"not positive semidefinite.*MINRES\(\)"),
        (lambda: H.solve(v5, Cholesky()), NotPositiveDefiniteError, "not positive definite.*MINRES"),
        (lambda: (LowRank(m.general(5, 2), -m.positive(2)) + Diagonal(1e-3 * m.positive(5))).logdet(),
         NotPositiveDefiniteError, "not positive"),
        (lambda: Diagonal(torch.zeros(4, dtype=torch.float64)).solve(v4), NotPositiveDefiniteError, "singular"),
        (lambda: (A - A).solve(v4), NotPositiveDefiniteError, "no solution"),
        (lambda: Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)).solve(m.vector(2)),
         NotPositiveDefiniteError, "singular"),
        # methods that do not fit
        (lambda: N.solve(v5, CG()), UnsupportedError, "CG needs a symmetric operator"),
        (lambda: N.solve(v5, MINRES()), UnsupportedError, "known to be symmetric"),
        (lambda: N.logdet(), NotPositiveDefiniteError, r"not known to be symmetric; slogdet\(\)"),
        (lambda: N.function(torch.exp, v5), UnsupportedError, "known to be symmetric"),
        (lambda: N.eigsh(2), UnsupportedError, "known to be symmetric"),
        (lambda: N.spectrum(), UnsupportedError, "known to be symmetric"),
        (lambda: A.solve(v4, SLQ()), UnsupportedError, r"got method=SLQ\(\); expected CG, MINRES"),
        (lambda: A.logdet(CG()), UnsupportedError, r"got method=CG\(\); expected Cholesky"),
        (lambda: A.trace(SLQ()), UnsupportedError, "expected Hutchinson, XTrace"),
        (lambda: A.diagonal(XTrace()), UnsupportedError, "expected Hutchinson, XDiag"),
        (lambda: A.sqrt_matvec(v4, CG()), UnsupportedError, "expected Eigh, Lanczos"),
        (lambda: A.solve(v4, FunctionSpace()), UnsupportedError, "Gram operator"),
        (lambda: G.add_diagonal(1.0).solve(v5, CG(preconditioner=A)), ShapeError, r"preconditioner Dense\(4\)"),
        (lambda: G.add_diagonal(1.0).solve(v5, CG(preconditioner=G)), UnsupportedError, "no exact solve"),
        (lambda: G.add_diagonal(1.0).solve(v5, CG(preconditioner="jacobi")), ShapeError, "expected None"),
        (lambda: G.solve(v5, CG(preconditioner=Nystrom(2))), UnsupportedError, "add a diagonal"),
        (lambda: G.add_diagonal(1.0).solve(v5, CG(preconditioner=Nystrom(9))), ShapeError, "rank of at most 5"),
        (lambda: G.add_diagonal(1.0).solve(v5, CG(x0=m.general(5, 2))), ShapeError, "x0 has 2 columns and b has 1"),
        (lambda: Closure(lambda v: v, (5, 5)).rmatvec(v5), UnsupportedError, "give rmatvec="),
        (lambda: N.to(torch.float32), UnsupportedError, "cannot be converted"),
        (lambda: A.eigsh(5), ShapeError, "1 <= k <= 4"),
    ],
)  # fmt: skip
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CG(rtol=0.0), r"CG\(rtol=0\.0\): expected a number above 0"),
        (lambda: CG(max_iters=0), "whole number of at least 1"),
        (lambda: SLQ(probes=2.5), "whole number"),  # type: ignore[arg-type]
        (lambda: SLQ(steps=True), "whole number"),
        (lambda: Hutchinson(on_failure="ignore"), 'expected "raise" or "warn"'),  # type: ignore[arg-type]
        (lambda: Nystrom(rank=-1), "whole number"),
    ],
)
def test_method_values_are_checked(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_dense_matrix_past_the_budget_is_refused_in_a_sentence() -> None:
    big = Diagonal(torch.ones(10_000, dtype=torch.float64))
    big.memory_budget = 10**6
    with pytest.raises(MemoryBudgetError, match=r"the dense matrix of Diagonal\(10,000\) needs 800 MB.*budget is 1 MB"):
        big.to_dense()


def test_a_missed_target_carries_its_best_answer() -> None:
    H = m.closure(m.pd(30), is_psd=True)
    b = m.vector(30)
    with pytest.raises(ConvergenceError, match="CG: ") as missed:
        H.solve(b, CG(rtol=1e-12, max_iters=3))
    x, report = missed.value.value, missed.value.report
    assert report is not None
    assert not report.converged
    assert x.shape == b.shape
    residual = float((b - m.pd(30) @ x).norm() / b.norm())
    assert residual == pytest.approx(report.worst_residual, rel=1e-6)  # type: ignore[attr-defined]
    assert 1e-12 < residual < 1
    with pytest.warns(NumericalWarning, match="max_iters"):
        warned = H.solve(b, CG(rtol=1e-12, max_iters=3, on_failure="warn"))
    assert torch.equal(warned, x)
    with pytest.raises(ConvergenceError) as missed:
        H.solve(b[:, None], CG(rtol=1e-12, max_iters=3))
    assert torch.equal(missed.value.value, x[:, None])


def test_inconsistent_singular_systems_are_refused() -> None:
    M = m.psd(6, 3)
    outside = torch.linalg.eigh(M)[1][:, 0]
    for A in (Dense(M), m.closure(M, is_psd=True), LowRank(torch.linalg.cholesky(M + 1e-0 * m.eye(6))[:, :2])):
        b = A @ v6 + (outside if not isinstance(A, LowRank) else torch.linalg.qr(A.U, mode="complete").Q[:, -1])
        with pytest.raises((NotPositiveDefiniteError, ConvergenceError), match="range"):
            A.solve(b)


def test_indefinite_input_to_cholesky_methods_names_the_eigenvalue() -> None:
    low = float(torch.linalg.eigvalsh(m.indefinite(5))[0])
    for call in (H.logdet, lambda: H.logdet(Cholesky()), lambda: H.solve(v5, Cholesky())):
        with pytest.raises(NotPositiveDefiniteError, match=re.escape(f"{low:.3e}")):
            call()
    assert torch.allclose(H.solve(v5, Eigh()), torch.linalg.solve(m.indefinite(5), v5))
    assert torch.allclose(H.solve(v5, LU()), torch.linalg.solve(m.indefinite(5), v5))
