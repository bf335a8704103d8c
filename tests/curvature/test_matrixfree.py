"""Every matrix-free curvature against dense oracles, on every problem, however the data are cut into batches."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from curvature_subjects import CURVATURES, KINDS, Counted, batches, built, oracle, ragged, randn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvops as co
from curvops.testing.problems import problem, problems

EVERY = pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
KIND = pytest.mark.parametrize("kind", KINDS)
SOME = pytest.mark.parametrize("name", ["mlp", "mlp-binary", "tokens-ignored-weighted", "keywords", "subnetwork"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


@EVERY
@KIND
def test_dense_matrix(kind, p, dtype):
    A = built(kind, p, dtype)
    expected = oracle(kind, p.name)
    dense, products = A.to_dense(), A @ torch.eye(A.shape[1], dtype=dtype)
    assert dense.dtype == products.dtype == dtype
    assert A.shape == expected.shape
    assert reference.relative_error(dense.double(), expected) <= TOLERANCE[dtype]
    assert reference.relative_error(products.double(), expected) <= TOLERANCE[dtype]
    assert A.is_symmetric == (kind != "Jacobian")
    assert A.lower_bound == (0.0 if kind not in ("Jacobian", "Hessian") else None)


@SOME
@KIND
def test_products_in_both_directions(kind, name):
    p, M = problem(name), oracle(kind, name)
    A = built(kind, p)
    V, U = randn(M.shape[1], 3), randn(M.shape[0], 3, seed=8)
    assert reference.relative_error(A @ V, M @ V) <= 1e-12
    assert reference.relative_error(A.T @ U, M.T @ U) <= 1e-12
    assert reference.relative_error(A.rmatvec(U), M.T @ U) <= 1e-12
    assert A.T.shape == M.T.shape


@EVERY
@pytest.mark.parametrize("kind", ["GGN", "MCFisher", "Hessian", "Gram"])
def test_ragged_batches_and_loaders_give_the_same_matrix(kind, p):
    x, y = p.data()
    expected = built(kind, p).to_dense()
    sources = [ragged(p, sizes=(1, 2, 1))]
    if isinstance(x, torch.Tensor):
        sources.append(DataLoader(TensorDataset(x, y), batch_size=3))
    else:
        rows = [{**{k: v[i] for k, v in x.items()}, "labels": y[i]} for i in range(len(y))]
        sources.append(DataLoader(rows, batch_size=3))  # Mappings, with the targets among the inputs
    for source in sources:
        A = built(kind, p, data=source)
        assert reference.relative_error(A.to_dense(), expected) <= 1e-12
        assert A.shape == expected.shape


@SOME
@KIND
def test_columns_are_single_products(kind, name):
    p = problem(name)
    A = built(kind, p)
    V = randn(A.shape[1], 5)
    together = A @ V
    alone = torch.stack([A @ V[:, k] for k in range(5)], 1)
    assert reference.relative_error(together, alone) <= 1e-13
    assert A.matvec_count == 10
    assert (A @ V[:, :0]).shape == (A.shape[0], 0)
    chunked = built(kind, p, memory_budget=4 * 1024)  # room for no more than a column or two at a time
    assert reference.relative_error(chunked @ V, together) <= 1e-13
    assert reference.relative_error(chunked.rmatvec(U := randn(A.shape[0], 5)), A.rmatvec(U)) <= 1e-13


@SOME
@KIND
def test_the_vector_may_require_a_gradient(kind, name):
    p = problem(name)
    A, M = built(kind, p), oracle(kind, name)
    V = randn(M.shape[1], 2).requires_grad_()
    W = randn(M.shape[0], 2, seed=9)
    (g,) = torch.autograd.grad((W * (A @ V) ** 2).sum(), V, create_graph=True)
    expected = M.T @ (2 * W * (M @ V))
    assert reference.relative_error(g.detach(), expected.detach()) <= 1e-12
    (second,) = torch.autograd.grad(g.sum(), V)
    ones = torch.ones_like(V)
    assert reference.relative_error(second, (M.T @ (2 * W * (M @ ones))).detach()) <= 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@KIND
def test_inside_no_grad_and_inference_mode(kind, mode):
    p, M = problem("mlp"), oracle(kind, "mlp")
    model = p.model()
    with mode():
        A = KINDS[kind](model, p.loss(), p.data())  # data made inside, too
        v = randn(M.shape[1])
        assert reference.relative_error(A @ v, M @ v) <= 1e-12
        assert reference.relative_error(A.T @ (u := randn(M.shape[0])), M.T @ u) <= 1e-12
    outside = randn(M.shape[1], 2)  # the graph built inside serves outside
    assert reference.relative_error(A @ outside, M @ outside) <= 1e-12


# ---------------------------------------------------------------- the Jacobian and the Gram matrix


@pytest.mark.parametrize("name", ["mlp", "tokens", "keywords"])
def test_jacobian_outputs(name):
    p = problem(name)
    f = reference.outputs(p.model(), p.data()[0]).detach()
    for cache in (True, False):
        J = built("Jacobian", p, data=ragged(p), cache=cache)
        assert reference.relative_error(J.outputs, f) <= 1e-13
        assert not J.outputs.requires_grad
        assert J.shape == (f.numel(), oracle("Jacobian", name).shape[1])


def test_jacobian_row_blocks_are_the_rows():
    p = problem("mlp")
    M = oracle("Jacobian", "mlp")
    J = built("Jacobian", p, data=ragged(p), memory_budget=32 * 3 * 35 * 8)
    for _ in range(2):
        blocks = list(J.row_blocks())
        assert len(blocks) > 1
        assert reference.relative_error(torch.cat([b.flatten(0, 1) for b in blocks]), M) <= 1e-12


@EVERY
def test_gram_shares_the_nonzero_spectrum_of_the_ggn(p):
    gram, ggn = built("Gram", p).to_dense(), oracle("GGN", p.name)
    shared = min(len(gram), len(ggn))
    a = torch.linalg.eigvalsh(gram).flip(0)[:shared]
    b = torch.linalg.eigvalsh(ggn).flip(0)[:shared]
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12 * float(b[0]))
    outputs = p.outputs - (1 if p.likelihood == "classification" else 0)
    assert len(gram) == 4 * (p.tokens or 1) * outputs


def test_gram_in_blocks_of_rows_where_the_factor_does_not_fit():
    p, M = problem("mlp"), oracle("Gram", "mlp")
    whole, blocks = built("Gram", p), built("Gram", p, memory_budget=8 * 35 * 8)
    assert reference.relative_error(whole.to_dense(), M) <= 1e-12
    assert reference.relative_error(blocks.to_dense(), M) <= 1e-12


def test_gram_needs_a_likelihood_only_for_its_weights():
    p = problem("mlp")
    J = oracle("Jacobian", "mlp")
    assert reference.relative_error(co.Gram(p.model(), None, p.data(), weighted=False).to_dense(), J @ J.T) <= 1e-12


def test_sequences_of_different_lengths():
    p = problem("tokens")
    x, y = p.data()
    data = [(x[:2], y[:2]), (x[2:, :2], y[2:, :2])]
    J = built("Jacobian", p, data=data)
    rows = [reference.jacobian(p.model(), part).flatten(0, -2) for part, _ in data]
    assert J.shape == (2 * 3 * 3 + 2 * 2 * 3, 35)
    assert reference.relative_error(J.to_dense(), torch.cat(rows)) <= 1e-12


# ---------------------------------------------------------------- Monte Carlo


@pytest.mark.parametrize(
    "name",
    ["mlp-weighted", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp-regression", "mlp-binary")),
     "tokens-ignored-weighted"],
)  # fmt: skip
def test_mc_fisher_averages_to_the_ggn(name):
    p, seeds = problem(name), 120
    model, ggn = p.model(), oracle("GGN", name)
    V = randn(len(ggn), 12, seed=11)
    exact = (V * (ggn @ V)).sum(0)
    spread = {}
    for samples in (1, 4):
        draws = torch.stack(
            [
                co.MCFisher(
                    model, p.loss(), p.data(), num_samples=samples, generator=torch.Generator().manual_seed(seed)
                ).quadratic_form(V)
                for seed in range(seeds)
            ]
        )
        error = draws.mean(0) - exact
        stderr = draws.std(0) / seeds**0.5
        assert float((error / stderr).abs().max()) < 4.5
        assert float((stderr / exact).mean()) < 0.12  # so that a bias of a half would show
        spread[samples] = draws.var(0).mean()
    assert 2.4 < float(spread[1] / spread[4]) < 6.6  # four draws have a quarter of the variance


def test_mc_fisher_draws_belong_to_data_and_not_to_batches():
    p = problem("mlp")
    generator = torch.Generator().manual_seed(1)
    first = co.MCFisher(p.model(), p.loss(), p.data(), generator=generator)
    second = co.MCFisher(p.model(), p.loss(), p.data(), generator=generator)
    assert first.seed != second.seed
    assert not torch.allclose(first.to_dense(), second.to_dense())
    assert torch.equal(first.to_dense(), first.to_dense())
    default = [co.MCFisher(p.model(), p.loss(), data) for data in (p.data(), ragged(p), ragged(p, sizes=(2, 1, 1)))]
    assert {A.seed for A in default} == {0}
    for A in default[1:]:
        assert reference.relative_error(A.to_dense(), default[0].to_dense()) <= 1e-13


def test_the_float64_twin_of_an_mc_fisher_has_the_same_draws():
    p = problem("mlp")
    A = built("MCFisher", p, torch.float32)
    twin = A.to(torch.float64)
    assert twin.dtype == torch.float64
    assert reference.relative_error(twin.to_dense(), oracle("MCFisher", "mlp")) <= 5e-6
    assert next(A.objective.model.parameters()).dtype == torch.float32


# ---------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["GGN", "EF", "Hessian"])
def test_weights_ignored_targets_and_smoothing(kind, weighted, smoothing, tokens):
    p = problem("tokens" if tokens else "mlp")
    x, y = p.data()
    y = y.clone()
    y.view(-1)[1] = 7
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 0.0]).double() if weighted else None,
        ignore_index=7, label_smoothing=smoothing, reduction="sum",
    )  # fmt: skip

    def nll(f, y):
        return loss(f.reshape(-1, 3), y.reshape(-1))

    model = p.model()
    references = {
        "GGN": lambda: reference.ggn(model, nll, x, y),
        "EF": lambda: reference.empirical_fisher(model, nll, x, y),
        "Hessian": lambda: reference.hessian(model, nll, x, y),
    }
    A = KINDS[kind](model, loss, [(x[:1], y[:1]), (x[1:], y[1:])])
    assert reference.relative_error(A.to_dense(), references[kind]()) <= 1e-12


@pytest.mark.parametrize("kind", ["GGN", "Hessian", "EF"])
def test_a_likelihood_from_a_loss_function(kind):
    p = problem("mlp-regression")

    def huber(f, y):
        return F.huber_loss(f, y, reduction="sum", delta=0.7)

    x, y = p.data()
    model = p.model()
    A = KINDS[kind](model, co.likelihoods.Likelihood.from_loss(huber), (x, y))
    references = {
        "GGN": lambda: reference.ggn(model, huber, x, y),
        "EF": lambda: reference.empirical_fisher(model, huber, x, y),
        "Hessian": lambda: reference.hessian(model, huber, x, y),
    }
    assert reference.relative_error(A.to_dense(), references[kind]()) <= 1e-12
    assert A.is_psd == (kind == "EF")  # convexity was not promised


def test_regression_has_the_scale_of_half_the_squared_error():
    p = problem("mlp-regression")
    J = oracle("Jacobian", "mlp-regression")
    for likelihood, sigma in (
        ("regression", 1.0),
        (nn.MSELoss(reduction="sum"), 1.0),
        (co.likelihoods.Normal(2.0), 2.0),
    ):
        A = co.GGN(p.model(), likelihood, p.data())
        assert reference.relative_error(A.to_dense(), J.T @ J / sigma**2) <= 1e-12


# ---------------------------------------------------------------- parameters and scale


def test_a_dead_parameter_has_zero_rows_and_columns():
    class Dead(Counted):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    model, data = Dead(), batches(3)
    for kind in CURVATURES:
        M = KINDS[kind](model, "classification", data).to_dense()
        assert float(M.norm()) > 0
        assert float(M[:2].norm() + M[:, :2].norm()) == 0
    assert next(n for n, _ in model.named_parameters()) == "unused"


def test_the_sum_over_data_is_a_sum():
    p = problem("mlp")
    x, y = p.data()
    once, twice = built("GGN", p), built("GGN", p, data=[(x, y), (x, y)])
    assert reference.relative_error(twice.to_dense(), 2 * once.to_dense()) <= 1e-13
    assert built("GGN", p, data=(x, y), num_data=4).to_dense().equal(once.to_dense())  # num_data is no scale


def test_flat_indices_keep_their_order():
    p = problem("subnetwork")
    full = reference.ggn(p.model(), reference.problem_nll(p), *p.data())
    assert reference.relative_error(built("GGN", p).to_dense(), full[p.params][:, p.params]) <= 1e-12
    assert built("GGN", p).layout is None


@pytest.mark.parametrize("kind", [co.GGN, co.Hessian, co.EmpiricalFisher])
def test_products_of_a_parameter_that_enters_by_its_sum_can_be_written_to(kind):
    # Its gradient is one number seen many times over.
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.b.sum().sin()

    model, x = Summed(), randn(4, 2)
    y = torch.zeros_like(x)
    nll = reference.nll("regression")
    oracle = {"GGN": reference.ggn, "Hessian": reference.hessian, "EmpiricalFisher": reference.empirical_fisher}
    M = oracle[kind.__name__](model, nll, x, y)
    A = kind(model, "regression", (x, y))
    product = A @ randn(3, 2)
    product[0] += 1.0
    assert reference.relative_error(product[1:], M[1:] @ randn(3, 2)) <= 1e-12
    assert reference.relative_error(A.to_dense(), M) <= 1e-12


class Spectral(nn.Module):
    """A filter of Fourier coefficients whose weights are pairs of real numbers; P is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(3, 2))
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.fft.rfft(x) * torch.view_as_complex(self.w)
        return self.head(torch.tanh(torch.fft.irfft(z, n=4)))


@pytest.mark.parametrize("kind", ["GGN", "Hessian"])
def test_parameters_seen_as_complex_numbers(kind):
    # PyTorch sees pairs at even places as complex numbers, and refuses those at odd places of a vector.
    model, x, y = Spectral(), randn(5, 4, seed=2), torch.arange(5) % 3
    M = (reference.ggn if kind == "GGN" else reference.hessian)(model, reference.nll("classification"), x, y)
    A = getattr(co, kind)(model, "classification", (x, y))
    for columns in (1, 3):
        V = randn(len(M), columns)
        assert reference.relative_error(A @ V, M @ V) <= 1e-12
