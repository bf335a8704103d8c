"""SciPy's solvers run on the exported operator, and SciPy operators multiply tensors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as spla
import torch
from torch import Tensor

from curvops.errors import ShapeError, UnsupportedError
from curvops.linalg.scipy import from_scipy, to_scipy

P = 60


def matrix(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(P, P, generator=generator, dtype=torch.float64)
    return J @ J.T / P + torch.eye(P, dtype=torch.float64)


def export(M: Tensor) -> spla.LinearOperator:
    return to_scipy(lambda V: M @ V, lambda V: M.T @ V, (M.shape[0], M.shape[1]), M.dtype, M.device)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_announces_its_dtype_and_takes_every_array(dtype: torch.dtype, numpy_dtype) -> None:
    M = matrix()[:, :40].to(dtype)
    A = export(M)
    assert A.dtype == numpy_dtype
    assert A.shape == (P, 40)
    atol = 1e-12 if dtype == torch.float64 else 1e-4
    x = np.random.default_rng(0).standard_normal((40, 3))
    exact = M.double().numpy() @ x
    frozen = x.copy()
    frozen.flags.writeable = False
    for V in (x, x.astype(np.float32), x.astype(np.float16).astype(np.float64), frozen, np.asfortranarray(x)):
        out = A @ V
        assert out.dtype == numpy_dtype
        np.testing.assert_allclose(out, M.double().numpy() @ V, atol=atol)
    np.testing.assert_allclose(A.matvec(x[:, 0]), exact[:, 0], atol=atol)
    np.testing.assert_allclose(A.matvec(x[:, :1]), exact[:, :1], atol=atol)
    np.testing.assert_allclose(A @ x[::-1], M.double().numpy() @ x[::-1], atol=atol)
    np.testing.assert_allclose(A @ (1j * x), 1j * exact, atol=atol)
    np.testing.assert_allclose(A @ np.arange(40), M.double().numpy() @ np.arange(40), rtol=1e-5, atol=atol)
    y = np.random.default_rng(1).standard_normal((P, 2))
    np.testing.assert_allclose(A.rmatmat(y), M.double().numpy().T @ y, atol=atol)
    np.testing.assert_allclose(A.rmatvec(y[:, 0]), M.double().numpy().T @ y[:, 0], atol=atol)
    np.testing.assert_allclose(A.T @ y, M.double().numpy().T @ y, atol=atol)


def test_the_array_given_is_not_aliased() -> None:
    A = to_scipy(lambda V: V.mul_(2), None, (5, 5), torch.float64)
    x = np.ones(5)
    np.testing.assert_array_equal(A @ x, 2 * np.ones(5))
    np.testing.assert_array_equal(x, np.ones(5))


def test_scipy_solvers_run() -> None:
    M = matrix()
    A, dense = export(M), M.numpy()
    b = np.random.default_rng(0).standard_normal(P)
    exact = np.linalg.solve(dense, b)
    for solver in (spla.cg, spla.gmres):
        x, info = solver(A, b, rtol=1e-10)
        assert info == 0
        np.testing.assert_allclose(x, exact, atol=1e-8)
    x, info = spla.minres(A, b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(x, exact, atol=1e-8)
    values = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(spla.eigsh(A, k=3, which="LA")[0], values[-3:], atol=1e-10)
    start = np.random.default_rng(0).standard_normal((P, 3))
    found = spla.lobpcg(A, start, tol=1e-9, maxiter=200)[0]
    np.testing.assert_allclose(np.sort(found), values[-3:], atol=1e-8)
    J = matrix(1)[:, :40]
    np.testing.assert_allclose(
        np.sort(spla.svds(export(J), k=3)[1]), np.sort(np.linalg.svd(J.numpy())[1])[-3:], atol=1e-10
    )
    power = spla.expm_multiply(-A, b, traceA=-float(np.trace(dense)))
    np.testing.assert_allclose(power, scipy.linalg.expm(-dense) @ b, atol=1e-10)
    # An estimate from below, rarely off by more than 3.
    assert np.linalg.norm(dense, 1) / 3 <= spla.onenormest(A) <= np.linalg.norm(dense, 1) * (1 + 1e-12)


def test_transposed_products_are_refused_without_one() -> None:
    A = to_scipy(lambda V: V, None, (5, 5), torch.float64)
    with pytest.raises(UnsupportedError, match="rmatmat"):
        A.rmatvec(np.ones(5))
    with pytest.raises(ShapeError, match="float16"):
        to_scipy(lambda V: V, None, (5, 5), torch.float16)


def test_from_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    M = matrix()[:, :40]
    V, W = torch.randn(40, 3, generator=generator).double(), torch.randn(P, 2, generator=generator).double()
    for operator in (M.numpy(), scipy.sparse.csr_array(M.numpy()), spla.aslinearoperator(M.numpy())):
        matmat, rmatmat = from_scipy(operator)
        torch.testing.assert_close(matmat(V), M @ V)
        torch.testing.assert_close(rmatmat(W), M.T @ W)
        assert matmat(V.float()).dtype == torch.float32
    with pytest.raises(ShapeError, match=r"expected \(40, K\)"):
        matmat(W)
    matmat, rmatmat = from_scipy(spla.LinearOperator((P, 40), matvec=lambda v: M.numpy() @ v, dtype=float))
    torch.testing.assert_close(matmat(V), M @ V)
    with pytest.raises(UnsupportedError, match="rmatvec"):
        rmatmat(W)
    with pytest.raises(UnsupportedError, match="complex"):
        from_scipy(1j * M.numpy())


def test_there_and_back() -> None:
    M = matrix()
    matmat, rmatmat = from_scipy(export(M))
    V = torch.eye(P, dtype=torch.float64)
    torch.testing.assert_close(matmat(V), M)
    torch.testing.assert_close(rmatmat(V), M.T)
