"""The words: one Latin-1 line, a tree, and what would answer."""

from __future__ import annotations

import pytest
import torch

from curvops.operators import (
    BlockDiagonal,
    Closure,
    Deferred,
    Dense,
    Diagonal,
    Eigen,
    Identity,
    Kronecker,
    LowRank,
    Zero,
)
from curvops.operators.formula import scalar_text, size_text, times_text
from curvops.testing.zoo import Parts

m = Parts(torch.float64, "cpu")


def _block(kind: type, label: str, size: int) -> Deferred:
    return Deferred(lambda: Dense(m.eye(size)), kind, (size, size), torch.float64, "cpu", label=label, is_psd=True)


def test_the_line_of_the_design() -> None:
    blocks = BlockDiagonal(
        _block(Kronecker, "16×64", 1024),
        _block(Dense, "16", 16),
        _block(Kronecker, "10×16", 160),
        _block(Dense, "10", 10),
    )
    line = "BlockDiagonal(4: Kronecker(16×64), Dense(16), Kronecker(10×16), Dense(10)) [not computed]"
    assert repr(blocks) == line
    assert repr(2.0 * blocks.blocks[0].add_diagonal(1.0)) == "2.0·Kronecker(16×64) + 2.0·I [not computed]"


A, K, B = Dense(m.pd(4)), Kronecker(m.pd(3), m.pd(2)), m.closure(m.general(4, 6))


@pytest.mark.parametrize(
    ("operator", "line"),
    [
        (A, "Dense(4)"),
        (Dense(m.general(4, 6)), "Dense(4×6)"),
        (Diagonal(m.positive(1210)), "Diagonal(1,210)"),
        (Identity(5), "1.0·I"),
        (Zero((2, 3), torch.float64, torch.device("cpu")), "0"),
        (K, "Kronecker(3×2)"),
        (Kronecker(m.general(2, 3), m.general(4, 5)), "Kronecker(2×3, 4×5)"),
        (LowRank(m.general(7, 3)), "LowRank(7×3)"),
        (LowRank(m.general(7, 3), captured=0.951), "LowRank(7×3) [95.1% of the trace]"),
        (Eigen(m.orthonormal(5), m.positive(5)), "Eigen(5)"),
        (Eigen(m.orthonormal(5, 2), m.positive(2)), "Eigen(5×2)"),
        (Closure(lambda v: v, (3, 3), name="Laplacian"), "Laplacian(3)"),
        (A.add_diagonal(1.0), "Dense(4) + 1.0·I"),
        (A.add_diagonal(1e-3), "Dense(4) + 0.001·I"),
        (A.add_diagonal(torch.tensor(2.5e-8)), "Dense(4) + 2.5e-08·I"),
        (A.add_diagonal(m.positive(4)), "Dense(4) + Diagonal(4)"),
        (2.0 * A, "2.0·Dense(4)"),
        (-A, "-Dense(4)"),
        (K - Dense(m.pd(6)), "Kronecker(3×2) - Dense(6)"),
        (K - 2.0 * Dense(m.pd(6)), "Kronecker(3×2) - 2.0·Dense(6)"),
        (B.T, "Closure(4×6).T"),
        (B @ B.T, "Closure(4×6) @ Closure(4×6).T"),
        ((B @ B.T).add_diagonal(1.0).inverse(), "inverse(Closure(4×6) @ Closure(4×6).T + 1.0·I)"),
        (2.0 * (B @ B.T), "2.0·(Closure(4×6) @ Closure(4×6).T)"),
        (A.add_diagonal(1.0) @ B, "(Dense(4) + 1.0·I) @ Closure(4×6)"),
        ((B + Dense(m.general(4, 6))).T, "Closure(4×6).T + Dense(6×4)"),
        (B.submatrix(torch.arange(2), torch.arange(3)), "Closure(4×6)[2×3]"),
        ((B @ B.T).submatrix(torch.arange(2)), "(Closure(4×6) @ Closure(4×6).T)[2×2]"),
        (BlockDiagonal(*[m.pd(1)] * 10),
         "BlockDiagonal(10: Dense(1), Dense(1), Dense(1), Dense(1), Dense(1), Dense(1), Dense(1), Dense(1), ...)"),
    ],
)  # fmt: skip
def test_line(operator: object, line: str) -> None:
    assert repr(operator) == line
    line.encode("latin-1")


def test_tree() -> None:
    damped = (2.0 * K).add_diagonal(0.5)
    assert damped.describe().splitlines() == [
        "6×6, float64, cpu, symmetric",
        "Sum",
        "  2.0 times",
        "    Kronecker(3×2)",
        "  0.5 times",
        "    I",
    ]
    blocks = BlockDiagonal(_block(Dense, "3", 3), m.pd(2))
    assert blocks.describe().splitlines()[1:] == ["BlockDiagonal of 2", "  Dense(3) [not computed]", "  Dense(2)"]
    known = m.closure(m.pd(4), is_psd=True).add_diagonal(0.5)
    assert known.describe().splitlines()[0] == "4×4, float64, cpu, symmetric, positive semidefinite, spectrum >= 0.5"


def test_sizes_and_scalars() -> None:
    assert size_text((16, 16)) == "16"
    assert size_text((None, 1210)) == "?×1,210"
    assert size_text((None, None)) == "?×?"
    assert times_text((3, 3)) == "3×3"
    assert [scalar_text(value) for value in (1.0, 0.1, 1e6, 1e-9, torch.tensor(3.0))] == [
        "1.0", "0.1", "1e+06", "1e-09", "3.0",
    ]  # fmt: skip


def test_explain_says_why() -> None:
    H = m.closure(m.pd(4), is_psd=True)
    assert H.explain("solve") == "solve: CG (positive semidefinite and matrix-free); about 288 B"
    assert H.explain("trace").startswith("trace: diagonal of the dense matrix (P = 4 is at most 4,096")
    assert H.explain("matvec") == "matvec: Closure, matrix-free; about 64 B"
    assert A.explain("to_dense") == "to_dense: read off the matrix; about 128 B"
    assert H.explain("to_dense") == "to_dense: products with 4 unit columns; about 384 B"
    assert Dense(m.general(3, 3)).explain("logdet").startswith("logdet: refused")
    assert B.explain("solve").startswith("solve: refused")
    with pytest.raises(ValueError, match=r"explain\('determinant'\): expected one of"):
        A.explain("determinant")
