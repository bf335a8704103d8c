"""Either library gives the product, to rounding; the same bits each time; and autograd and vmap stay right."""

from __future__ import annotations

import pytest
import reference
import torch

from curvops.nets import matmul as module
from curvops.nets.matmul import matmul, with_product


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.fixture(params=[False, True], ids=["stock", "oneDNN"])
def library(request, monkeypatch):
    if request.param and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this build has no oneDNN")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("shape", [(160, 130), (2, 80, 130), (3, 130), (0, 130)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_product(library, dtype, shape, transposed):
    a = randn(*shape, dtype=dtype)
    b = randn(90, 130, dtype=dtype).t() if transposed else randn(130, 90, dtype=dtype)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    result = matmul(a, b)
    assert result.dtype == dtype
    assert result.shape == (*shape[:-1], 90)
    assert reference.relative_error(result.double(), a.double() @ b.double()) < tolerance or a.numel() == 0
    assert torch.equal(matmul(a, b), result)


def test_transposed_left_factor(library):
    a, b = randn(200, 110).t(), randn(200, 130)
    assert reference.relative_error(matmul(a, b).double(), a.double() @ b.double()) < 1e-6


def test_gradients_and_batches_pass(library):
    a, b, u = randn(150, 130).requires_grad_(), randn(130, 90), randn(150, 90)
    (grad,) = torch.autograd.grad(matmul(a, b), a, u)
    assert reference.relative_error(grad, u @ b.T) < 1e-6
    stacked = randn(3, 130, 90)
    result = torch.func.vmap(lambda c: matmul(a.detach(), c))(stacked)
    assert reference.relative_error(result, a.detach() @ stacked) < 1e-6


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", ["row", "expanded", "full", "transposed"])
@pytest.mark.parametrize("shape", [(160, 130), (2, 80, 130)], ids=str)
def test_with_a_sum(library, dtype, shape, form, in_place):
    a, b = randn(*shape, dtype=dtype), randn(90, 130, dtype=dtype).t()
    row = randn(90, dtype=dtype)
    full = randn(90, *shape[:-1], dtype=dtype).movedim(0, -1)
    sum_ = {"row": row, "expanded": row.expand(*shape[:-1], 90), "full": full.contiguous(), "transposed": full}[form]
    expected = sum_.double() + a.double() @ b.double()
    before = sum_.clone()
    result = with_product(sum_, a, b, in_place=in_place and form == "full")
    assert reference.relative_error(result.double(), expected) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(sum_, before) or in_place
    assert torch.equal(with_product(before, a, b), result)
