"""Low-rank approximations, dense matrices and Gram matrices from the layers' factors."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor, nn
from untouched import untouched

from curvops.curvature.matrixfree import GGN, EmpiricalFisher, Hessian, Jacobian, MCFisher, layerdense
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.matrixfree.layerdense import dense_from_layers, gram_from_layers
from curvops.curvature.structured.lowrank import low_rank
from curvops.errors import NumericalWarning, UnsupportedError
from curvops.posterior import Gaussian
from curvops.testing.problems import Problem, problem, problems

EVERY = pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)


def curvatures(p: Problem) -> list[GaussNewton]:
    options = {"params": p.params, **({"dict_key_x": "a"} if p.name == "dictionary" else {})}
    about = (p.model(), p.loss(), p.data())
    return [
        GGN(*about, **options),
        MCFisher(*about, num_samples=2, **options),
        EmpiricalFisher(*about, **options),
        EmpiricalFisher(*about, datum="example", **options),
    ]


def by_columns(curvature: GaussNewton) -> Tensor:
    return curvature._product(torch.eye(curvature.shape[0], dtype=curvature.dtype))


@EVERY
def test_dense_and_gram_agree_with_products(p, monkeypatch):
    # Also where they do not pay: the formulas hold for every network.
    monkeypatch.setattr(layerdense, "_pays", lambda *_: True)
    monkeypatch.setattr(layerdense, "_is_cheap", lambda step: any(f is not None for f in step.factors))
    monkeypatch.setattr(layerdense, "TILE", 5)
    for curvature in curvatures(p):
        dense = dense_from_layers(curvature)
        assert dense is not None
        assert reference.relative_error(dense, by_columns(curvature)) < 1e-13
        assert torch.equal(dense, dense.T)
        gram = gram_from_layers(curvature, 10**9)
        if p.name == "subnetwork":
            assert gram is None
            continue
        assert gram is not None
        B = curvature._factor()._apply(torch.eye(curvature.shape[0], dtype=curvature.dtype))
        assert reference.relative_error(gram, B @ B.T) < 1e-13
        assert torch.equal(gram, gram.T)


def test_which_road_is_taken():
    assert dense_from_layers(curvatures(problem("mlp"))[0]) is not None
    assert gram_from_layers(curvatures(problem("mlp"))[0], 10**9) is not None
    assert gram_from_layers(curvatures(problem("mlp"))[0], 100) is None
    assert gram_from_layers(curvatures(problem("conv2d"))[0], 10**9) is None
    p = problem("mlp")
    J = Jacobian(p.model(), p.data())
    gram = gram_from_layers(J.curvature, 10**9)
    assert gram is not None
    dense = J.to_dense()
    assert reference.relative_error(gram, dense @ dense.T) < 1e-13


def test_examples_that_mix_take_the_road_of_products():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x - x.mean(0))

    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = GGN(Mixing().double(), "regression", (x, torch.zeros(5, 2, dtype=torch.float64)))
    assert dense_from_layers(H) is None
    assert gram_from_layers(H, 10**9) is None
    assert reference.relative_error(H.to_dense(), by_columns(H)) < 1e-13


class TestLowRank:
    @pytest.mark.parametrize("method", ["lanczos", "function_space"])
    def test_the_largest_eigenpairs(self, method):
        p = problem("mlp")
        H = curvatures(p)[0]
        M = by_columns(H)
        values, vectors = torch.linalg.eigh(M)
        for k in (1, 3):
            L = low_rank(H, k, method=method)
            best = (vectors[:, -k:] * values[-k:]) @ vectors[:, -k:].T
            assert reference.relative_error(L.to_dense(), best) < 1e-8
            assert L.captured == pytest.approx(float(values[-k:].sum() / values.sum()), rel=1e-9)
            assert reference.relative_error(L.U.T @ L.U, torch.eye(k, dtype=torch.float64)) < 1e-8

    def test_nystrom_stays_below_and_near(self):
        H = curvatures(problem("mlp"))[0]
        M = by_columns(H)
        generator = torch.Generator().manual_seed(0)
        L = low_rank(H, 7, method="nystrom", generator=generator)
        assert torch.linalg.eigvalsh(M - L.to_dense()).min() > -1e-10 * M.norm()
        assert reference.relative_error(L.to_dense(), M) < 0.3
        full = low_rank(H, 12, method="nystrom")  # more columns than the rank, N (C − 1) = 8
        assert reference.relative_error(full.to_dense(), M) < 1e-6
        assert full.captured == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize("name", ["mlp", "conv2d", "tied", "raw-parameters"])
    def test_exact_where_the_gram_is_no_larger(self, name):
        H = curvatures(problem(name))[2]
        L = low_rank(H, min(H.shape[0], 12))
        assert reference.relative_error(L.to_dense(), by_columns(H)) < 1e-10
        assert L.captured == pytest.approx(1.0)
        assert low_rank(H, tol=0.0).captured == pytest.approx(1.0)

    @pytest.mark.parametrize("method", ["lanczos", "nystrom", "function_space"])
    def test_a_tolerance(self, method):
        H = curvatures(problem("mlp"))[0]
        L = low_rank(H, tol=0.1, method=method)
        assert 0.9 <= L.captured <= 1.0
        assert L.rank < 8
        if method != "nystrom":
            assert low_rank(H, L.rank - 1, method=method).captured < 0.9

    def test_a_posterior_warns_of_mass_cut_off(self):
        H = curvatures(problem("mlp"))[0]
        L = low_rank(H, 2)
        mean = torch.zeros(H.shape[0], dtype=torch.float64)
        with pytest.warns(NumericalWarning):
            Gaussian(mean, L.add_diagonal(0.5 * float(L.s.min())))
        Gaussian(mean, L.add_diagonal(2.0 * float(L.s.min())))

    @pytest.mark.parametrize("method", ["lanczos", "nystrom", "function_space"])
    def test_a_prior_precision_by_name(self, method):
        H = curvatures(problem("mlp"))[0]
        L = low_rank(H, 3, method=method)
        deltas = dict(zip(H.layout, (0.5, 1.0, 1.5, 2.0), strict=True))
        d = torch.cat([L.U.new_full((where.stop - where.start,), deltas[name]) for name, where in H.layout.items()])
        for scaled in (L, 2.0 * L, L + L, L.to(torch.float64)):
            damped = scaled.add_diagonal(deltas).to_dense()
            assert reference.relative_error(damped, scaled.to_dense() + d.diag()) < 1e-14

    def test_made_in_inference_mode_it_serves_autograd(self):
        H = curvatures(problem("mlp"))[0]
        with torch.inference_mode():
            L = low_rank(H, 3)
        b = torch.ones(H.shape[0], dtype=torch.float64, requires_grad=True)
        L.add_diagonal(1.0).solve(b).sum().backward()
        assert b.grad is not None

    def test_what_is_refused(self):
        p = problem("mlp")
        H = Hessian(p.model(), p.loss(), p.data())
        with pytest.raises(UnsupportedError, match="positive semidefinite"):
            low_rank(H, 3)
        G = curvatures(p)[0]
        for arguments in ({}, {"rank": 0}, {"rank": 36}, {"tol": 1.0}, {"rank": 2, "tol": 0.1}):
            with pytest.raises(ValueError, match="low_rank"):
                low_rank(G, **arguments)
        with pytest.raises(ValueError, match="method"):
            low_rank(G, 3, method="svd")
        with pytest.raises(UnsupportedError, match="no Gram matrix"):
            low_rank(G.add_diagonal(1.0), 3, method="function_space")

    def test_the_users_things_stay(self):
        p = problem("layernorm")
        model = p.model()
        with untouched(model):
            low_rank(GGN(model, p.loss(), p.data()), 3)
