"""Hessian products through our layers are those through PyTorch's."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvops.errors import UnsupportedError
from curvops.nets.curved import CurvedLayers
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection
from curvops.nets.products import HessianProduct


class Squares:
    """½ Σ sin(f)²: curved, so that both terms of the Hessian count."""

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * f.sin().square().sum()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 2, bias))


def flattened_hessian(model: nn.Module, x: Tensor, names: list[str] | None) -> Tensor:
    """By double backward in float64, entry after entry."""
    model, x = model.double(), x.double()
    parameters = [p for n, p in model.named_parameters() if names is None or n in names]
    loss = Squares().loss(model(x), x)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in g]
    return torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", [None, ["0.weight"], ["2.weight", "4.weight"]], ids=str)
@pytest.mark.parametrize("columns", [1, 3])
def test_hessian(shape, bias, which, columns):
    model, x = network(bias), randn(*shape)
    product = HessianProduct(Network(model), ParameterSelection(model, which), Squares(), x, x)
    V = randn(product.selection.size, columns)
    result = product.matmat(V)
    H = flattened_hessian(model, x, which)
    assert reference.relative_error(result.double(), H @ V.double()) < 5e-6


OTHERS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "layer norm": lambda: spread(nn.LayerNorm(4)),
    "layer norm without bias": lambda: spread(nn.LayerNorm(4, bias=False)),
    "layer norm without affine map": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "layer norm of two axes": lambda: spread(nn.LayerNorm((2, 4))),
    "layer norm with a large epsilon": lambda: spread(nn.LayerNorm(4, eps=0.5)),
}


def spread(layer: nn.Module) -> nn.Module:
    """With an affine map that is not the trivial one."""
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return layer


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("which", [None, ["0.weight"], ["3.weight", "3.bias"], "norms"], ids=str)
@pytest.mark.parametrize("columns", [1, 3])
def test_layers(name, which, columns):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), OTHERS[name](), nn.Tanh(), nn.Linear(4, 4), OTHERS[name](), nn.Linear(4, 2)]
    model, x = nn.Sequential(*layers).double(), randn(6, 2, 3).double()
    if which == "norms":
        which = [n for n, _ in model.named_parameters() if n[0] in "14"] or None
    product = HessianProduct(Network(model), ParameterSelection(model, which), Squares(), x, x)
    V = randn(product.selection.size, columns).double()
    H = flattened_hessian(model, x, which)
    assert reference.relative_error(product.matmat(V), H @ V) < 1e-13


def test_the_layers_are_used():
    W = randn(2, 3).requires_grad_()
    with CurvedLayers():
        f = nn.functional.linear(randn(4, 3), W)
        assert "_LinearBackward" in type(f.grad_fn).__name__
        for function in (torch.relu, Tensor.relu, nn.functional.relu, nn.functional.gelu, nn.functional.silu):
            assert "Function" in str(type(function(f).grad_fn).__mro__)


def test_checkpointed_layers_run_plain():
    W = randn(2, 3).requires_grad_()
    with CurvedLayers():
        recomputed = checkpoint(nn.functional.linear, randn(4, 3), W, use_reentrant=False)
    assert "_LinearBackward" not in type(recomputed.grad_fn).__name__


@pytest.mark.parametrize("function", [torch.relu, nn.functional.gelu, nn.functional.silu, None])
def test_third_derivative_is_refused(function):
    x, W = randn(4, 3), randn(2, 3).requires_grad_()
    with CurvedLayers():
        f = nn.functional.linear(x, W) if function is None else function(x @ W.T)
    (g,) = torch.autograd.grad(f.square().sum(), W, create_graph=True)
    with pytest.raises(UnsupportedError, match="no further"):
        torch.autograd.grad(g.square().sum(), W, create_graph=True)
