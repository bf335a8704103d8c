"""Curvatures as covariances of GPyTorch's distributions: the same numbers as from dense matrices."""

from __future__ import annotations

import pytest
import torch
from curvature_subjects import Counted, batches, randn
from reference import relative_error as _relative_error
from torch import Tensor, nn
from untouched import untouched

import curvops as co

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

NOISE = 0.1


def relative_error(a: Tensor, b: Tensor) -> float:
    """As `reference.relative_error`, outside autograd."""
    return _relative_error(a.detach(), b.detach())


def gram() -> tuple[nn.Module, co.LinearOperator, Tensor]:
    """The weighted Gram operator of a network, 33 x 33, and its dense matrix."""
    model = Counted()
    K = co.Gram(model, "classification", batches(4))
    return model, K, K.to_dense()


def test_log_prob_and_its_gradients() -> None:
    from gpytorch.distributions import MultivariateNormal

    model, K, M = gram()
    n = len(M)
    with untouched(model):
        inputs = [randn(n).requires_grad_(), torch.tensor(NOISE, dtype=torch.float64, requires_grad=True), randn(4, n)]
        mean, noise, values = inputs
        covariance = K.to_linear_operator(solve=co.CG(rtol=1e-12)).add_diagonal(noise)
        mine = MultivariateNormal(mean, covariance).log_prob(values)
        dense = M + noise * torch.eye(n, dtype=torch.float64)
        expected = torch.distributions.MultivariateNormal(mean, dense).log_prob(values)
        assert mine.shape == (4,)
        assert relative_error(mine.detach(), expected.detach()) <= 1e-9
        found, right = (torch.autograd.grad(t.sum(), inputs[:2]) for t in (mine, expected))
        assert all(relative_error(f, r) <= 1e-8 for f, r in zip(found, right, strict=True))


def test_samples_have_the_covariance() -> None:
    from gpytorch.distributions import MultivariateNormal

    model, K, M = gram()
    n = len(M)
    dense = M + NOISE * torch.eye(n, dtype=torch.float64)
    distribution = MultivariateNormal(randn(n), K.add_diagonal(NOISE).to_linear_operator())
    with untouched(model):
        # Base samples that are the unit vectors give the columns of the root, so the covariance is exact.
        R = (distribution.rsample(base_samples=torch.eye(n, dtype=torch.float64)) - distribution.mean).T
        assert relative_error(R @ R.T, dense) <= 1e-10
        assert relative_error(distribution.variance, dense.diagonal()) <= 1e-10
        assert relative_error(distribution.covariance_matrix, dense) <= 1e-10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = distribution.rsample(torch.Size([3000]))
    assert draws.shape == (3000, n)
    ratio = draws.var(0) / dense.diagonal()
    assert float(ratio.log().abs().max()) < 5 * (2 / 3000) ** 0.5
    assert float((draws.mean(0) - distribution.mean).abs().max()) < 5 * float(dense.diagonal().max() / 3000) ** 0.5


def test_above_the_size_at_which_gpytorch_iterates() -> None:
    """Above 800, GPyTorch takes its CG and ten probes; through this door the answer stays certified."""
    from gpytorch.distributions import MultivariateNormal

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    x = torch.randn(900, 3, generator=generator, dtype=torch.float64)
    K = co.Gram(model, "regression", (x, torch.zeros(900, 1, dtype=torch.float64)))
    A = K.to_linear_operator().add_diagonal(torch.tensor(NOISE, dtype=torch.float64))
    values = randn(900)
    mine = MultivariateNormal(torch.zeros(900, dtype=torch.float64), A).log_prob(values)
    dense = K.to_dense() + NOISE * torch.eye(900, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(values), dense).log_prob(values)
    assert float(mine) == pytest.approx(float(expected), rel=1e-5)


def test_divergence_batches_and_selection() -> None:
    from gpytorch.distributions import MultivariateNormal

    _, K, M = gram()
    n = len(M)
    dense = M + NOISE * torch.eye(n, dtype=torch.float64)
    p = MultivariateNormal(randn(n), K.add_diagonal(NOISE).to_linear_operator(solve=co.CG(rtol=1e-12)))
    q = torch.distributions.MultivariateNormal(randn(n, seed=1), 2 * dense)
    p_dense = torch.distributions.MultivariateNormal(p.mean, dense)
    mine = torch.distributions.kl_divergence(p, MultivariateNormal(q.mean, 2.0 * p.lazy_covariance_matrix))
    assert float(mine) == pytest.approx(float(torch.distributions.kl_divergence(p_dense, q)), rel=1e-8)
    assert relative_error(p[3:9].covariance_matrix, dense[3:9, 3:9]) <= 1e-12
    expanded = p.expand(torch.Size([2]))
    values = randn(2, n)
    assert relative_error(expanded.log_prob(values), p_dense.log_prob(values)) <= 1e-9


def test_a_lazy_kernel_comes_in() -> None:
    import gpytorch

    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    x = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    lazy = kernel(x)
    A = co.from_linear_operator(lazy, is_psd=True)
    assert isinstance(A, co.Dense)
    assert relative_error(A.to_dense().detach(), lazy.to_dense().detach()) <= 1e-14
    (gradient,) = torch.autograd.grad(A.add_diagonal(NOISE).logdet(), [kernel.raw_outputscale])
    eye = torch.eye(7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.logdet(kernel(x).to_dense() + NOISE * eye), [kernel.raw_outputscale])
    assert relative_error(gradient, expected) <= 1e-8
