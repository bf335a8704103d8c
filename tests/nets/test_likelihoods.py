"""Likelihoods against double backward through torch's own losses; their draws against what they average to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvops.errors import (
    CurvopsError,
    DataError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedError,
)
from curvops.nets import draws
from curvops.nets.likelihoods import Bernoulli, Categorical, Likelihood, Normal, resolve
from curvops.nets.lossfunction import LossLikelihood

C = 4
WEIGHT = torch.tensor([0.3, 1.7, 0.0, 2.5], dtype=torch.float64)


def cross_entropy(**kwargs) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="sum", **kwargs)


def bce(**kwargs) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum", **kwargs)


@dataclass
class Case:
    name: str
    likelihood: Likelihood
    oracle: Callable[[Tensor, Tensor], Tensor]

    def data(self, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        f = 2 * torch.randn(*shape, generator=g, dtype=torch.float64)
        if isinstance(self.likelihood, Categorical):
            y = torch.randint(0, C, shape[:-1], generator=g)
            y[-1] = self.likelihood.ignore_index
            return f, y
        if isinstance(self.likelihood, Bernoulli):
            y = torch.rand(*shape, generator=g, dtype=torch.float64)
            return f, torch.where(y > 0.7, 1.0, torch.where(y < 0.3, 0.0, y))
        return f, torch.randn(*shape, generator=g, dtype=torch.float64)


CASES = [
    Case("normal", Normal(), lambda f, y: 0.5 * ((f - y) ** 2).sum()),
    Case("normal-sigma", Normal(0.3), lambda f, y: 0.5 * ((f - y) ** 2).sum() / 0.09),
    Case("softmax", Categorical(), cross_entropy()),
    Case("softmax-weight", Categorical(WEIGHT), cross_entropy(weight=WEIGHT)),
    Case("softmax-ignore", Categorical(ignore_index=1), cross_entropy(ignore_index=1)),
    Case("softmax-smooth", Categorical(label_smoothing=0.2), cross_entropy(label_smoothing=0.2)),
    Case(
        "softmax-all",
        Categorical(WEIGHT, ignore_index=2, label_smoothing=0.35),
        cross_entropy(weight=WEIGHT, ignore_index=2, label_smoothing=0.35),
    ),
    Case("softmax-smooth-1", Categorical(WEIGHT, -1, 1.0),
         cross_entropy(weight=WEIGHT, ignore_index=-1, label_smoothing=1.0)),
    Case("bernoulli", Bernoulli(), bce()),
    Case("bernoulli-pos", Bernoulli(WEIGHT), bce(pos_weight=WEIGHT)),
    Case("bernoulli-both", Bernoulli(WEIGHT, WEIGHT.flip(0)), bce(pos_weight=WEIGHT, weight=WEIGHT.flip(0))),
    Case("from-loss", Likelihood.from_loss(lambda f, y: (f - y).cosh().log().sum(), is_convex=True),
         lambda f, y: (f - y).cosh().log().sum()),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_shape = pytest.mark.parametrize("shape", [(6, C), (5, 3, C)], ids=["BC", "BTC"])


def hessian_rows(loss: Callable[[Tensor, Tensor], Tensor], f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and the full Hessian of the loss in f, a row at a time."""
    leaf = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in g.flatten()]
    return g.detach(), torch.stack(rows)


@each_case
@each_shape
def test_loss_gradient_and_hessian_are_those_of_torch(case: Case, shape: tuple[int, ...]) -> None:
    f, y = case.data(shape)
    case.likelihood.check(f, y)
    g, H = hessian_rows(case.oracle, f, y)
    torch.testing.assert_close(case.likelihood.loss(f, y), case.oracle(f, y), rtol=1e-13, atol=0)
    torch.testing.assert_close(case.likelihood.gradient(f, y), g, rtol=0, atol=1e-12)
    U = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (H @ U.reshape(-1, 3)).reshape(U.shape)
    torch.testing.assert_close(case.likelihood.output_hessian_product(f, y, U), expected, rtol=0, atol=1e-12)
    one = case.likelihood.output_hessian_product(f, y, U[..., 1].contiguous())
    assert one.shape == f.shape
    torch.testing.assert_close(one, expected[..., 1], rtol=0, atol=1e-12)


@each_case
@each_shape
def test_square_root_and_dense_blocks_are_the_hessian(case: Case, shape: tuple[int, ...]) -> None:
    f, y = case.data(shape)
    _, H = hessian_rows(case.oracle, f, y)
    blocks = torch.stack([H[i : i + C, i : i + C] for i in range(0, f.numel(), C)]).reshape(*shape, C)
    L = case.likelihood.output_hessian_sqrt(f, y)
    assert L.shape == (*shape, case.likelihood.rank(C))
    torch.testing.assert_close(L @ L.mT, blocks, rtol=0, atol=1e-12)
    torch.testing.assert_close(case.likelihood.output_hessian(f, y), blocks, rtol=0, atol=1e-12)


@each_case
@each_shape
def test_roots_through_a_matrix_and_the_sum_are_the_hessians(case: Case, shape: tuple[int, ...]) -> None:
    f, y = case.data(shape)
    _, H = hessian_rows(case.oracle, f, y)
    blocks = torch.stack([H[i : i + C, i : i + C] for i in range(0, f.numel(), C)])
    total = case.likelihood.output_hessian_sum(f, y)
    torch.testing.assert_close(total, blocks.sum(0), rtol=0, atol=1e-12)
    assert torch.equal(total, total.mT)
    W = torch.randn(3, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    X = case.likelihood.output_hessian_sqrt_through(f, y, W)
    assert X.shape[:-1] == (*shape[:-1], 3)
    torch.testing.assert_close(X @ X.mT, (W @ blocks @ W.T).reshape(*shape[:-1], 3, 3), rtol=0, atol=1e-12)


@each_case
def test_loss_is_differentiable_twice_through_the_outputs(case: Case) -> None:
    f, y = case.data((5, C))
    _, H = hessian_rows(case.likelihood.loss, f, y)
    _, expected = hessian_rows(case.oracle, f, y)
    torch.testing.assert_close(H, expected, rtol=0, atol=1e-12)


@each_case
def test_factor_times_lossfunc_is_the_loss(case: Case) -> None:
    f, y = case.data((5, C))
    scaled = case.likelihood.factor * case.likelihood.lossfunc(f, y)
    torch.testing.assert_close(scaled, case.likelihood.loss(f, y), rtol=1e-13, atol=0)


def test_factors() -> None:
    assert [Normal().factor, Categorical().factor, Bernoulli().factor] == [0.5, 1.0, 1.0]


@each_case
def test_float32_and_device(case: Case, device: torch.device) -> None:
    f, y = case.data((5, 3, C))
    f32, y32 = f.to(device, torch.float32), y.to(device, torch.float32 if y.is_floating_point() else None)
    for result, expected in [
        (case.likelihood.gradient(f32, y32), case.likelihood.gradient(f, y)),
        (case.likelihood.output_hessian(f32, y32), case.likelihood.output_hessian(f, y)),
        (case.likelihood.pseudo_gradients_at(f32, y32, seed=3, position=7, sample=1),
         case.likelihood.pseudo_gradients_at(f, y, seed=3, position=7, sample=1)),
    ]:  # fmt: skip
        assert result.dtype == torch.float32
        assert result.device.type == device.type
        # A root by eigh knows eigenvalues to u‖Λ‖, and so its own entries to √u only.
        atol = 1e-3 if case.name == "from-loss" else 3e-5
        torch.testing.assert_close(result.double().cpu(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("top", [0, 2])
def test_saturated_softmax_keeps_its_digits_in_float32(top: int) -> None:
    """At p ≈ 1 − 1e-9 the naive p − e_y and p(u − ⟨p, u⟩) have no correct digit in float32."""
    f = torch.tensor([[1.0, -0.5, 0.3, 0.7]]).index_fill(1, torch.tensor(top), 22.0)
    y = torch.tensor([top])
    lik, u = Categorical(), torch.tensor([[0.4, -1.3, 2.2, 0.9]])
    L = lik.output_hessian_sqrt(f, y)
    for result, exact in [
        (lik.gradient(f, y), lik.gradient(f.double(), y)),
        (lik.output_hessian_product(f, y, u), lik.output_hessian_product(f.double(), y, u.double())),
        (torch.diagonal(L @ L.mT, 0, -1, -2), torch.diagonal(lik.output_hessian(f.double(), y), 0, -1, -2)),
    ]:
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=0)
    naive = f.softmax(-1)[0, top] - 1
    assert abs(naive - lik.gradient(f.double(), y)[0, top]) > 0.1 * abs(lik.gradient(f.double(), y)[0, top])


@pytest.mark.parametrize("top", [0, 2])
def test_roots_through_a_matrix_and_the_sum_keep_their_digits_in_float32(top: int) -> None:
    f = torch.zeros(1, C)
    f[0, top], f[0, 1] = 25.0, 3.0  # 1 − p = 3e-10
    y = torch.zeros(1, dtype=torch.long)
    W = torch.randn(3, C, generator=torch.Generator().manual_seed(1))
    p = f[0].double().softmax(0)
    block = torch.zeros(C, C, dtype=torch.float64)
    for c in range(C):
        for d in range(C):
            block[c, d] = -p[c] * p[d] if c != d else p[c] * p[torch.arange(C) != c].sum()
    torch.testing.assert_close(Categorical().output_hessian_sum(f, y).double(), block, rtol=1e-5, atol=0)
    X = Categorical().output_hessian_sqrt_through(f, y, W).double()[0]
    product = W.double() @ block @ W.double().T
    assert (X @ X.T - product).norm() <= 1e-6 * product.norm()


def test_extreme_logits_stay_finite() -> None:
    f = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4]], dtype=torch.float64)
    y, lik = torch.tensor([1, 0, 2]), Categorical()
    for t in (lik.loss(f, y), lik.gradient(f, y), lik.output_hessian_sqrt(f, y), lik.output_hessian(f, y)):
        assert torch.isfinite(t).all()
    assert torch.isfinite(lik.pseudo_gradients_at(f, y, seed=0, position=0, sample=0)).all()


def test_ignored_targets_contribute_exactly_nothing() -> None:
    f, y = CASES[2].data((6, 3, C))
    lik = Categorical(label_smoothing=0.1)
    y[2, 1] = -100
    ignored = ~lik.active(f, y)
    assert ignored.sum() == 4
    for t in (
        lik.gradient(f, y),
        lik.output_hessian_sqrt(f, y),
        lik.output_hessian(f, y),
        lik.pseudo_gradients_at(f, y, seed=0, position=0, sample=0),
    ):
        assert (t[ignored] == 0).all()
        assert (t[~ignored] != 0).any()


@each_case
def test_outputs_in_another_memory_order(case: Case) -> None:
    """A convolution's `(B, C, T)` seen as `(B, T, C)`."""
    f, y = case.data((5, 3, C))
    g = f.mT.contiguous().mT
    lik, address = case.likelihood, {"seed": 1, "position": 0, "sample": 0}
    for result, expected in [
        (lik.loss(g, y), lik.loss(f, y)),
        (lik.gradient(g, y), lik.gradient(f, y)),
        (lik.output_hessian_product(g, y, g), lik.output_hessian_product(f, y, f)),
        (_square(lik.output_hessian_sqrt(g, y)), _square(lik.output_hessian_sqrt(f, y))),
    ]:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
    # Eigenvectors of a general Λ feel rounding by one over the gap between the eigenvalues.
    atol = 1e-11 if isinstance(lik, LossLikelihood) else 1e-13
    for result, expected in [
        (lik.output_hessian_sqrt(g, y), lik.output_hessian_sqrt(f, y)),
        (lik.pseudo_gradients_at(g, y, **address), lik.pseudo_gradients_at(f, y, **address)),
    ]:
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)


def _square(L: Tensor) -> Tensor:
    return L @ L.mT


@each_case
@each_shape
def test_hessian_columns_of_the_loss_vectorise(case: Case, shape: tuple[int, ...]) -> None:
    f, y = case.data(shape)
    leaf = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(case.likelihood.loss(leaf, y), leaf, create_graph=True)
    V = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (HV,) = torch.autograd.grad(g, leaf, V, is_grads_batched=True)
    expected = case.likelihood.output_hessian_product(f, y, V.movedim(0, -1)).movedim(-1, 0)
    torch.testing.assert_close(HV, expected, rtol=0, atol=1e-12)


# ---- constants ------------------------------------------------------------------------------------------------------


def test_loss_and_normaliser_are_the_negative_log_density() -> None:
    D = torch.distributions
    f, y = CASES[0].data((6, C))
    for sigma in (1.0, 0.3):
        lik = Normal(sigma)
        density = -D.Normal(f, sigma).log_prob(y).sum()
        torch.testing.assert_close(lik.loss(f, y) + lik.log_normaliser(6, C), density, rtol=1e-13, atol=0)
    labels = torch.arange(6) % C
    assert Categorical().log_normaliser(6, C) == 0
    torch.testing.assert_close(Categorical().loss(f, labels), -D.Categorical(logits=f).log_prob(labels).sum())
    bits = (y > 0).double()
    assert Bernoulli().log_normaliser(6, C) == 0
    torch.testing.assert_close(Bernoulli().loss(f, bits), -D.Bernoulli(logits=f).log_prob(bits).sum())


# ---- Monte Carlo ----------------------------------------------------------------------------------------------------


@each_case
@each_shape
def test_draws_do_not_depend_on_the_batching(case: Case, shape: tuple[int, ...]) -> None:
    f, y = case.data(shape)
    whole = case.likelihood.pseudo_gradients_at(f, y, seed=5, position=10, sample=2)
    parts = [
        case.likelihood.pseudo_gradients_at(f[a:b], y[a:b], seed=5, position=10 + a, sample=2)
        for a, b in [(0, 1), (1, 4), (4, shape[0])]
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13)
    order = torch.arange(shape[0]).flip(0)
    shuffled = case.likelihood.pseudo_gradients_at(f[order], y[order], seed=5, position=10 + order, sample=2)
    torch.testing.assert_close(shuffled[order], whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("change", [{"seed": 6}, {"position": 11}, {"sample": 3}], ids=lambda c: next(iter(c)))
def test_each_part_of_the_address_matters(change: dict[str, int]) -> None:
    f, y = torch.zeros(50, 1, dtype=torch.float64), torch.zeros(50, 1, dtype=torch.float64)
    address = {"seed": 5, "position": 10, "sample": 2}
    a = Normal().pseudo_gradients_at(f, y, **address)
    b = Normal().pseudo_gradients_at(f, y, **(address | change))
    assert not torch.isclose(a, b).any()


@each_case
def test_outer_products_average_to_the_output_hessian(case: Case) -> None:
    """z-scores of every entry of mean(g gᵀ) − Λ over 60,000 draws, in each of 20 seeds: standard normal."""
    n, seeds = 3000, 20
    f, y = case.data((2, 2, C), seed=3)
    if isinstance(case.likelihood, Categorical):
        y = torch.tensor([[0, 3], [0, 3]])
    exact = case.likelihood.output_hessian(f, y)[0]
    estimates = []
    for seed in range(seeds):
        g = case.likelihood.pseudo_gradients_at(
            f[:1].expand(n, 2, C), y[:1].expand(n, *y.shape[1:]), seed=seed, position=0, sample=seed % 3
        )
        estimates.append((g.unsqueeze(-1) * g.unsqueeze(-2)).mean(0))
    estimates = torch.stack(estimates)
    stderr = estimates.std(0) / seeds**0.5
    error = (estimates.mean(0) - exact).abs()
    # |t| < 5.2 with 19 degrees of freedom has probability 0.99995 per entry; exact entries have no spread at all.
    assert (error <= 5.2 * stderr + 1e-12).all()
    assert (stderr < 0.05 * (1 + exact.abs().max())).all()


def test_class_weights_of_the_observed_label_scale_the_draws() -> None:
    """E g gᵀ carries the weight once, the empirical Fisher twice."""
    f = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)
    plain = Categorical().pseudo_gradients_at(f, torch.tensor([1]), seed=0, position=0, sample=0)
    weighted = Categorical(WEIGHT).pseudo_gradients_at(f, torch.tensor([3]), seed=0, position=0, sample=0)
    torch.testing.assert_close(weighted, plain * 2.5**0.5)
    torch.testing.assert_close(
        Categorical(WEIGHT).gradient(f, torch.tensor([3])), 2.5 * Categorical().gradient(f, torch.tensor([3]))
    )


def test_a_class_of_probability_zero_is_never_drawn() -> None:
    f = torch.full((20000, 3), 0.0)
    f[:, 2] = -float(10**6)
    f[:, 0] = -float(10**6)
    g = Categorical().pseudo_gradients_at(f, torch.zeros(20000, dtype=torch.long), seed=0, position=0, sample=0)
    assert (g == 0).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8]], ids=lambda c: c.name)
def test_a_generator_repeats_advances_and_is_the_only_one_used(case: Case) -> None:
    f, y = case.data((6, C))
    before = torch.get_rng_state()
    g = torch.Generator().manual_seed(11)
    first, second = case.likelihood.pseudo_gradients(f, y, g), case.likelihood.pseudo_gradients(f, y, g)
    again = case.likelihood.pseudo_gradients(f, y, torch.Generator().manual_seed(11))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_addressed_numbers_are_uniform_and_uncorrelated() -> None:
    u = draws.uniforms(0, torch.arange(4000), 0, 5)
    assert u.min() > 0
    assert u.max() < 1
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(draws.gaussians(1, torch.arange(4000), 0, 5).flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbours in each part of the address, each pair of sequences independent: |corr| ~ N(0, 1/n).
    x = u[:, 0]
    others = {
        "seed": draws.uniforms(1, torch.arange(4000), 0, 1)[:, 0],
        "position": draws.uniforms(0, torch.arange(1, 4001), 0, 1)[:, 0],
        "sample": draws.uniforms(0, torch.arange(4000), 1, 1)[:, 0],
        "coordinate": u[:, 1],
        "stream": draws.uniforms(0, torch.arange(4000), 0, 1, stream=1)[:, 0],
        "seed = position": draws.uniforms(1, torch.arange(-1, 3999), 0, 1)[:, 0],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(x, other)[0, 1]) < 4.5 / 4000**0.5, name
    assert u.unique().numel() == u.numel()
    torch.testing.assert_close(draws.uniforms(0, torch.arange(4000), 0, 2), u[:, :2], rtol=0, atol=0)


def test_the_hash_is_splitmix64() -> None:
    """Published first outputs of splitmix64 from state 1234567 (the last stage of the chain)."""
    steps = np.arange(1, 4, dtype=np.uint64)
    out = draws._mix(np.uint64(1234567) + steps * np.uint64(draws._GOLDEN)).tolist()
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draws._mix_int(1234567 + k * draws._GOLDEN) for k in range(1, 4)] == out


# ---- from_loss ------------------------------------------------------------------------------------------------------


def test_from_loss_reproduces_the_closed_forms() -> None:
    f, y = CASES[2].data((6, C))
    lik = Likelihood.from_loss(cross_entropy(weight=WEIGHT), is_convex=True)
    closed = Categorical(WEIGHT)
    torch.testing.assert_close(lik.output_hessian(f, y), closed.output_hessian(f, y), rtol=0, atol=1e-12)
    L = lik.output_hessian_sqrt(f, y)
    torch.testing.assert_close(L @ L.mT, closed.output_hessian(f, y), rtol=0, atol=1e-12)


def test_from_loss_takes_class_probabilities() -> None:
    f, _ = CASES[2].data((6, C))
    target = torch.rand(6, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lik = Likelihood.from_loss(cross_entropy(), is_convex=True)
    lik.check(f, target)
    p = f.softmax(-1)
    expected = target.sum(-1)[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    torch.testing.assert_close(lik.output_hessian(f, target), expected, rtol=0, atol=1e-12)


def test_from_loss_not_convex_has_products_and_no_root() -> None:
    f, y = CASES[0].data((6, C))
    lik = Likelihood.from_loss(lambda f, y: torch.cos(f - y).sum())
    assert not lik.is_convex
    torch.testing.assert_close(lik.output_hessian_product(f, y, f), -torch.cos(f - y) * f, rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedError, match="output_hessian_product"):
        lik.output_hessian_sqrt(f, y)
    with pytest.raises(UnsupportedError, match="is_convex=True"):
        lik.pseudo_gradients(f, y, torch.Generator())
    false_promise = Likelihood.from_loss(lambda f, y: torch.cos(f - y).sum(), is_convex=True)
    with pytest.raises(NotPositiveDefiniteError, match="is_convex=False"):
        false_promise.output_hessian_sqrt(f, y)


@pytest.mark.parametrize("axis", [0, 1], ids=["data", "positions"])
def test_from_loss_that_couples_is_refused_a_root_but_multiplies_right(axis: int) -> None:
    f, y = CASES[0].data((4, 3, 2))
    fn = lambda f, y: (f - y).sum(axis).square().sum()  # noqa: E731
    lik = Likelihood.from_loss(fn, is_convex=True)
    _, H = hessian_rows(fn, f, y)
    torch.testing.assert_close(
        lik.output_hessian_product(f, y, f), (H @ f.flatten()).reshape(f.shape), rtol=0, atol=1e-12
    )
    with pytest.raises(UnsupportedError, match="couples"):
        lik.output_hessian_sqrt(f, y)


def test_from_loss_linear_in_the_outputs_has_no_curvature() -> None:
    f, y = CASES[0].data((6, C))
    lik = Likelihood.from_loss(lambda f, y: (f * y).sum(), is_convex=True)
    assert (lik.output_hessian_product(f, y, f) == 0).all()
    assert (lik.output_hessian_sqrt(f, y) == 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_from_loss_works_in_the_callers_mode_and_leaves_no_trace(mode: type) -> None:
    f, y = CASES[0].data((6, C))
    f.requires_grad_()
    lik = Likelihood.from_loss(lambda f, y: (f - y).cosh().log().sum(), is_convex=True)
    expected = (1 - torch.tanh(f - y) ** 2).detach()
    with mode():
        for t in (f, f + 0, y + f * 0 + 0):  # a leaf, tensors made in this mode
            assert lik.gradient(t, y + 0).shape == f.shape
        product = lik.output_hessian_product(f + 0, y + 0, torch.ones_like(f))
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)
    assert f.grad is None
    assert not product.requires_grad


def test_from_loss_refuses_what_is_no_sum() -> None:
    f, y = CASES[0].data((6, C))
    with pytest.raises(ShapeError, match="0-dim"):
        Likelihood.from_loss(lambda f, y: (f - y).square()).loss(f, y)
    with pytest.raises(UnsupportedError, match="differentiably"):
        Likelihood.from_loss(lambda f, y: f.detach().sum()).gradient(f, y)
    with pytest.raises(ShapeError, match="6 data"):
        Likelihood.from_loss(lambda f, y: f.sum()).check(f, y[:3])


# ---- resolve --------------------------------------------------------------------------------------------------------


class Laplace(str, Enum):
    REGRESSION = "regression"
    CLASSIFICATION = "classification"
    REWARD_MODELING = "reward_modeling"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("regression", Normal),
        ("classification", Categorical),
        ("binary", Bernoulli),
        (Laplace.CLASSIFICATION, Categorical),
        (nn.MSELoss(reduction="sum"), Normal),
        (nn.CrossEntropyLoss(reduction="sum"), Categorical),
        (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli),
    ],
    ids=str,
)
def test_resolve_knows(given: object, expected: type) -> None:
    assert type(resolve(given)) is expected


def test_resolve_honours_what_a_torch_loss_holds() -> None:
    ce = resolve(nn.CrossEntropyLoss(WEIGHT, ignore_index=2, label_smoothing=0.1, reduction="sum"))
    assert isinstance(ce, Categorical)
    assert torch.equal(ce.weight, WEIGHT)
    assert (ce.ignore_index, ce.label_smoothing) == (2, 0.1)
    b = resolve(nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT + 1, reduction="sum"))
    assert isinstance(b, Bernoulli)
    assert torch.equal(b.weight, WEIGHT)
    assert torch.equal(b.pos_weight, WEIGHT + 1)
    same = Normal(0.1)
    assert resolve(same) is same


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("reward_modeling", UnsupportedError, "from_loss"),
        (Laplace.REWARD_MODELING, UnsupportedError, "from_loss"),
        (nn.CrossEntropyLoss(), UnsupportedError, 'reduction="sum"'),
        (nn.MSELoss(reduction="none"), UnsupportedError, "one number per datum"),
        (Focal(reduction="sum"), UnsupportedError, "redefines"),
        (nn.L1Loss(reduction="sum"), DataError, "L1Loss"),
        ("poisson", DataError, '"regression", "classification", "binary"'),
        (None, DataError, "Known are"),
        (3, DataError, "Known are"),
        (F.cross_entropy, DataError, "from_loss"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_resolve_refuses(given: object, error: type[CurvopsError], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(given)


# ---- refusals -------------------------------------------------------------------------------------------------------

f2, f3, f1 = torch.zeros(5, C), torch.zeros(5, 3, C), torch.zeros(5, 1)
labels = torch.zeros(5, dtype=torch.long)
nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("likelihood", "f", "y", "error", "words"),
    [
        (Normal(), f1, torch.zeros(5), ShapeError, r"broadcast to \(5, 5\).*unsqueeze"),
        (Bernoulli(), f1, torch.zeros(5), ShapeError, r"broadcast to \(5, 5\).*unsqueeze"),
        (Normal(), f2, torch.zeros(5, 1), ShapeError, "exactly the same shape"),
        (Normal(), torch.zeros(5), torch.zeros(5), ShapeError, "unsqueeze"),
        (Normal(), f2, torch.zeros(5, C, dtype=torch.float64), ShapeError, r"y.to\(torch.float32\)"),
        (Bernoulli(), f2, torch.zeros(5, C, dtype=torch.long), ShapeError, r"y.to\(torch.float32\)"),
        (Normal(), f2, f2.clone().index_fill(0, torch.tensor(3), nan), DataError, r"targets contain 4 NaN.*\(3, 0\)"),
        (Normal(), f2.clone().index_fill(1, torch.tensor(2), inf), f2, DataError, r"outputs contain 5 NaN.*\(0, 2\)"),
        (Normal(), f2.long(), f2.long(), ShapeError, "floating"),
        (Bernoulli(), f2, f2 - 1, DataError, r"\(y \+ 1\) / 2"),
        (Bernoulli(torch.ones(3)), f2, f2, ShapeError, "pos_weight has 3"),
        (Categorical(), f2, labels + C, DataError, r"outside 0 … 3"),
        (Categorical(), f2, labels - 1, DataError, "ignore_index=-100"),
        (Categorical(), f2, labels.float(), ShapeError, r"y.long\(\)"),
        (Categorical(), f2, labels.bool(), ShapeError, "integers"),
        (Categorical(), f2, torch.zeros(5, C), ShapeError, "from_loss"),
        (Categorical(), f2, labels[:, None], ShapeError, "squeeze"),
        (Categorical(), f3, labels, ShapeError, r"\(5, 3\)"),
        (Categorical(), f1, labels, ShapeError, '"binary"'),
        (Categorical(WEIGHT[:3]), f2, labels, ShapeError, "3 class weights"),
    ],
)  # fmt: skip
def test_check_refuses(likelihood: Likelihood, f: Tensor, y: Tensor, error: type[CurvopsError], words: str) -> None:
    with pytest.raises(error, match=words):
        likelihood.check(f, y)


def test_no_method_broadcasts_in_silence() -> None:
    for lik in (Normal(), Bernoulli()):
        for method in (lik.loss, lik.gradient, lik.output_hessian_sqrt):
            with pytest.raises(ShapeError, match="broadcast"):
                method(f1, torch.zeros(5))
        with pytest.raises(ShapeError, match="columns"):
            lik.output_hessian_product(f1, f1, torch.zeros(5))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Normal(0.0),
        lambda: Normal(-1.0),
        lambda: Normal(nan),
        lambda: Categorical(label_smoothing=1.5),
        lambda: Categorical(-WEIGHT),
        lambda: Categorical(WEIGHT * nan),
        lambda: Categorical(WEIGHT[None]),
        lambda: Bernoulli(weight=torch.ones(5, C)),
    ],
)
def test_constructors_refuse(build: Callable[[], Likelihood]) -> None:
    with pytest.raises((DataError, ShapeError), match=r"expected|negative|NaN"):
        build()


def test_weights_are_copied_and_shown() -> None:
    w = WEIGHT.clone()
    lik = Categorical(w)
    w.zero_()
    assert torch.equal(lik.weight, WEIGHT)
    assert repr(lik) == "Categorical(weight=Tensor(4,))"
    assert repr(Categorical(ignore_index=0, label_smoothing=0.1)) == "Categorical(ignore_index=0, label_smoothing=0.1)"
    assert repr(Normal()) == "Normal(sigma=1.0)"
