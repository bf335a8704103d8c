"""SciPy's solvers and optimisers on the curvatures of a small network, against dense answers by double backward.

That every kind of curvature passes through the door as it should is tested in `curvature/test_scipy.py`; here it is the
solvers' own options that are used: damping, shifts, preconditioners, shift-invert, time grids, second-order optimisers.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import reference
import scipy.optimize as opt
import scipy.sparse.linalg as spla
import torch
from curvature_subjects import randn
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from untouched import untouched

import curvops as co

DELTA = 0.5
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
Array = np.ndarray


@cache
def _trained(regression: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A 3-5-2 network after a few steps of gradient descent on 24 data, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = randn(24, 3, seed=1)
    signal = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1) + 0.3 * randn(24, 2, seed=2)
    y = signal if regression else signal.argmax(1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        _nll(regression)(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model, x, y


def _nll(regression: bool) -> reference.LossFn:
    return reference.nll(_name(regression))


def _name(regression: bool) -> str:
    return "regression" if regression else "classification"


def subject(
    dtype: torch.dtype = torch.float64, regression: bool = False
) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    """The network (a copy), its batch, and its likelihood."""
    model, x, y = _trained(regression)
    data = (x.to(dtype), y.to(dtype) if regression else y)
    return copy.deepcopy(model).to(dtype), data, _name(regression)


@cache
def dense(kind: str, regression: bool = False) -> Array:
    """The matrix of that kind in float64, by loops."""
    model, x, y = _trained(regression)
    if kind == "Jacobian":
        return reference.jacobian(model, x).flatten(0, 1).numpy()
    oracle = reference.ggn if kind == "GGN" else reference.hessian
    return oracle(model, _nll(regression), x, y).numpy()


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------- linear systems


def test_damped_least_squares_is_a_gauss_newton_step():
    model, (x, y), likelihood = subject(regression=True)
    J = co.Jacobian(model, (x, y))
    with untouched(model):
        r = (y - J.outputs.reshape(y.shape)).flatten()
        M = dense("Jacobian", regression=True)
        expected = np.linalg.solve(M.T @ M + DELTA * np.eye(M.shape[1]), M.T @ r.numpy())
        A = co.GGN(model, likelihood, (x, y)).add_diagonal(DELTA)
        for step in (
            spla.lsmr(J.to_scipy(), r.numpy(), damp=DELTA**0.5, atol=1e-11, btol=1e-11, maxiter=100)[0],
            spla.lsqr(J.to_scipy(), r.numpy(), damp=DELTA**0.5, atol=1e-11, btol=1e-11, iter_lim=100)[0],
            A.solve(J.rmatvec(r), co.CG(rtol=1e-11)).numpy(),
        ):
            assert relative(step, expected) <= 1e-8


@pytest.mark.parametrize("solver", [spla.cg, spla.bicgstab, spla.minres, spla.gmres, spla.lgmres])
def test_solvers_preconditioned_by_kfac(solver, dtype):
    model, data, likelihood = subject(dtype)
    A = co.GGN(model, likelihood, data).add_diagonal(DELTA)
    P = co.KFAC(model, likelihood, data).add_diagonal(DELTA).inverse().to_scipy()
    b = randn(A.shape[0], dtype=dtype).numpy()
    expected = np.linalg.solve(dense("GGN") + DELTA * np.eye(len(b)), b.astype(np.float64))
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    with untouched(model):
        x, info = solver(A.to_scipy(), b, rtol=rtol, maxiter=500, M=P)
    assert info == 0
    assert relative(x, expected) <= TOLERANCE[dtype]


def test_gmres_where_symmetry_is_lost():
    model, data, likelihood = subject()
    A = co.GGN(model, likelihood, data).add_diagonal(DELTA) @ co.Hessian(model, likelihood, data).add_diagonal(20.0)
    M = (dense("GGN") + DELTA * np.eye(32)) @ (dense("Hessian") + 20.0 * np.eye(32))
    b = randn(32).numpy()
    x, info = spla.gmres(A.to_scipy(), b, rtol=1e-12, restart=40)
    assert info == 0
    assert relative(x, np.linalg.solve(M, b)) <= 1e-8


def test_minres_with_a_shift():
    model, data, likelihood = subject()
    M, b = dense("Hessian"), randn(32).numpy()
    assert np.linalg.eigvalsh(M)[0] < 0
    x, info = spla.minres(co.Hessian(model, likelihood, data).to_scipy(), b, shift=-DELTA, rtol=1e-13, maxiter=1000)
    assert info == 0
    assert relative(x, np.linalg.solve(M + DELTA * np.eye(32), b)) <= 1e-7


# ---------------------------------------------------------------- eigenvalues and singular values


@pytest.mark.parametrize("which", ["LA", "SA", "BE", "LM"])
def test_eigsh_of_a_hessian(which, dtype):
    model, data, likelihood = subject(dtype)
    exact = np.linalg.eigvalsh(dense("Hessian"))
    pick = {"LA": exact[-4:], "SA": exact[:4], "BE": exact[[0, 1, -2, -1]]}
    values, vectors = spla.eigsh(co.Hessian(model, likelihood, data).to_scipy(), k=4, which=which, v0=np.ones(32))
    expected = pick.get(which, np.sort(exact[np.argsort(np.abs(exact))[-4:]]))
    rounding = 1e-10 if dtype == torch.float64 else 2e-5
    assert np.abs(np.sort(values) - expected).max() <= rounding * np.abs(exact).max()
    assert values.dtype == np.dtype(str(dtype)[6:])
    assert np.linalg.norm(dense("Hessian") @ vectors - vectors * values) <= 20 * rounding * np.abs(exact).max()


def test_shift_invert_through_our_solves():
    model, data, likelihood = subject()
    H = co.Hessian(model, likelihood, data)
    inverse = H.add_diagonal(0.25).inverse()
    exact = np.linalg.eigvalsh(dense("Hessian"))
    nearest = np.sort(exact[np.argsort(np.abs(exact + 0.25))[:3]])
    # The products of an inverse are solves to 1e-6, and eigenvalues from them are as good.
    values = spla.eigsh(H.to_scipy(), k=3, sigma=-0.25, OPinv=inverse.to_scipy(), return_eigenvectors=False, tol=1e-6)
    assert np.allclose(np.sort(values), nearest, atol=1e-5 * np.abs(exact).max())


def test_lobpcg_preconditioned(dtype):
    model, data, likelihood = subject(dtype)
    A = co.GGN(model, likelihood, data).add_diagonal(DELTA)
    start = randn(32, 3, dtype=dtype).numpy()
    P = co.DiagonalGGN(model, likelihood, data).add_diagonal(DELTA).inverse().to_scipy()
    exact = np.linalg.eigvalsh(dense("GGN") + DELTA * np.eye(32))
    double = dtype == torch.float64
    values, _ = spla.lobpcg(A.to_scipy(), start, M=P, largest=True, tol=1e-7 if double else 1e-3, maxiter=200)
    assert np.allclose(np.sort(values), exact[-3:], rtol=1e-8 if double else 1e-3)


@pytest.mark.parametrize("solver", ["arpack", "propack"])
def test_svds(solver):
    model, data, _ = subject()
    J = co.Jacobian(model, data).to_scipy()
    exact = np.linalg.svd(dense("Jacobian"), compute_uv=False)
    values = spla.svds(J, k=3, solver=solver, return_singular_vectors=False, rng=np.random.default_rng(0), tol=1e-10)
    assert np.allclose(np.sort(values), np.sort(exact[:3]), rtol=1e-7)


# ---------------------------------------------------------------- functions and norms


def test_gradient_flow_on_a_grid_of_times():
    model, data, likelihood = subject()
    M, v = -dense("Hessian") / 10, randn(32).numpy()
    S = (co.Hessian(model, likelihood, data) * -0.1).to_scipy()
    flow = spla.expm_multiply(S, v, start=0.0, stop=1.0, num=4, endpoint=True, traceA=float(np.trace(M)))
    values, vectors = np.linalg.eigh(M)
    for t, got in zip(np.linspace(0, 1, 4), flow, strict=True):
        assert relative(got, vectors @ (np.exp(t * values) * (vectors.T @ v))) <= 1e-10


def test_one_norm(dtype):
    model, data, likelihood = subject(dtype)
    exact = np.abs(dense("Hessian")).sum(0).max()
    estimate = spla.onenormest(co.Hessian(model, likelihood, data).to_scipy(), t=5)
    assert 0.9 * exact <= estimate <= exact * (1 + 1e-5)


# ---------------------------------------------------------------- optimisers


class Objective:
    """Σ −log p + ½δ‖θ‖² as a function of θ; its Hessian is an operator, built anew where the parameters are."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.data, self.likelihood = subject(dtype)
        self.dtype = dtype
        self._hessian: tuple[bytes, spla.LinearOperator] | None = None
        self.start = parameters_to_vector(self.model.parameters()).detach().double().numpy()

    def _at(self, theta: Array) -> Tensor:
        moved = torch.tensor(theta, dtype=self.dtype)
        vector_to_parameters(moved, self.model.parameters())
        x, y = self.data
        return _nll(False)(self.model(x), y) + 0.5 * DELTA * sum(p.square().sum() for p in self.model.parameters())

    def value(self, theta: Array) -> float:
        return float(self._at(theta).detach())

    def gradient(self, theta: Array) -> Array:
        return reference.gradient(self._at(theta), list(self.model.parameters())).double().numpy()

    def matrix(self, theta: Array) -> Array:
        """The dense Hessian, row by row by double backward."""
        tensors = list(self.model.parameters())
        g = reference.gradient(self._at(theta), tensors, create_graph=True)
        return torch.stack([reference.gradient(entry, tensors) for entry in g]).double().numpy()

    def hessian(self, theta: Array) -> spla.LinearOperator:
        """Kept while θ stays, so that the products of one step share their graphs.

        The optimiser may look at other points before it multiplies again: `snapshot=True` ties the operator to θ.
        """
        if self._hessian is None or self._hessian[0] != theta.tobytes():
            self._at(theta)
            H = co.Hessian(self.model, self.likelihood, self.data, snapshot=True)
            self._hessian = (theta.tobytes(), H.add_diagonal(DELTA).to_scipy())
        return self._hessian[1]

    def product(self, theta: Array, p: Array) -> Array:
        return self.hessian(theta) @ p


@cache
def by_dense_hessians() -> float:
    """The minimum by SciPy's exact trust-region method on matrices from double backward."""
    f = Objective()
    return opt.minimize(f.value, f.start, jac=f.gradient, hess=f.matrix, method="trust-exact", tol=1e-6).fun


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "Newton-CG"])
def test_second_order_optimisers_with_hessian_products(method):
    f = Objective()
    found = opt.minimize(f.value, f.start, jac=f.gradient, hessp=f.product, method=method, tol=1e-6)
    assert np.linalg.norm(f.gradient(found.x)) <= 1e-4
    assert found.fun == pytest.approx(by_dense_hessians(), rel=1e-6)
    assert np.linalg.eigvalsh(f.matrix(found.x))[0] > 0  # a minimum, and no saddle
    assert found.nit < 60


def test_trust_constr_takes_the_operator_itself():
    f = Objective()
    found = opt.minimize(
        f.value, f.start, jac=f.gradient, hess=f.hessian, method="trust-constr", options={"gtol": 1e-6}
    )
    assert found.fun == pytest.approx(by_dense_hessians(), rel=1e-6)


def test_an_optimiser_in_float32():
    f = Objective(torch.float32)
    found = opt.minimize(f.value, f.start, jac=f.gradient, hessp=f.product, method="trust-ncg", options={"gtol": 1e-3})
    assert found.fun == pytest.approx(by_dense_hessians(), rel=1e-5)


def test_least_squares_with_a_jacobian_operator():
    model, (x, y), _ = subject(regression=True)
    start = parameters_to_vector(model.parameters()).detach().numpy()

    def residual(theta: Array) -> Array:
        vector_to_parameters(torch.tensor(theta), model.parameters())
        return (model(x) - y).flatten().detach().numpy()

    def jacobian(theta: Array) -> spla.LinearOperator:
        residual(theta)
        return co.Jacobian(model, (x, y), snapshot=True).to_scipy()  # used after the next residual, too

    options = {"method": "trf", "max_nfev": 8}
    found = opt.least_squares(residual, start, jac=jacobian, tr_solver="lsmr", **options)
    exact = opt.least_squares(
        residual, start, jac=lambda t: (residual(t), reference.jacobian(model, x).flatten(0, 1).numpy())[1],
        tr_solver="lsmr", **options,
    )  # fmt: skip
    assert found.cost < 0.5 * 0.5 * np.sum(residual(start) ** 2)
    assert found.cost == pytest.approx(exact.cost, rel=1e-4)
