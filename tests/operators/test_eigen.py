"""Thin bases: vectors of every share in the range, at every scale, and derivatives in what lies outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvops.operators.diagonal import Identity
from curvops.operators.eigen import Eigen
from curvops.operators.kronecker import Kronecker
from curvops.operators.permuted import Permuted

P, R, DELTA = 60, 20, 1e-6


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def basis(P: int, R: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(draw(P, R)).Q.to(dtype)


def values(R: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.logspace(0, -2, R, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-4, 1e-2, 0.3, 1.0])
def test_inverses_are_backward_stable_column_by_column(dtype, scale, share, device):
    Q, s = basis(P, R, dtype), values(R, dtype)
    # A column as asked for, one anywhere, one of zeros.
    column = Q @ draw(R, 1).to(dtype) + share * draw(P, 1).to(dtype)
    V = torch.cat([column, draw(P, 1).to(dtype), torch.zeros(P, 1, dtype=dtype)], 1)
    A = Eigen(Q.to(device), s.to(device)).add_diagonal(DELTA)
    X = (A.inverse() @ (scale * V).to(device)).cpu().double() / scale
    M = Q.double() @ torch.diag(s.double()) @ Q.double().T + DELTA * torch.eye(P, dtype=torch.float64)
    residual, allowed = (M @ X - V.double()).norm(dim=0), V.double().norm(dim=0) + X.norm(dim=0)
    assert bool((residual <= 20 * torch.finfo(dtype).eps * allowed).all())


ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(0))
UNITS = torch.eye(8, dtype=torch.float64)[:, [0, 3, 5]]
THIN = {
    "dense": lambda: Eigen(basis(24, 7), values(7)),
    "units": lambda: Eigen(UNITS, values(3)),
    "thin ⊗ thin": lambda: Eigen(Kronecker(UNITS, basis(3, 2)), values(6)),
    "thin ⊗ square": lambda: Eigen(Kronecker(UNITS, basis(3, 3)), values(9)),
    "identity ⊗ thin": lambda: Eigen(Kronecker(Identity(3, torch.float64, torch.device("cpu")), UNITS), values(9)),
    "permuted": lambda: Permuted(Eigen(Kronecker(UNITS, basis(3, 2)), values(6)), ORDER)._spectral(),
    "no columns": lambda: Eigen(basis(5, 2)[:, :0], values(0)),
}


@pytest.mark.parametrize("name", THIN)
@pytest.mark.parametrize("delta", [1.0, 1e-6, 1e-12])
def test_diagonals_of_inverses(name, delta):
    A = THIN[name]()
    Q, s = A.Q.to_dense(), A.values
    square = torch.linalg.qr(torch.cat([Q, torch.eye(len(Q), dtype=Q.dtype)], 1)).Q
    all_values = torch.cat([s, torch.zeros(len(Q) - len(s), dtype=Q.dtype)]) + delta
    expected = (square**2) @ (1 / all_values)
    found = A.add_diagonal(delta).inverse().diagonal()
    assert ((found - expected).abs() / expected).max() < 1e-11


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rest", [0.0, 1e-3, 5.0])
def test_derivatives_on_every_road(inside, rest):
    Q, s = basis(9, 4), values(4)
    v = (Q @ draw(4) if inside else draw(9)).requires_grad_()
    s, rest = s.requires_grad_(), torch.tensor(rest, dtype=torch.float64, requires_grad=True)

    def product(s: Tensor, rest: Tensor, v: Tensor) -> Tensor:
        return Eigen(Q, s, rest) @ v

    assert torch.autograd.gradcheck(product, (s, rest, v))
    tangent = torch.ones_like(rest)
    _, found = torch.func.jvp(lambda r: Eigen(Q, s.detach(), r) @ v.detach(), (rest.detach(),), (tangent,))
    torch.testing.assert_close(found, (v - Q @ (Q.T @ v)).detach(), rtol=0, atol=1e-13)
