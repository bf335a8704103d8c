"""Lean layers have the Jacobian of PyTorch's own, at half the work, and refuse what they are not made for."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvops.errors import StaleOperatorError, UnsupportedError
from curvops.nets.forward import Network
from curvops.nets.kernels import LeanLayers
from curvops.nets.parameters import ParameterSelection
from curvops.nets.products import Linearisation


def norm(layer: nn.Module) -> nn.Module:
    """With statistics and an affine map that are not the trivial ones."""
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer.weight, 0.5, 2)
    return layer


def spread(layer: nn.Module) -> nn.Module:
    """With an affine map that is not the trivial one."""
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return layer


class Attention(nn.Module):
    """Of a sequence to itself."""

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.project, self.heads, self.options = nn.Linear(width, 3 * width), heads, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


MASK = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
"""Of three positions; the last sees none."""

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (5, 3)),
    "linear on positions": (lambda: nn.Linear(3, 4), (5, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (5, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 0), dilation=(1, 2)), (5, 2, 6, 7)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 4, 3, padding="same"), (5, 2, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (5, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (5, 2, 3, 4, 3)),
    "batch norm of features": (lambda: norm(nn.BatchNorm1d(3)), (5, 3)),
    "batch norm of images": (lambda: norm(nn.BatchNorm2d(3)), (5, 3, 4, 4)),
    "batch norm without affine map": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)),
        (5, 3, 4, 4),
    ),
    "layer norm": (lambda: spread(nn.LayerNorm(3)), (5, 3)),
    "layer norm of two axes": (lambda: spread(nn.LayerNorm((4, 3))), (5, 4, 3)),
    "layer norm without bias": (lambda: spread(nn.LayerNorm(3, bias=False)), (5, 2, 3)),
    "layer norm without affine map": (
        lambda: nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 2)),
        (5, 3),
    ),
    "gelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU()), (5, 3)),
    "gelu by tanh": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU("tanh")), (5, 3)),
    "relu in place, on positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), (5, 2, 3)),
    "silu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU()), (5, 3)),
    "silu in place": (lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(inplace=True)), (5, 3)),
    "attention": (lambda: Attention(4, heads=2), (5, 3, 4)),
    "attention, causal": (lambda: Attention(4, heads=2, is_causal=True), (5, 3, 4)),
    "attention, scaled": (lambda: Attention(4, heads=1, scale=0.3), (5, 3, 4)),
    "attention, masked": (lambda: Attention(4, heads=2, attn_mask=MASK), (5, 3, 4)),
    "attention, masked by numbers": (lambda: Attention(4, heads=2, attn_mask=3.0 * MASK.double()), (5, 3, 4)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
WHICH = pytest.mark.parametrize("which", [None, ["0.weight"], ["2"]], ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The layer between a scaling (so that its input needs a gradient) and a read-out."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(shape[-1]), nn.Tanh(), make(), nn.Tanh(), nn.Flatten()).double().eval()
    return model, randn(*shape)


@EVERY
@WHICH
@pytest.mark.parametrize("columns", [1, 3])
def test_jacobian(name, which, columns):
    model, x = network(name)
    J = reference.jacobian(model, x, which)
    lin = Linearisation(Network(model), ParameterSelection(model, which), x)
    V, U = randn(J.shape[-1], columns), randn(*J.shape[:-1], columns)
    assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13
    assert reference.relative_error(lin.vjp(U), torch.einsum("bcp,bck->pk", J, U)) < 1e-13


def test_half_of_the_work_of_double_backward_through_a_convolution():
    x, W = randn(4, 3, 8, 8).requires_grad_(), randn(5, 3, 3, 3).requires_grad_()

    def flops(lean: bool) -> int:
        if lean:
            with LeanLayers():
                f = F.conv2d(x, W)
        else:
            f = F.conv2d(x, W)
        u = torch.zeros_like(f, requires_grad=True)
        adjoint = torch.autograd.grad(f, (x, W), u, create_graph=True)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(adjoint, u, [torch.ones_like(t) for t in adjoint])
        return counter.get_total_flops()

    assert flops(lean=True) == 2 * (2 * 4 * 5 * 6 * 6 * 27)
    assert flops(lean=True) <= flops(lean=False)


def test_third_derivative_is_refused():
    W = randn(2, 3).requires_grad_()
    with LeanLayers():
        f = F.linear(randn(4, 3), W)
    u = torch.zeros_like(f, requires_grad=True)
    (adjoint,) = torch.autograd.grad(f, W, u, create_graph=True)
    with pytest.raises(UnsupportedError, match="HessianProduct"):
        torch.autograd.grad(adjoint.sum(), u, create_graph=True)


@EVERY
def test_an_operand_written_to_is_noticed(name):
    model, x = network(name)
    lin = Linearisation(Network(model), ParameterSelection(model), x)
    lin.jvp(randn(lin.selection.size, 1))
    with torch.no_grad():
        next(model[2].parameters()).mul_(2.0)
    with pytest.raises(StaleOperatorError):
        lin.jvp(randn(lin.selection.size, 1))
    with pytest.raises(StaleOperatorError):
        lin.vjp(randn(*lin.outputs.shape, 1))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@EVERY
def test_half_frozen(name, frozen):
    model, x = network(name)
    which = [n for n, _ in model.named_parameters() if not n.endswith(frozen)]
    J = reference.jacobian(model, x, which)
    lin = Linearisation(Network(model), ParameterSelection(model, which), x)
    V, U = randn(J.shape[-1], 1), randn(*J.shape[:-1], 1)
    assert reference.relative_error(lin.jvp(V), J @ V) < 1e-13
    assert reference.relative_error(lin.vjp(U), torch.einsum("bcp,bck->pk", J, U)) < 1e-13


def test_nothing_to_track_runs_plain():
    x, W = randn(4, 3), randn(2, 3)
    with LeanLayers():
        f = F.linear(x, W)
    assert not f.requires_grad
    assert torch.equal(f, x @ W.T)
