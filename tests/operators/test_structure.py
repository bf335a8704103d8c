"""Structure survives the algebra, and what is structured is never made dense."""

from __future__ import annotations

import pytest
import torch

from curvops.errors import MemoryBudgetError
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
    Scaled,
    Sum,
    Zero,
)
from curvops.testing.zoo import Parts

m = Parts(torch.float64, "cpu")


def _diag() -> LinearOperator:
    return Diagonal(m.positive(6))


def _kron() -> LinearOperator:
    return Kronecker(m.pd(3), m.pd(2))


def _blocks() -> LinearOperator:
    return BlockDiagonal(m.pd(4), m.pd(2))


_SHIFTED = "Kronecker eigendecomposition, shifted"


@pytest.mark.parametrize(
    ("expression", "verb", "route"),
    [
        (lambda: _kron().add_diagonal(0.5), "solve", _SHIFTED),
        (lambda: _kron().add_diagonal(0.5), "logdet", _SHIFTED),
        (lambda: _kron().add_diagonal(0.5), "sqrt_matvec", _SHIFTED),
        (lambda: (2.0 * _kron()).add_diagonal(0.5), "solve", _SHIFTED),
        (lambda: (_kron().add_diagonal(0.5) * 3.0), "logdet", _SHIFTED),
        (lambda: _kron().add_diagonal(0.5).inverse(), "logdet", _SHIFTED),
        (lambda: _kron().inverse(), "inv_sqrt_matvec", "eigendecomposition of the operator itself"),
        (lambda: LowRank(m.general(6, 2)).add_diagonal(0.5), "solve", "Woodbury"),
        (lambda: LowRank(m.general(6, 2)).add_diagonal(0.5), "logdet", "determinant lemma"),
        (lambda: LowRank(m.general(6, 2)).add_diagonal(0.5), "sqrt_matvec", "thin eigendecomposition, shifted"),
        (lambda: LowRank(m.general(6, 2)) + Diagonal(m.positive(6)), "logdet", "determinant lemma"),
        (lambda: LowRank(m.general(6, 2)) + LowRank(m.general(6, 1)) + Diagonal(m.positive(6)), "solve", "Woodbury"),
        (lambda: 3.0 * (LowRank(m.general(6, 2)) + Diagonal(m.positive(6))), "solve", "Woodbury"),
        (lambda: BlockDiagonal(m.pd(4), Kronecker(m.pd(2), m.pd(1))).add_diagonal(0.5), "solve", "block by block"),
        (lambda: _blocks() + _blocks(), "solve", "block by block"),
        (lambda: _blocks() @ _blocks(), "solve", "block by block"),
        (lambda: _blocks().inverse(), "solve", "block by block"),
        (lambda: _diag() + _diag().add_diagonal(1.0), "logdet", "elementwise"),
        (lambda: 2.0 * _diag() @ _diag(), "logdet", "elementwise"),
        (lambda: _kron().submatrix(torch.arange(3)), "diagonal", "Kronecker product"),
        (lambda: m.closure(m.pd(4), is_psd=True).add_diagonal(1.0), "solve", "CG"),
        (lambda: m.closure(m.indefinite(4), is_symmetric=True), "solve", "MINRES"),
        (lambda: m.closure(m.general(4, 4)), "solve", "dense LU"),
    ],
)  # fmt: skip
def test_route(expression: object, verb: str, route: str) -> None:
    assert expression().explain(verb).startswith(f"{verb}: {route}")  # type: ignore[operator]


def test_blocks_take_damping_into_every_block() -> None:
    blocks = BlockDiagonal(Kronecker(m.pd(2), m.pd(2)), m.pd(3))
    for damped in (blocks.add_diagonal(0.5), blocks.add_diagonal(m.positive(7))):
        assert isinstance(damped, BlockDiagonal)
        assert [block.shape[0] for block in damped.blocks] == [4, 3]
    assert "Kronecker eigendecomposition, shifted" in blocks.add_diagonal(0.5).explain("solve")


def test_damping_by_name_reaches_its_block() -> None:
    layout = {"weight": slice(0, 4), "bias": slice(4, 7)}
    blocks = BlockDiagonal(Kronecker(m.pd(2), m.pd(2)), m.pd(3), layout=layout)
    damped = blocks.add_diagonal({"weight": 0.5, "bias": m.positive(3)})
    expected = blocks.to_dense() + torch.diag(torch.cat([torch.full((4,), 0.5, dtype=torch.float64), m.positive(3)]))
    assert torch.allclose(damped.to_dense(), expected, atol=1e-12)
    assert isinstance(damped, BlockDiagonal)
    assert isinstance(damped.blocks[0], Sum)
    assert "Kronecker eigendecomposition, shifted" in damped.blocks[0].explain("solve")
    twice = damped.add_diagonal({"weight": 0.5, "bias": 1.0})
    assert torch.allclose(twice.diagonal(), expected.diagonal() + torch.tensor([0.5] * 4 + [1.0] * 3))


def test_simplifications() -> None:
    A, K = Dense(m.pd(4)), Kronecker(m.pd(3), m.pd(2))
    assert isinstance(A - A, Zero)
    assert isinstance(A + A, Scaled)
    assert A.add_diagonal(0.0) is A
    assert 1.0 * A is A
    assert A.T is A
    assert A.inverse().inverse() is A
    assert (2.0 * (3.0 * A)).factor == 6.0  # type: ignore[attr-defined]
    assert (2.0 * A - A - A).__class__ is Zero
    assert (A @ Identity(4)) is A
    assert isinstance(K @ K, Kronecker)
    assert isinstance(Identity(3) + Identity(3), Identity)
    assert isinstance(Identity(6) + _diag(), Diagonal)
    damped = (A.add_diagonal(1.0) + A).add_diagonal(2.0)
    assert isinstance(damped, Sum)
    assert len(damped.terms) == 2
    low = LowRank(m.general(6, 2))
    assert isinstance(low - low, LowRank)
    assert (low - low).rank == 2  # type: ignore[attr-defined]
    assert (2.0 * A).inverse().inverse().explain("solve").startswith("solve: Cholesky")
    B = m.closure(m.general(4, 5))
    assert (B @ B.T).is_psd
    assert (B.T @ B).is_psd
    assert (B.T @ A @ B).is_psd is False  # A is positive definite, and nobody has said so
    assert (B.T @ Dense(m.pd(4), is_psd=True) @ B).is_psd


def test_eigen_serves_every_damping_and_power() -> None:
    E = Eigen(m.orthonormal(5), m.positive(5))
    assert isinstance(E.add_diagonal(0.5), Eigen)
    assert isinstance(2.0 * E, Eigen)
    assert isinstance(E.inverse(), Eigen)
    assert isinstance(E + E.add_diagonal(1.0), Eigen)


def test_a_large_kronecker_stays_inside_a_small_budget() -> None:
    A, B = m.pd(300), m.pd(300, 1)
    K = Kronecker(A, B)
    K.memory_budget = 10**6
    damped = K.add_diagonal(0.5)
    assert damped.memory_budget == 10**6
    with pytest.raises(MemoryBudgetError, match=r"130 GB.*1 MB.*matrix-free"):
        damped.to_dense()
    values = torch.kron(torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(B)) + 0.5
    assert torch.allclose(damped.logdet(), values.log().sum(), rtol=1e-12)
    assert torch.allclose(damped.trace(), values.sum(), rtol=1e-12)
    assert torch.allclose(damped.diagonal().sum(), values.sum(), rtol=1e-12)
    b = m.vector(90_000)
    _, report = damped.solve(b, return_report=True)
    assert report.worst_residual < 1e-12
    assert torch.allclose(damped.sqrt_matvec(damped.inv_sqrt_matvec(b)), b, atol=1e-10)
    assert report.matvecs <= 2


def test_a_large_low_rank_plus_diagonal_stays_inside_a_small_budget() -> None:
    U, d = m.general(50_000, 3), m.positive(50_000)
    A = LowRank(U) + Diagonal(d)
    A.memory_budget = 10**7
    core = torch.eye(3, dtype=torch.float64) + (U / d[:, None]).T @ U
    assert torch.allclose(A.logdet(), d.log().sum() + torch.logdet(core), rtol=1e-12)
    b = m.vector(50_000)
    assert torch.allclose(A @ A.solve(b), b, atol=1e-9)
    with pytest.raises(MemoryBudgetError):
        A.to_dense()


def test_large_deferred_diagonals_add_elementwise() -> None:
    d, e = m.positive(50_000), m.positive(50_000, 1)
    D = Deferred(lambda: Diagonal(d), Diagonal, (50_000, 50_000), torch.float64, "cpu", is_symmetric=True, is_psd=True)
    D.memory_budget = 10**7
    for delta, total in ((0.5, d + 0.5), (e, d + e)):
        damped = D.add_diagonal(delta)
        assert damped.explain("solve").startswith("solve: elementwise") or delta == 0.5
        assert torch.allclose(damped.logdet(), total.log().sum(), rtol=1e-12)
        assert torch.allclose(damped.solve(e), e / total, rtol=1e-12)


def test_deferred_is_built_once_whatever_is_asked() -> None:
    built = []

    def build() -> LinearOperator:
        built.append(1)
        return Kronecker(m.pd(3), m.pd(2))

    D = Deferred(build, Kronecker, (6, 6), torch.float64, "cpu", is_symmetric=True, is_psd=True, note="by hand")
    damped = 2.0 * D.add_diagonal(0.5)
    for verb in ("solve", "logdet", "trace", "to_dense", "matvec"):
        damped.explain(verb)
    assert repr(D) == "Kronecker(6) [not computed; by hand]"
    damped.describe()
    converted = D.to(torch.float32)
    assert not built
    damped.logdet()
    damped.solve(m.vector(6))
    damped.T.inverse()
    assert converted.trace().dtype == torch.float32
    assert len(built) == 1
    assert repr(D) == "Kronecker(3×2) [by hand]"
    damped.release()
    assert repr(D) == "Kronecker(6) [not computed; by hand]"
    damped.trace()
    assert len(built) == 2


def test_kept_factorisations_follow_a_matrix_that_is_written_to() -> None:
    M = m.pd(4).clone()
    A = Dense(M)
    first = A.logdet()
    M *= 2.0
    assert torch.allclose(A.logdet(), first + 4 * torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_closure_is_called_with_columns_or_one_by_one() -> None:
    M = m.general(3, 4)
    calls = []

    def matvec(v: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(v.shape))
        return M @ v

    one_by_one = Closure(matvec, (3, 4))
    together = Closure(matvec, (3, 4), batched=True)
    V = m.general(4, 2)
    assert torch.allclose(one_by_one @ V, M @ V)
    assert calls == [(4,), (4,)]
    calls.clear()
    assert torch.allclose(together @ V, M @ V)
    assert calls == [(4, 2)]
