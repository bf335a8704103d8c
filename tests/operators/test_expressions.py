"""Random expressions of the algebra, drawn by hypothesis, against the same expressions of dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvops.operators import LinearOperator
from curvops.testing.zoo import Case, zoo

Pair = tuple[LinearOperator, Tensor]

_SQUARE = {6: [case for case in zoo() if tuple(case.build()[1].shape) == (6, 6)]}
_LEAVES: list[Case] = _SQUARE[6]


def _leaf(index: int) -> Pair:
    return _LEAVES[index].build()


def _damped(pair: Pair, delta: float, as_vector: bool) -> Pair:
    A, M = pair
    d = torch.full((6,), delta, dtype=torch.float64) * torch.arange(1, 7) / 3 if as_vector else torch.tensor(delta)
    return A.add_diagonal(d if as_vector else delta), M + d * torch.eye(6, dtype=torch.float64)


def _scaled(pair: Pair, factor: float) -> Pair:
    return factor * pair[0], factor * pair[1]


def _binary(sign: str) -> Callable[[tuple[Pair, Pair]], Pair]:
    def apply(pairs: tuple[Pair, Pair]) -> Pair:
        (A, M), (B, N) = pairs
        if sign == "+":
            return A + B, M + N
        if sign == "-":
            return A - B, M - N
        return A @ B, M @ N

    return apply


def _inverse(pair: Pair) -> Pair:
    A, M = pair
    values = torch.linalg.svdvals(M)
    if float(values[-1]) < 1e-3 * float(values[0]) or float(values[-1]) < 1e-3 or "Closure" in repr(A):
        return pair  # a solve by iteration is only as good as its tolerance, and ill-conditioning compounds
    return A.inverse(), torch.linalg.inv(M)


_numbers = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
_leaves = st.integers(0, len(_LEAVES) - 1).map(_leaf)
_expressions = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(_binary("+")),
        st.tuples(inner, inner).map(_binary("-")),
        st.tuples(inner, inner).map(_binary("@")),
        st.tuples(inner, _numbers).map(lambda pair: _scaled(*pair)),
        st.tuples(inner, _numbers, st.booleans()).map(lambda drawn: _damped(*drawn)),
        inner.map(lambda pair: (pair[0].T, pair[1].T)),
        inner.map(_inverse),
    ),
    max_leaves=5,
)


def _scale(A: LinearOperator, M: Tensor) -> float:
    # Cancellation may leave a small matrix of large parts, whose rounding is that of the parts.
    sizes = [float(torch.linalg.matrix_norm(M, 2))]
    for child in A._children():
        if child.shape == (6, 6):
            sizes.append(_scale(child, child.to_dense()))
    return max(1.0, *sizes) ** (2 if "@" in repr(A) else 1)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_expressions)
def test_expression_is_its_dense_counterpart(pair: Pair) -> None:
    A, M = pair
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    scale = 1e-10 * _scale(A, M)
    iterative = "inverse(Closure" in repr(A)
    scale = scale * (1e5 if iterative else 1.0)
    assert torch.allclose(A @ V, M @ V, rtol=0, atol=scale)
    assert torch.allclose(A.to_dense(), M, rtol=0, atol=scale)
    assert torch.allclose(A.rmatvec(V), M.T @ V, rtol=0, atol=scale)
    assert torch.allclose(A.diagonal(), M.diagonal(), rtol=0, atol=scale)
    assert torch.allclose(A.trace(), M.trace(), rtol=0, atol=6 * scale)
    repr(A).encode("latin-1")
    if A.is_symmetric:
        assert torch.allclose(M, M.T, rtol=0, atol=scale)
        values = torch.linalg.eigvalsh(M)
        if A.is_psd:
            assert float(values[0]) >= -scale
        bound = A.lower_bound
        assert bound is None or bound <= float(values[0]) + scale


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_expressions)
def test_damped_gram_of_an_expression_solves_and_has_a_determinant(pair: Pair) -> None:
    A, M = pair
    if float(torch.linalg.matrix_norm(M, 2)) > 100:
        return
    damped, dense = (A @ A.T).add_diagonal(1.0), M @ M.T + torch.eye(6, dtype=torch.float64)
    b = torch.arange(6, dtype=torch.float64) - 2.0
    x, report = damped.solve(b, return_report=True)
    residual = float((dense @ x - b).norm() / b.norm())
    assert residual < 1e-5
    assert report.converged
    if damped.is_symmetric:
        assert torch.allclose(damped.logdet(), torch.logdet(dense), rtol=1e-6, atol=1e-5)
    sign, logabs = damped.slogdet()
    assert float(sign) == 1.0
    assert torch.allclose(logabs, torch.logdet(dense), rtol=1e-6, atol=1e-5)
