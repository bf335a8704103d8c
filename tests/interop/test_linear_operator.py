"""The door to linear_operator: its own contract tests, every operator of the zoo, networks, gradients, and back."""

from __future__ import annotations

import copy
import pickle
import unittest
from collections.abc import Callable

import linear_operator.operators as lo
import pytest
import torch
from curvature_subjects import Counted, batches, randn
from linear_operator.test import linear_operator_test_case as theirs
from reference import relative_error as _relative_error
from torch import Tensor
from untouched import untouched

import curvops as co
from curvops.errors import (
    MemoryBudgetError,
    NotPositiveDefiniteError,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
)
from curvops.interop.linear_operator import CurvatureLinearOperator
from curvops.operators import Identity, Zero
from curvops.operators.doors import through
from curvops.testing.zoo import Case, Parts, zoo

DATA = batches(4)
DELTA = 0.3
EYE = torch.eye(43, dtype=torch.float64)

m = Parts(torch.float64, "cpu")


def relative_error(a: Tensor, b: Tensor) -> float:
    """As `reference.relative_error`, outside autograd."""
    return _relative_error(a.detach(), b.detach())


def ggn(dtype: torch.dtype = torch.float64) -> tuple[co.LinearOperator, Tensor, torch.nn.Module]:
    """A GGN, its dense matrix, and its network."""
    model = Counted().to(dtype)
    A = co.GGN(model, "classification", [(x.to(dtype), y) for x, y in DATA])
    return A, A.to_dense(), model


# ---------------------------------------------------------------- linear_operator's own contract


class Contract(theirs.LinearOperatorTestCase):
    """Its shipped tests, in its float32 and tolerances; neither its CG nor its Lanczos is to be called."""

    seed = 0
    should_test_sample = True
    should_call_cg = should_call_lanczos = should_call_lanczos_diagonalization = False

    def test_half(self) -> None:
        """Half precision is refused."""
        with pytest.raises((ShapeError, UnsupportedError), match="float16"):
            self.create_linear_op().half()


class TestContractDense(Contract, unittest.TestCase):
    def create_linear_op(self):
        return co.Dense(m.pd(5).float() + torch.eye(5)).to_linear_operator()

    def evaluate_linear_op(self, linear_op):
        _, M = linear_op.representation()
        return M


class TestContractSum(Contract, unittest.TestCase):
    def create_linear_op(self):
        K = co.Kronecker(m.pd(2).float(), m.pd(3, 1).float())
        return (K + co.Diagonal(2 + m.positive(6).float())).to_linear_operator()

    def evaluate_linear_op(self, linear_op):
        _, F1, F2, d = linear_op.representation()
        return torch.kron(F1, F2) + torch.diag(d)


class TestContractBatch(Contract, unittest.TestCase):
    def create_linear_op(self):
        M = m.pd(4).float()
        damping = torch.stack([1 + m.positive(4, seed).float() for seed in range(6)]).reshape(2, 3, 4)
        return co.Dense(M).to_linear_operator().expand(2, 3, 4, 4).add_diagonal(damping)

    def evaluate_linear_op(self, linear_op):
        parts = linear_op.representation()[1:]
        if len(parts) == 12:  # converted one by one
            pairs = list(zip(parts[::2], parts[1::2], strict=True))
        else:
            pairs = [(parts[0], d) for d in parts[1:]]
        return torch.stack([M + torch.diag(d) for M, d in pairs]).reshape(2, 3, 4, 4)


class TestContractNetwork(Contract, unittest.TestCase):
    """A GGN over a network plus a diagonal: the only tensor that gradients reach is the diagonal."""

    def create_linear_op(self):
        model = torch.nn.Linear(2, 3)
        with torch.no_grad():
            model.weight.copy_(m.general(3, 2))
            model.bias.zero_()
        G = co.GGN(model, "classification", (m.general(5, 2, 1).float(), torch.tensor([0, 1, 2, 1, 0])))
        self.matrix = G.to_dense()
        return G.to_linear_operator(solve=co.Cholesky()).add_diagonal(torch.linspace(1.0, 3.0, 9))

    def evaluate_linear_op(self, linear_op):
        _, d = linear_op.representation()
        return self.matrix.to(d.dtype) + torch.diag(d)

    def test_pickle(self) -> None:
        """A network is not pickled."""
        with pytest.raises(UnsupportedError, match="holds a network"):
            pickle.dumps(self.create_linear_op())


class TestContractRectangular(theirs.RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        return co.Dense(m.general(5, 4).float()).to_linear_operator()

    def evaluate_linear_op(self, linear_op):
        return linear_op.representation()[1]


# ---------------------------------------------------------------- every operator of the zoo


@pytest.mark.parametrize("case", zoo(), ids=lambda case: case.name)
def test_the_zoo_through_the_door(case: Case) -> None:
    A, M = case.build(torch.float64, torch.device("cpu"))
    S = A.to_linear_operator()
    rows, columns = M.shape
    assert isinstance(S, lo.LinearOperator)
    assert (S.shape, S.dtype, S.is_square) == (M.shape, torch.float64, rows == columns)
    V, U = m.general(columns, 6).reshape(columns, 3, 2).movedim(0, 1), m.general(rows, 2)
    scale = float(M.norm()) or 1.0
    close = lambda a, b: bool((a - b).abs().max() <= 1e-10 * scale * (1 + float(b.abs().max())))  # noqa: E731
    assert close(S @ V, M @ V)
    assert close(S @ V[0, :, 0], M @ V[0, :, 0])
    assert close(S.to_dense(), M)
    assert close(S[0], M[0])
    pick = torch.arange(0, columns, 2)
    assert close(S[:, pick].to_dense(), M[:, pick])
    assert close(S[[0, 0], [columns - 1, 0]], M[[0, 0], [columns - 1, 0]])
    if rows == columns:
        assert close(S.diagonal(), M.diagonal())
    try:
        A.rmatvec(U)
    except UnsupportedError:
        return
    assert close(S.mT @ U, M.T @ U)
    assert close(U.T @ S, U.T @ M)
    assert co.from_linear_operator(S) is A


# ---------------------------------------------------------------- networks


def test_verbs_of_a_network_and_gradients_to_the_right_hand_side_and_delta() -> None:
    A, M, model = ggn()
    with untouched(model):
        S = A.to_linear_operator(solve=co.CG(rtol=1e-13))
        for d in (torch.tensor(0.7).double(), 0.5 + randn(43).abs()):
            b = randn(43, 3)
            arguments = [t.clone().requires_grad_() for t in (b, d)]
            mine = S.add_diagonal(arguments[1])
            dense = M + arguments[1] * EYE
            with torch.no_grad():
                assert relative_error(mine.solve(b), torch.linalg.solve(dense, b)) <= 1e-10
                assert relative_error(mine.logdet(), torch.logdet(dense)) <= 1e-10
            quadratic, logdet = mine.inv_quad_logdet(arguments[0], logdet=True)
            expected = (arguments[0] * torch.linalg.solve(dense, arguments[0])).sum() + torch.logdet(dense)
            assert float((quadratic + logdet).detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
            found, right = (torch.autograd.grad(t, arguments) for t in (quadratic + logdet, expected))
            assert all(relative_error(f, r) <= 1e-9 for f, r in zip(found, right, strict=True))
            roots = mine.sqrt_inv_matmul(b).detach()
            values, vectors = torch.linalg.eigh(dense.detach())
            assert relative_error(roots, vectors @ (values.rsqrt()[:, None] * (vectors.T @ b))) <= 1e-8


def test_a_batch_of_one_operator_is_one_operator() -> None:
    A, M, _ = ggn()
    S = A.to_linear_operator().expand(5, 43, 43)
    before = A.matvec_count
    V = randn(5, 43 * 2).reshape(5, 43, 2)
    assert relative_error(S @ V, M @ V) <= 1e-12
    assert A.matvec_count - before == 10  # all columns in one product
    assert S[2].operator is A
    assert S.sum(0).operator.explain("trace") == (5.0 * A).explain("trace")
    assert relative_error(S.sum(0).to_dense(), 5 * M) <= 1e-12


def test_a_batch_of_dampings() -> None:
    A, M, _ = ggn()
    deltas = torch.tensor([[0.1], [1.0], [10.0]], dtype=torch.float64, requires_grad=True)
    S = A.to_linear_operator(solve=co.CG(rtol=1e-12)).expand(3, 43, 43).add_diagonal(deltas)
    dense = M + deltas[..., None] * EYE
    b = randn(43, 2)
    assert relative_error(S.solve(b), torch.linalg.solve(dense, b)) <= 1e-9
    assert relative_error(S.logdet(), torch.logdet(dense)) <= 1e-10
    assert relative_error(S.diagonal(), dense.diagonal(dim1=-2, dim2=-1)) <= 1e-12
    (found,) = torch.autograd.grad(S.logdet().sum(), deltas)
    (expected,) = torch.autograd.grad(torch.logdet(dense).sum(), deltas)
    assert relative_error(found, expected) <= 1e-9
    with pytest.raises(UnsupportedError, match="batch of 3 operators; index"):
        _ = S.operator
    assert repr(S[1]) == f"CurvatureLinearOperator({A.add_diagonal(deltas[1, 0])!r})"


def test_sums_and_multiples_stay_on_this_side() -> None:
    A, M, _ = ggn()
    S, D, T = A.to_linear_operator(), lo.DiagLinearOperator(1 + randn(43).abs()), m.pd(43)
    for mine, dense in (
        (S + D, M + D.to_dense()), (S + T, M + T), (2.0 * S, 2 * M), (S + S, 2 * M),
        (S.add_jitter(0.5), M + 0.5 * EYE), (S @ S, M @ M), (S - 0.5 * S, 0.5 * M),
        (S + lo.RootLinearOperator(m.general(43, 3)), M + m.general(43, 3) @ m.general(43, 3).T),
        (S + lo.ConstantDiagLinearOperator(torch.tensor([2.0]).double(), 43), M + 2 * EYE),
    ):  # fmt: skip
        assert isinstance(mine, CurvatureLinearOperator)
        assert relative_error(mine.to_dense(), dense) <= 1e-12
    assert repr((S + lo.ConstantDiagLinearOperator(torch.tensor([2.0]).double(), 43)).operator) == f"{A!r} + 2.0·I"


def test_inside_an_operator_of_theirs_gradients_come_back() -> None:
    A, M, _ = ggn()
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    column = torch.linspace(1.0, 0.0, 43, dtype=torch.float64).requires_grad_()
    S = A.to_linear_operator().add_diagonal(delta) + lo.ToeplitzLinearOperator(column)
    assert not isinstance(S, CurvatureLinearOperator)
    steps = torch.arange(43)
    dense = M + delta * EYE + column[(steps[:, None] - steps).abs()]
    v = randn(43, 2)
    found, expected = (torch.autograd.grad((v * (X @ v)).sum(), [delta, column]) for X in (S, dense))
    assert all(relative_error(f, e) <= 1e-12 for f, e in zip(found, expected, strict=True))
    small = co.Dense(m.pd(3)).to_linear_operator()
    K = lo.KroneckerProductLinearOperator(small, lo.DenseLinearOperator(m.pd(2, 1)))
    kron = torch.kron(m.pd(3), m.pd(2, 1))
    assert relative_error(K.to_dense(), kron) <= 1e-12
    assert relative_error(K.solve(randn(6)), torch.linalg.solve(kron, randn(6))) <= 1e-6


# ---------------------------------------------------------------- entries and roots without a dense matrix


def tight() -> tuple[CurvatureLinearOperator, Tensor]:
    """A GGN + δI that may not be made dense."""
    A, M, _ = ggn()
    A = A.add_diagonal(DELTA)
    A.memory_budget = 43 * 43 * 8 - 1
    return A.to_linear_operator(), M + DELTA * EYE


def test_diagonal_and_entries_are_exact_without_a_dense_matrix() -> None:
    S, M = tight()
    with pytest.raises(MemoryBudgetError):
        S.to_dense()
    before = S.operator.matvec_count
    assert relative_error(S.diagonal(), M.diagonal()) <= 1e-12
    assert S.operator.matvec_count - before == 43
    rows, columns = torch.tensor([[3, 1], [3, 40]]), torch.tensor([7, 1])
    assert relative_error(S[rows, columns], M[rows, columns]) <= 1e-12
    assert relative_error(S[..., 5, :], M[5]) <= 1e-12
    block = S[5:9, [1, 1, 2]]  # a repeated column is theirs, on our products
    assert relative_error(block.to_dense(), M[5:9][:, [1, 1, 2]]) <= 1e-12


@pytest.mark.parametrize("build", [tight, lambda: (ggn()[0].to_linear_operator(), ggn()[1])], ids=["tight", "singular"])
def test_roots_and_samples(build: Callable[[], tuple[CurvatureLinearOperator, Tensor]]) -> None:
    S, M = build()
    R = S.root_decomposition().root
    assert R.shape == M.shape
    RRt = R @ (R.mT @ EYE)
    assert relative_error(RRt, M) <= 1e-6
    values, vectors = torch.linalg.eigh(M)
    root = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        draws = S.zero_mean_mvn_samples(4)
        torch.manual_seed(3)
        noise = torch.randn(43, 4, dtype=torch.float64)
    assert relative_error(draws, (root @ noise).T) <= 1e-5


def test_an_indefinite_hessian_is_not_clamped() -> None:
    H = co.Hessian(Counted(), "classification", DATA)
    S, exact = H.to_linear_operator(), torch.linalg.eigvalsh(H.to_dense())
    assert exact[0] < 0
    assert relative_error(S.eigvalsh(), exact) <= 1e-10
    for refused in (S.logdet, S.root_decomposition, lambda: S.zero_mean_mvn_samples(1)):
        with pytest.raises(NotPositiveDefiniteError):
            refused()


# ---------------------------------------------------------------- copies


def test_conversions_work_on_private_copies() -> None:
    A, M, model = ggn()
    delta = torch.tensor(DELTA, dtype=torch.float64, requires_grad=True)
    S = A.to_linear_operator(solve=co.CG(rtol=1e-3)).add_diagonal(delta)
    with untouched(model):
        for single in (S.to(torch.float32), S.float(), S.to(dtype=torch.float32, device="cpu"), S.type(torch.float32)):
            assert single.dtype == torch.float32
            assert relative_error(single.to_dense().double(), M + DELTA * EYE) <= 1e-5
            assert single.methods["solve"] == co.CG(rtol=1e-3)
        assert S.to("cpu") is S
        assert S.to(torch.float64) is S
        twin = S.clone().detach().requires_grad_(True)
        (twin @ randn(43)).sum().backward()
        assert delta.grad is None
        assert delta.requires_grad
        assert relative_error(twin.to_dense(), S.to_dense()) <= 1e-15
        assert S.requires_grad
        assert not S.detach().requires_grad
        with torch.no_grad():
            assert S.evaluate_kernel().operator._children()[0] is A  # rebuilt around the same network


def test_a_stale_network_is_noticed() -> None:
    A, _, model = ggn()
    S = A.to_linear_operator()
    S.to_dense()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(StaleOperatorError):
        S.to_dense()


def test_pickle_and_copy() -> None:
    S = (co.Kronecker(m.pd(2), m.pd(3)) + co.Identity(6, scale=torch.tensor(0.5).double())).to_linear_operator()
    for twin in (pickle.loads(pickle.dumps(S)), copy.deepcopy(S)):
        assert torch.equal(twin.to_dense(), S.to_dense())
        assert repr(twin) == repr(S)
        assert twin.representation()[1] is not S.representation()[1]


# ---------------------------------------------------------------- and back

T = torch.tril(m.pd(4))
CONVERTED = {
    "dense": (lambda: lo.DenseLinearOperator(m.pd(4)), co.Dense),
    "not symmetric": (lambda: lo.DenseLinearOperator(m.general(3, 4)), co.Dense),
    "triangular": (lambda: lo.TriangularLinearOperator(T), co.Dense),
    "diagonal": (lambda: lo.DiagLinearOperator(m.vector(4)), co.Diagonal),
    "identity": (lambda: lo.IdentityLinearOperator(4, dtype=torch.float64), Identity),
    "constant diagonal": (lambda: lo.ConstantDiagLinearOperator(torch.tensor([3.0]).double(), 4), Identity),
    "zero": (lambda: lo.ZeroLinearOperator(3, 3, dtype=torch.float64), Zero),
    "kronecker": (lambda: lo.KroneckerProductLinearOperator(m.pd(2), m.pd(3)), co.Kronecker),
    "low rank": (lambda: lo.RootLinearOperator(m.general(5, 2)), co.LowRank),
    "square root": (lambda: lo.RootLinearOperator(m.general(4, 4)), co.Dense),
    "cholesky": (lambda: lo.CholLinearOperator(lo.TriangularLinearOperator(T)), co.Dense),
    "upper cholesky": (
        lambda: lo.CholLinearOperator(lo.TriangularLinearOperator(T.mT, upper=True), upper=True), co.Dense
    ),
    "block diagonal": (
        lambda: lo.BlockDiagLinearOperator(lo.DenseLinearOperator(torch.stack([m.pd(2), m.pd(2, 1)]))),
        co.BlockDiagonal,
    ),
    "multiple": (lambda: lo.DenseLinearOperator(m.pd(4)) * 2.5, co.LinearOperator),
    "sum": (lambda: lo.RootLinearOperator(m.general(4, 2)) + lo.KroneckerProductLinearOperator(m.pd(2), m.pd(2)), None),
    "kronecker + δI": (
        lambda: lo.KroneckerProductLinearOperator(m.pd(2), m.pd(2)).add_diagonal(torch.tensor(0.5).double()), None
    ),
    "product": (lambda: lo.DenseLinearOperator(m.pd(4)) @ lo.RootLinearOperator(m.general(4, 2)), None),
    "batch summed": (
        lambda: lo.SumBatchLinearOperator(lo.DenseLinearOperator(torch.stack([m.pd(2), m.pd(2, 1)]))), None
    ),
    "toeplitz": (lambda: lo.ToeplitzLinearOperator(torch.tensor([3.0, 1.0, 0.5]).double()), co.Closure),
    "toeplitz + diagonal": (
        lambda: lo.ToeplitzLinearOperator(torch.tensor([3.0, 1.0]).double()) + lo.DiagLinearOperator(m.vector(2)), None
    ),
    "lazy root": (
        lambda: lo.RootLinearOperator(lo.ToeplitzLinearOperator(torch.tensor([3.0, 1.0, 0.5]).double())), co.Closure
    ),
    "interpolated": (lambda: lo.DenseLinearOperator(m.pd(4))[[0, 0, 1]], co.LinearOperator),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_theirs_become_ours(name: str) -> None:
    build, kind = CONVERTED[name]
    theirs = build()
    M, A = theirs.to_dense().double(), co.from_linear_operator(theirs)
    assert kind is None or isinstance(A, kind)
    assert (A.shape, A.dtype) == (M.shape, torch.float64)
    V, U = m.general(M.shape[1], 2), m.general(M.shape[0], 2)
    assert relative_error(A @ V, M @ V) <= 1e-12
    assert relative_error(A.rmatvec(U), M.T @ U) <= 1e-12
    if A.is_symmetric:
        assert relative_error(M, M.T) <= 1e-12
    if A.is_psd:
        assert torch.linalg.eigvalsh(M)[0] >= -1e-12


def test_structure_and_facts_survive() -> None:
    assert co.from_linear_operator(CONVERTED["kronecker + δI"][0]()).explain("logdet").startswith("logdet: Kronecker")
    assert co.from_linear_operator(CONVERTED["toeplitz"][0]()).is_symmetric
    assert co.from_linear_operator(CONVERTED["lazy root"][0]()).is_psd
    toeplitz = CONVERTED["toeplitz"][0]()
    A = co.from_linear_operator(toeplitz, is_psd=True, lower_bound=1.0)
    assert (A.is_psd, A.lower_bound, repr(A)) == (True, 1.0, "ToeplitzLinearOperator(3)")
    b = randn(3)
    assert relative_error(A.solve(b), torch.linalg.solve(toeplitz.to_dense(), b)) <= 1e-6


def test_gradients_reach_their_tensors() -> None:
    root, constant, delta = m.general(5, 2).requires_grad_(), torch.tensor(2.0).double().requires_grad_(), m.positive(5)
    delta.requires_grad_()
    theirs = (lo.RootLinearOperator(root) * constant).add_diagonal(delta)
    dense = constant * root @ root.T + torch.diag(delta)
    found = torch.autograd.grad(co.from_linear_operator(theirs).logdet(), [root, constant, delta])
    expected = torch.autograd.grad(torch.logdet(dense), [root, constant, delta])
    assert all(relative_error(f, e) <= 1e-10 for f, e in zip(found, expected, strict=True))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"got Tensor; expected a linear_operator.LinearOperator.*Dense\(M\)"):
        co.from_linear_operator(m.pd(3))
    with pytest.raises(ShapeError, match=r"batch of shape \(2, 3, 3\).*Index the batch"):
        co.from_linear_operator(lo.DenseLinearOperator(torch.stack([m.pd(3), m.pd(3)])))
    S = co.Dense(m.pd(3)).to_linear_operator()
    with pytest.raises(ShapeError, match=r"diagonal of shape \(4,\).*expected \(\), \(1,\), \(N,\)"):
        S.add_diagonal(m.vector(4))
    with pytest.raises(ShapeError, match="asked for nothing"):
        S.inv_quad_logdet()
    with pytest.raises(ShapeError, match="only batches repeat"):
        S.repeat(2, 2, 1)
    with pytest.raises(UnsupportedError, match=r"no door to nowhere is open for Dense\(3\)"):
        through("nowhere", co.Dense(m.pd(3)))
