"""Gradients reach v, b, δ and c, by finite differences; never twice through a kept factorisation's graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from curvops.operators import BlockDiagonal, Dense, Diagonal, Eigen, Kronecker, LinearOperator, LowRank
from curvops.operators.methods import CG, MINRES, SLQ, Hutchinson, Lanczos
from curvops.testing.zoo import Parts

m = Parts(torch.float64, "cpu")
LAYOUT = {"w": slice(0, 4), "b": slice(4, 6)}


def _times_transpose(A: LinearOperator) -> LinearOperator:
    return A @ A.T


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "dense": lambda: Dense(m.pd(6)),
    "diagonal": lambda: Diagonal(m.positive(6)),
    "Kronecker": lambda: Kronecker(m.pd(3), m.pd(2)),
    "blocks": lambda: BlockDiagonal(Kronecker(m.pd(2), m.pd(2, 1)), m.pd(2), layout=LAYOUT),
    "Eigen": lambda: Eigen(m.orthonormal(6), m.positive(6)),
    "low rank": lambda: LowRank(m.general(6, 2)),
    "closure": lambda: m.closure(m.pd(6), is_psd=True, lower_bound=0.49),
    "product": lambda: _times_transpose(m.closure(m.general(6, 4))),
}
PRECISE = CG(rtol=1e-13)


def _solve(A: LinearOperator, b: Tensor) -> Tensor:
    closed = A._exact("solve") is not None
    return A.solve(b, None if closed or not A.is_psd else PRECISE)


def _needs(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize("name", OPERATORS)
def test_scalar_damping_factor_and_vectors(name: str) -> None:
    A = OPERATORS[name]()
    v, b, c, delta = _needs(m.vector(6), m.general(6, 2), torch.tensor(1.3).double(), torch.tensor(0.7).double())
    assert gradcheck(lambda v, c: (c * A) @ v, (v, c))
    assert gradcheck(lambda v, d: A.add_diagonal(d).quadratic_form(v), (v, delta))
    assert gradcheck(lambda b, c, d: _solve((c * A).add_diagonal(d), b), (b, c, delta))
    assert gradcheck(lambda c, d: (c * A).add_diagonal(d).logdet(), (c, delta))
    assert gradcheck(lambda c, d: (c * A.add_diagonal(d)).slogdet()[1], (c, delta))
    assert gradcheck(lambda c, d: (c * A).add_diagonal(d).trace(), (c, delta))
    assert gradcheck(lambda c, d: (c * A).add_diagonal(d).diagonal(), (c, delta))


@pytest.mark.parametrize("name", OPERATORS)
def test_vector_damping(name: str) -> None:
    A = OPERATORS[name]()
    b, delta = _needs(m.vector(6), m.positive(6, 1))
    assert gradcheck(lambda b, d: _solve(A.add_diagonal(d), b), (b, delta))
    assert gradcheck(lambda d: A.add_diagonal(d).logdet(), (delta,))


def test_damping_by_name() -> None:
    A = OPERATORS["blocks"]()
    w, b = _needs(torch.tensor(0.5).double(), m.positive(2))
    assert gradcheck(lambda w, b: A.add_diagonal({"w": w, "b": b}).logdet(), (w, b))
    assert gradcheck(lambda w, b: A.add_diagonal({"w": w, "b": b}).solve(m.vector(6)), (w, b))


def test_tensors_held_by_structures() -> None:
    M, d, U, s = _needs(m.pd(4), m.positive(4), m.general(4, 2), m.positive(2))
    v = m.vector(4)

    def symmetric(M: Tensor) -> Dense:
        return Dense((M + M.T) / 2)

    assert gradcheck(lambda M: symmetric(M).logdet(), (M,))
    assert gradcheck(lambda M: symmetric(M).solve(v), (M,))
    assert gradcheck(lambda d: Diagonal(d).solve(v), (d,))
    assert gradcheck(lambda d: Diagonal(d).inverse().logdet(), (d,))
    assert gradcheck(lambda U, s, d: (LowRank(U, s) + Diagonal(d)).solve(v), (U, s, d))
    assert gradcheck(lambda U, s, d: (LowRank(U, s) + Diagonal(d)).logdet(), (U, s, d))
    assert gradcheck(lambda M, d: Kronecker(symmetric(M), Diagonal(d[:2])).add_diagonal(d[3]).logdet(), (M, d))


def test_two_backward_passes_through_one_operator() -> None:
    delta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    A = Kronecker(m.pd(3), m.pd(2)).add_diagonal(delta)
    gradients = []
    for _ in range(2):
        A.logdet().backward()
        gradients.append(float(delta.grad))  # type: ignore[arg-type]
        delta.grad = None
    exact = float(torch.linalg.inv(torch.kron(m.pd(3), m.pd(2)) + 0.5 * m.eye(6)).trace())
    assert gradients == pytest.approx([exact, exact], rel=1e-12)


@pytest.mark.parametrize("method", [CG(rtol=1e-13), MINRES(rtol=1e-13)], ids=str)
def test_iterative_solves_are_differentiated_once_and_say_so(method: object) -> None:
    A = OPERATORS["closure"]()
    b, delta = _needs(m.vector(6), torch.tensor(0.7).double())
    assert gradcheck(lambda b, d: A.add_diagonal(d).solve(b, method), (b, delta))  # type: ignore[arg-type]
    x = A.add_diagonal(delta).solve(b, method)  # type: ignore[arg-type]
    (g,) = torch.autograd.grad((x**2).sum(), delta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.backward()


def test_exact_solves_and_products_are_differentiated_twice() -> None:
    delta, v = _needs(torch.tensor(0.7).double(), m.vector(6))
    K = Kronecker(m.pd(3), m.pd(2))
    assert torch.autograd.gradgradcheck(lambda d: K.add_diagonal(d).logdet(), (delta,))
    assert torch.autograd.gradgradcheck(lambda d, v: K.add_diagonal(d).solve(v), (delta, v))
    assert torch.autograd.gradgradcheck(lambda v: OPERATORS["closure"]().quadratic_form(v), (v,))


def test_estimated_logdet_and_trace_have_estimated_gradients() -> None:
    M = m.pd(40)
    delta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    A = m.closure(M, is_psd=True, lower_bound=0.49).add_diagonal(delta)
    value = A.logdet(SLQ(probes=200, steps=30))
    (slope,) = torch.autograd.grad(value, delta)
    assert float(slope) == pytest.approx(float(torch.linalg.inv(M + m.eye(40)).trace()), rel=0.05)
    (slope,) = torch.autograd.grad(A.trace(Hutchinson()), delta)
    assert float(slope) == pytest.approx(40.0, rel=1e-12)
    (slope,) = torch.autograd.grad(A.logdet(SLQ(probes=20, steps=30)), delta, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.backward()
    d = delta * torch.ones(40, dtype=torch.float64)
    estimate = m.closure(M, is_psd=True).add_diagonal(d).diagonal(Hutchinson(probes=5))
    (slope,) = torch.autograd.grad(estimate[3], delta)
    assert float(slope) == pytest.approx(1.0, rel=1e-12)


def test_functions_by_lanczos_have_the_gradient_of_the_vector() -> None:
    A = OPERATORS["closure"]()
    (v,) = _needs(m.vector(6))
    w = m.vector(6, 1)
    (g,) = torch.autograd.grad(A.sqrt_matvec(v, Lanczos()) @ w, v)
    assert torch.allclose(g, Dense(m.pd(6)).sqrt_matvec(w), atol=1e-5)


def test_no_graph_where_nothing_asks_for_one() -> None:
    for build in OPERATORS.values():
        A = build().add_diagonal(0.5)
        before = A.matvec_count
        x = _solve(A, m.vector(6))
        assert not x.requires_grad
        assert not A.logdet().requires_grad
        delta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            assert not _solve(build().add_diagonal(delta), m.vector(6)).requires_grad
        assert A.matvec_count > before or build()._exact("solve")
