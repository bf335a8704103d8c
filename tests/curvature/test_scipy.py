"""SciPy's solvers run on curvatures as they stand, and its operators come back through `Closure.from_scipy`."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import scipy.sparse
import scipy.sparse.linalg as spla
import torch
from curvature_subjects import CURVATURES, KINDS, Counted, batches, built, oracle, randn
from untouched import untouched

import curvops as co
from curvops.errors import UnsupportedError
from curvops.testing.problems import problem

KIND = pytest.mark.parametrize("kind", KINDS)
DATA = batches(4)


def damped_pair(kind: str = "GGN", delta: float = 0.3, dtype: torch.dtype = torch.float64):
    model = Counted().to(dtype)
    data = [(x.to(dtype), y) for x, y in DATA]
    A = KINDS[kind](model, "classification", data).add_diagonal(delta)
    return A.to_scipy(), A.to_dense().double().numpy()


@KIND
def test_products_through_the_door(kind, dtype):
    p, M = problem("mlp"), oracle(kind, "mlp").numpy()
    S = built(kind, p, dtype).to_scipy()
    assert S.dtype == np.dtype(str(dtype)[6:])
    assert S.shape == M.shape
    V, U = randn(M.shape[1], 3).numpy(), randn(M.shape[0], 3).numpy()
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for got, expected in (
        (S.matvec(V[:, 0]), M @ V[:, 0]), (S.matvec(V[:, :1]), M @ V[:, :1]), (S.matmat(V), M @ V), (S @ V, M @ V),
        (S.rmatvec(U[:, 0]), M.T @ U[:, 0]), (S.rmatmat(U), M.T @ U), (S.H @ U, M.T @ U),
    ):  # fmt: skip
        assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
        assert got.shape == expected.shape


def test_the_network_is_untouched():
    model = Counted()
    with untouched(model):
        S = co.GGN(model, "classification", DATA).add_diagonal(1.0).to_scipy()
        spla.cg(S, np.ones(43))


@pytest.mark.parametrize("kind", CURVATURES)
def test_cg_and_gmres(kind):
    S, M = damped_pair(kind, delta=30.0)  # makes the Hessian positive definite, too
    b = randn(43).numpy()
    for solver in (spla.cg, spla.gmres):
        x, info = solver(S, b, rtol=1e-10)
        assert info == 0
        assert np.linalg.norm(M @ x - b) <= 1e-8 * np.linalg.norm(b)


def test_minres_on_an_indefinite_hessian():
    S, M = damped_pair("Hessian", delta=0.05)
    assert np.linalg.eigvalsh(M)[0] < 0
    b = randn(43).numpy()
    x, info = spla.minres(S, b, rtol=1e-12, maxiter=2000)
    assert info == 0
    assert np.linalg.norm(M @ x - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", CURVATURES)
def test_eigsh_and_lobpcg(kind):
    S, M = damped_pair(kind)
    exact = np.linalg.eigvalsh(M)
    assert np.allclose(spla.eigsh(S, k=4, which="LA", return_eigenvectors=False), exact[-4:], rtol=1e-9)
    start = randn(43, 2).numpy()  # three blocks of it must fit into the twelve distinct eigenvalues of a Fisher
    values, vectors = spla.lobpcg(S, start, largest=True, tol=1e-8, maxiter=200)
    assert np.allclose(np.sort(values), exact[-2:], rtol=1e-6)
    assert np.linalg.norm(M @ vectors - vectors * values) <= 1e-4 * exact[-1]


def test_svds_of_the_jacobian():
    J = co.Jacobian(Counted(), DATA)
    exact = np.linalg.svd(J.to_dense().numpy(), compute_uv=False)
    U, s, Vt = spla.svds(J.to_scipy(), k=5, random_state=0)
    assert np.allclose(np.sort(s)[::-1], exact[:5], rtol=1e-9)
    assert np.linalg.norm(J.to_dense().numpy() @ Vt.T - U * s) <= 1e-9 * exact[0]


def test_expm_multiply_and_onenormest():
    S, M = damped_pair()
    v = randn(43).numpy()
    values, vectors = np.linalg.eigh(-0.1 * M)
    exact = vectors @ (np.exp(values) * (vectors.T @ v))
    got = spla.expm_multiply(-0.1 * S, v, traceA=-0.1 * np.trace(M))
    assert np.linalg.norm(got - exact) <= 1e-10 * np.linalg.norm(exact)
    norm = np.abs(M).sum(0).max()
    estimate = spla.onenormest(S, t=4)
    assert 0.9 * norm <= estimate <= norm * (1 + 1e-12)  # a lower bound, and mostly exact


def test_float32_stays_float32():
    S, M = damped_pair(dtype=torch.float32, delta=1.0)
    assert S.dtype == np.float32
    b = randn(43).numpy().astype(np.float32)
    assert (S @ b).dtype == np.float32
    values = spla.eigsh(S, k=3, which="LA", return_eigenvectors=False)
    assert np.allclose(values, np.linalg.eigvalsh(M)[-3:], rtol=1e-4)


# ---------------------------------------------------------------- and back


def test_a_scipy_operator_joins_the_algebra():
    G = co.GGN(Counted(), "classification", DATA)
    prior = scipy.sparse.diags_array([np.full(42, -1.0), np.full(43, 2.5), np.full(42, -1.0)], offsets=[-1, 0, 1])
    P = co.Closure.from_scipy(prior, is_psd=True, lower_bound=0.5, name="Chain")
    assert P.dtype == torch.float64
    A = G + P
    M = G.to_dense() + torch.from_numpy(prior.toarray())
    assert A.is_psd
    assert A.lower_bound == 0.5
    b = randn(43)
    x = A.solve(b)
    assert float((M @ x - b).norm() / b.norm()) <= 1e-6
    assert float(A.logdet()) == pytest.approx(float(torch.logdet(M)), rel=1e-10)
    assert repr(A) == "GGN(P=43, N=11, classification) + Chain(43)"


def test_there_and_back_again():
    J = co.Jacobian(Counted(), DATA)
    back = co.Closure.from_scipy(J.to_scipy())
    v, u = randn(43), randn(33)
    assert reference.relative_error(back @ v, J @ v) <= 1e-15
    assert reference.relative_error(back.T @ u, J.T @ u) <= 1e-15
    one_way = co.Closure.from_scipy(spla.LinearOperator((4, 3), matvec=lambda x: np.ones(4), dtype=np.float64))
    with pytest.raises(UnsupportedError, match="rmatvec"):
        one_way.rmatvec(randn(4))
