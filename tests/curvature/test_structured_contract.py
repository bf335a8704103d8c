"""What every structured curvature promises beside its numbers: memory, what is kept, and no trace on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from untouched import untouched

from curvops.curvature.matrixfree import GGN
from curvops.curvature.structured import (
    EKFAC,
    KFAC,
    BlockEF,
    BlockGGN,
    BlockHessian,
    DiagonalEF,
    DiagonalGGN,
    DiagonalHessian,
    low_rank,
)
from curvops.linalg import dense
from curvops.testing.problems import problem


def _low_rank(model: nn.Module, likelihood: Any, data: Any) -> Any:
    return low_rank(GGN(model, likelihood, data), 3)


KINDS: dict[str, Callable[..., Any]] = {
    **{k.__name__: k for k in (DiagonalGGN, DiagonalEF, DiagonalHessian, BlockGGN, BlockEF, BlockHessian, KFAC, EKFAC)},
    "KFAC, joint": lambda *a: KFAC(*a, weight_and_bias="joint"),
    "EKFAC, joint, reduce": lambda *a: EKFAC(*a, weight_and_bias="joint", approx="reduce"),
    "KFAC, mc": lambda *a: KFAC(*a, fisher="mc", num_samples=2),
    "KFAC, dense fallback": lambda *a: KFAC(*a, fallback="full"),
    "low_rank": _low_rank,
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


class Planted(Exception):
    """The failure that a test planted."""


class _Raising(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Planted


class Failing(nn.Module):
    """Linear layers and a norm, which fail at the n-th forward, or in every backward (n = 0)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.a(x)))
        CALLS.append(1)
        if self.at and len(CALLS) >= self.at:
            raise Planted
        return self.b(_Raising.apply(h) if self.at == 0 else h)


CALLS: list[int] = []


@EVERY_KIND
class TestNothingIsLeft:
    def test_after_success(self, kind):
        for name in ("layernorm", "lstm", "tied"):
            p = problem(name)
            model = p.model()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            seen: list[int] = []
            handle = next(model.children()).register_forward_hook(lambda *_, seen=seen: seen.append(1))
            with untouched(model):
                kind(model, p.loss(), p.data()).to_dense()
            assert seen  # the user's hook saw the forwards
            handle.remove()

    @pytest.mark.parametrize("at", [0, 1, 2, 3])
    def test_after_a_failure_in_the_middle(self, kind, at):
        CALLS.clear()
        model = Failing(at).double()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        handle = model.a.register_forward_hook(lambda *_: None)
        g = torch.Generator().manual_seed(0)
        batches = [(torch.randn(4, 3, generator=g, dtype=torch.float64), torch.arange(4) % 2) for _ in range(3)]
        with untouched(model), pytest.raises(Planted):
            kind(model, "classification", batches).to_dense()
        handle.remove()

    def test_after_an_interrupt_between_batches(self, kind):
        p = problem("mlp")
        model, batch = p.model(), p.data()

        class Interrupted(list):
            def __iter__(self) -> Any:
                yield batch
                raise KeyboardInterrupt

        with untouched(model), pytest.raises(KeyboardInterrupt):
            kind(model, p.loss(), Interrupted()).to_dense()


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes():
                self.entries = max(self.entries, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize(("kind", "columns"), [(DiagonalGGN, 10), (DiagonalEF, 1), (KFAC, 10)])
def test_memory_is_that_of_the_activations(kind, columns):
    B, C, width = 64, 10, 100
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, C))
    model = model.double()
    g = torch.Generator().manual_seed(0)
    data = (torch.randn(B, width, generator=g, dtype=torch.float64), torch.arange(B) % C)
    operator = kind(model, "classification", data)
    with Largest() as largest:
        operator.diagonal()
    P = operator.shape[0]
    # All of P, a layer's derivatives for every column, nothing of the size B x P or B x C x P.
    assert largest.entries <= 2 * max(P, B * columns * width)
    assert largest.entries < B * P / 10


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_layer_wider_than_the_batch_has_no_factor_of_its_width_squared(kind, fisher):
    B, d, C = 8, 20_000, 3
    model = nn.Linear(d, C, bias=False).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, d, generator=g, dtype=torch.float64)
    K = kind(model, "classification", (x, torch.arange(B) % C), fisher=fisher)
    v = torch.randn(d * C, generator=g, dtype=torch.float64)
    with Largest() as largest:
        Kv, diagonal = K @ v, K.diagonal()
        damped = K.add_diagonal(0.5)
        logdet, solved = damped.logdet(), damped.solve(v)
        damped.inv_sqrt_matvec(v), damped.diagonal()
    assert largest.entries < 10 * d * B * C  # d² entries are 80 times as many
    # K = (L ⊗ X)ᵀ(L ⊗ X) in the basis of the inputs: all that is not zero shows in products with them.
    X = torch.kron(torch.eye(C, dtype=torch.float64), torch.linalg.qr(x.T).Q.contiguous())
    small = X.T @ (K @ X)
    torch.testing.assert_close(Kv, X @ (small @ (X.T @ v)), rtol=0, atol=1e-9)
    torch.testing.assert_close(diagonal, ((X @ small) * X).sum(1), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh((small + small.T) / 2).clamp_min(0)
    expected = (values + 0.5).log().sum() + (d - B) * C * torch.tensor(0.5, dtype=torch.float64).log()
    torch.testing.assert_close(logdet, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(damped @ solved, v, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_hessians_diagonal_is_estimated_where_columns_are_too_many():
    model = nn.Sequential(nn.Linear(80, 52), nn.Tanh(), nn.Linear(52, 3)).double()
    g = torch.Generator().manual_seed(0)
    data = (torch.randn(4, 80, generator=g, dtype=torch.float64), torch.arange(4) % 3)
    D = DiagonalHessian(model, "classification", data)
    assert D.shape[0] > 4096
    found = D.diagonal()
    assert D.report.algorithm == "XDiag"
    assert "estimated by XDiag" in repr(D)
    exact = _hessian_diagonal(model, data)
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.1
    half_width = torch.as_tensor(D.report.half_width)
    assert half_width.shape == found.shape
    # Entry by entry a 95 % interval, or exact to rounding.
    assert ((found - exact).abs() <= half_width + 1e-9 * exact.norm()).double().mean() > 0.9


def _hessian_diagonal(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    tensors = list(model.parameters())
    total = reference.nll("classification")(model(x), y)
    grads = reference.gradient(total, tensors, create_graph=True)
    return torch.stack([reference.gradient(g, tensors)[i] for i, g in enumerate(grads)]).detach()


@pytest.mark.parametrize("weight_and_bias", ["separate", "joint"])
def test_one_eigendecomposition_serves_every_damping_and_power(weight_and_bias, monkeypatch):
    p = problem("mlp")
    K = KFAC(p.model(), p.loss(), p.data(), weight_and_bias=weight_and_bias)
    K.to_dense()
    calls: list[int] = []
    eigh = dense.eigh
    monkeypatch.setattr(dense, "eigh", lambda M: calls.append(len(M)) or eigh(M))
    v = torch.ones(K.shape[0], dtype=torch.float64)
    for delta in (0.5, 1.0, torch.tensor(2.0, dtype=torch.float64)):
        A = K.add_diagonal(delta)
        A.logdet(), A.solve(v), A.sqrt_matvec(v), A.inv_sqrt_matvec(v), A.diagonal()
        (0.5 * K).add_diagonal(delta).logdet()
    # One for each factor: B and A of each weight and B of each bias, or B and the longer A of each pair.
    assert sorted(calls) == ([3, 3, 4, 4, 4, 4] if weight_and_bias == "separate" else [3, 4, 5, 5])
