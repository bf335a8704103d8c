"""Kronecker factors and fitted posteriors: from laplace-torch to operators, and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laplace_subjects import CELLS, B, close, data, dense, fitted, loader, network
from torch import Tensor, nn

import curvops as co
from curvops.errors import DataError, NumericalWarning, UnsupportedError
from curvops.testing.problems import problem

pytest.importorskip("laplace", reason="laplace-torch is not installed")

import laplace
import laplace.curvature as stock
from laplace.utils.matrix import Kron, KronDecomposed

import curvops.interop.laplace as ours

pytestmark = pytest.mark.peers

LIKELIHOODS = ("regression", "classification")
F64 = torch.float64


# -------------------------------------------------------------------- Kronecker factors


def _spd(n: int, seed: int) -> Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return M @ M.T


def _kron(cls: type = Kron) -> Any:
    return cls(
        [
            [_spd(2, 0), _spd(3, 1)],
            [_spd(2, 2)],
            [torch.arange(1.0, 4.0, dtype=F64), _spd(2, 3)],
            [torch.ones(4, dtype=F64)],
        ]
    )


def _same(one: Any, other: Any) -> None:
    assert [[F.shape for F in Fs] for Fs in one.kfacs] == [[F.shape for F in Fs] for Fs in other.kfacs]
    assert all(
        torch.equal(F, G) for Fs, Gs in zip(one.kfacs, other.kfacs, strict=True) for F, G in zip(Fs, Gs, strict=True)
    )


def test_factors_survive_the_round_trip_bit_by_bit() -> None:
    kron = _kron()
    operator = ours.from_laplace_kron(kron)
    assert repr(operator) == "BlockDiagonal(4: Kronecker(2×3), Dense(2), Kronecker(3×2), Diagonal(4))"
    close(operator.to_dense(), kron.to_matrix(), 1e-14)
    _same(ours.to_laplace_kron(operator), kron)
    kron.kfacs[0][0].zero_()  # a copy
    assert float(operator.blocks[0].to_dense().abs().max()) > 0


def test_operators_survive_the_round_trip() -> None:
    p = problem("mlp")
    kfac = co.KFAC(p.model(), p.loss(), p.data())
    kron = ours.to_laplace_kron(kfac)
    assert isinstance(kron, Kron)
    again = ours.from_laplace_kron(kron, layout=kfac.layout)
    assert torch.equal(again.to_dense(), kfac.to_dense())
    assert again.layout == kfac.layout
    assert again.add_diagonal(dict.fromkeys(kfac.layout, 1.0)).shape == kfac.shape
    v = torch.linspace(-1, 1, kfac.shape[0], dtype=F64)
    close(kron.bmm(v), kfac @ v, 1e-12)
    close((kron.decompose() + torch.tensor(0.5, dtype=F64)).logdet(), kfac.add_diagonal(0.5).logdet(), 1e-12)


def test_multiples_go_to_the_first_factor() -> None:
    p = problem("mlp")
    kfac = co.KFAC(p.model(), p.loss(), p.data())
    for operator in (3.0 * kfac, co.BlockDiagonal(*(3.0 * block for block in kfac.blocks))):
        tripled, plain = ours.to_laplace_kron(operator), ours.to_laplace_kron(kfac)
        for F, G in zip(tripled.kfacs, plain.kfacs, strict=True):
            close(F, [3 * G[0], *G[1:]], 1e-15)


def test_curvlinops_factors_and_diagonal_blocks() -> None:
    p = problem("conv2d")
    _, K = co.CurvlinopsGGN(p.model(), p.loss()).kron(*p.data(), N=4)
    close(ours.to_laplace_kron(K).to_matrix(), K.to_dense(), 1e-14)
    norms = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    kfac = co.KFAC(norms, "classification", data("classification"))
    kron = ours.to_laplace_kron(kfac)
    assert [[F.dim() for F in Fs] for Fs in kron.kfacs] == [[2, 2], [2], [1], [1], [2, 2], [2]]
    close(kron.to_matrix(), kfac.to_dense(), 1e-14)


@pytest.mark.parametrize("damping", [False, True])
def test_decomposed_factors(damping: bool) -> None:
    deltas = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=F64)
    plain = _kron().decompose(damping=damping)
    decomposed = KronDecomposed(plain.eigenvectors, plain.eigenvalues, deltas, damping)
    operator = ours.from_laplace_kron(decomposed)
    close(operator.to_dense(), decomposed.to_matrix(), 1e-13)
    assert "closed form" in str(operator.explain("logdet"))
    close(
        operator.add_diagonal(1e-3).logdet(),
        torch.logdet(decomposed.to_matrix() + 1e-3 * torch.eye(18, dtype=F64)),
        1e-10,
    )
    again = ours.to_laplace_kron(operator)
    assert isinstance(again, Kron if damping else KronDecomposed)
    close(again.to_matrix(), decomposed.to_matrix(), 1e-13)


def test_damped_operators_are_decomposed_ones() -> None:
    p = problem("mlp")
    kfac = co.KFAC(p.model(), p.loss(), p.data())
    deltas = {name: 0.5 * (i + 1) for i, name in enumerate(kfac.layout)}
    decomposed = ours.to_laplace_kron(kfac.add_diagonal(deltas))
    assert isinstance(decomposed, KronDecomposed)
    close(decomposed.deltas, torch.tensor(list(deltas.values()), dtype=F64))
    close(decomposed.to_matrix(), kfac.add_diagonal(deltas).to_dense(), 1e-13)
    close(ours.from_laplace_kron(decomposed).to_dense(), kfac.add_diagonal(deltas).to_dense(), 1e-13)


def test_what_laplace_torch_cannot_hold_is_refused_by_name() -> None:
    p = problem("conv2d-groups")
    with pytest.raises(UnsupportedError, match=r"the block of '.*weight', BlockDiagonal.*grouped convolution"):
        ours.to_laplace_kron(co.KFAC(p.model(), p.loss(), p.data()))
    p = problem("mlp")
    with pytest.raises(UnsupportedError, match=r'joint one of \[.*\]; .*by="parameter"'):
        ours.to_laplace_kron(co.BlockGGN(p.model(), p.loss(), p.data(), by="module"))
    with pytest.raises(UnsupportedError, match=r'joint one of .*weight_and_bias="separate"'):
        ours.to_laplace_kron(co.KFAC(p.model(), p.loss(), p.data(), weight_and_bias="joint"))
    with pytest.raises(UnsupportedError, match="joint one of"):
        ours.to_laplace_kron(co.GGN(p.model(), p.loss(), p.data()))
    with pytest.raises(UnsupportedError, match="neither a Kronecker product of two factors"):
        ours.to_laplace_kron(co.EKFAC(p.model(), p.loss(), p.data()))
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(UnsupportedError, match="the block number 0, Kronecker"):
        ours.to_laplace_kron(co.BlockDiagonal(co.Kronecker(eye, eye, eye)))
    with pytest.raises(DataError, match="expected laplace-torch's Kron"):
        ours.from_laplace_kron(eye)


# -------------------------------------------------------------------- fitting


def test_factors_of_few_vectors_go_over_as_matrices() -> None:
    """Layers wider than the batch, whose factors and bias blocks are kept as vectors."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, y = torch.randn(7, 20, dtype=F64), torch.randn(7, 2, dtype=F64)
    kfac = co.KFAC(model, "regression", (x, y), fisher="empirical")
    close(ours.to_laplace_kron(kfac).to_matrix(), kfac.to_dense(), 1e-13)
    assert "LowRank" in repr(kfac.blocks[1])
    _, operator = ours.NativeEF(model, "regression").kron(x, y, N=7)
    assert operator.to_matrix().shape == kfac.shape


def test_norm_layers_count_in_kron() -> None:
    """laplace-torch's own backend leaves them out of the factors, and the sum no longer fits the parameters."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    la = fitted(ours.NativeGGN, "classification", "all", "kron", model=model)
    kfac = co.KFAC(model, "classification", data("classification"))
    assert la.H.to_matrix().shape == kfac.shape
    exact = [i for i, (name, _) in enumerate(model.named_parameters()) if name.startswith("1.")]
    for i in exact:
        close(la.H_facs.kfacs[i][0], kfac.blocks[i].to_dense(), 1e-12)


def test_parameters_without_factors_are_refused_while_fitting() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3, dtype=F64))
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.scale)

    with pytest.raises(UnsupportedError, match=r"the Kronecker block of 'scale' \(1, 3\) is Diagonal\(3\).*'diag'"):
        fitted(ours.NativeGGN, "classification", "all", "kron", model=Scaled())
    model = Scaled()
    model.scale.requires_grad_(False)
    fitted(ours.NativeGGN, "classification", "all", "kron", model=model)


def test_parameters_without_effect_have_zero_factors() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.idle = network(), nn.Linear(2, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.warns(NumericalWarning, match="do not depend on idle.weight"):
        la = fitted(ours.NativeGGN, "classification", "all", "kron", model=Idle())
    assert [F.shape[0] for F in la.H_facs.kfacs[4]] == [3, 2]
    assert not any(bool(F.any()) for Fs in la.H_facs.kfacs[4:] for F in Fs)


# -------------------------------------------------------------------- fitted posteriors


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("subset", "structure"), CELLS)
@pytest.mark.parametrize("backend", ["ours", "stock"])
def test_a_fitted_posterior_is_ours(backend: str, subset: str, structure: str, likelihood: str) -> None:
    options: dict[str, Any] = {"temperature": 0.5, "prior_mean": 0.1}
    if likelihood == "regression":
        options["sigma_noise"] = 0.3
    la = fitted(ours.NativeGGN if backend == "ours" else stock.CurvlinopsGGN, likelihood, subset, structure, **options)
    found = ours.from_laplace(la)
    P = found.posterior.precision.shape[0]
    assert {"all": 32, "last_layer": 12, "subnetwork": 5}[subset] == P
    wanted = dense(la.posterior_precision)
    close(found.posterior.precision.to_dense(), torch.diag(wanted) if wanted.dim() == 1 else wanted)
    close(found.curvature.to_dense(), torch.diag(la.H) if structure == "diag" else dense(la.H))
    close(found.log_evidence(), la.log_marginal_likelihood())
    close(found.posterior.mean, la.mean_subnet if subset == "subnetwork" else la.mean)
    close(found.prior_precision, la.prior_precision_diag)
    assert found.temperature == 0.5
    assert math.isclose(float(found.sigma_noise), 0.3 if likelihood == "regression" else 1.0)
    assert (found.subnetwork_indices is None) == (subset != "subnetwork")
    theta = found.posterior.mean + 0.1
    if subset != "subnetwork":
        close(found.posterior.log_prob(theta), la.log_prob(theta))
    model = la.model
    params = {"all": None, "last_layer": "last_layer", "subnetwork": found.subnetwork_indices}[subset]
    x, y = data(likelihood)
    mean, covariance = found.posterior.predictive(co.Jacobian(model, (x[:4], y[:4]), params=params))
    f_mu, f_var = la._glm_predictive_distribution(x[:4])
    close((mean, covariance), (f_mu, f_var), 1e-5)
    assert found.posterior.sample(3).shape == (3, P)
    assert "Fitted(posterior=Gaussian" in repr(found)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_priors_of_every_shape(structure: str) -> None:
    priors = {"scalar": torch.tensor(0.7), "layerwise": torch.arange(1.0, 5.0)}
    if structure != "kron":
        priors["diagonal"] = torch.linspace(0.5, 2, 32)
    for prior in priors.values():
        la = fitted(ours.NativeGGN, "regression", "all", structure, prior_precision=prior.double())
        found = ours.from_laplace(la)
        wanted = dense(la.posterior_precision)
        close(found.posterior.precision.to_dense(), torch.diag(wanted) if wanted.dim() == 1 else wanted)
        close(found.log_evidence(), la.log_marginal_likelihood())
        close(found.prior_precision, la.prior_precision_diag)


def test_a_kronecker_posterior_stays_one() -> None:
    found = ours.from_laplace(fitted(stock.CurvlinopsGGN, "regression", "all", "kron", sigma_noise=0.5))
    assert repr(found.posterior.precision).count("Kronecker") == 2
    for verb in ("solve", "logdet", "sample", "diagonal"):
        assert "closed form" in str(found.posterior.precision.explain(verb))
    assert list(found.curvature.layout) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    last = ours.from_laplace(fitted(stock.CurvlinopsGGN, "regression", "last_layer", "kron"))
    assert list(last.curvature.layout) == ["2.weight", "2.bias"]


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_gradients_reach_prior_and_noise(structure: str) -> None:
    """Of any backend: the gradient in the noise that laplace-torch's Kron loses is here."""
    la = fitted(stock.CurvlinopsGGN, "regression", "all", structure)

    def evidence(prior: Tensor, sigma: Tensor) -> Tensor:
        la.prior_precision, la.sigma_noise = prior, sigma
        return ours.from_laplace(la).log_evidence()

    prior = torch.tensor(0.7, dtype=F64, requires_grad=True)
    sigma = torch.tensor(0.8, dtype=F64, requires_grad=True)
    gradients = torch.autograd.grad(evidence(prior, sigma), (prior, sigma))
    step = 1e-5
    with torch.no_grad():
        by_prior = (evidence(prior + step, sigma) - evidence(prior - step, sigma)) / (2 * step)
        by_sigma = (evidence(prior, sigma + step) - evidence(prior, sigma - step)) / (2 * step)
    close(gradients, (by_prior, by_sigma))


def test_a_matrix_free_posterior() -> None:
    la = fitted(ours.NativeGGN, "regression", "all", "matrix_free", sigma_noise=0.5)
    found = ours.from_laplace(la)
    assert found.curvature is la.H
    full = ours.from_laplace(fitted(ours.NativeGGN, "regression", "all", "full", sigma_noise=0.5))
    close(found.log_evidence(), full.log_evidence())
    close(found.posterior.precision.to_dense(), full.posterior.precision.to_dense())


def test_refitting_changes_no_copy() -> None:
    for structure in ("full", "kron", "diag"):
        la = fitted(ours.NativeGGN, "regression", "all", structure)
        found = ours.from_laplace(la)
        before = found.posterior.precision.to_dense().clone()
        la.fit(loader("regression"), override=False)
        assert torch.equal(found.posterior.precision.to_dense(), before)


def test_a_low_rank_posterior() -> None:
    """laplace-torch makes one only with a package that no index has; its parts are set by hand."""
    la = laplace.LowRankLaplace.__new__(laplace.LowRankLaplace)
    laplace.ParametricLaplace.__init__(
        la, network(), "regression", prior_precision=0.7, sigma_noise=0.5, backend=ours.NativeGGN
    )
    H = fitted(ours.NativeGGN, "regression", "all", "full")
    values, vectors = torch.linalg.eigh(H.H)
    la.H, la.loss, la.n_data, la.n_outputs, la.mean = (vectors[:, -6:], values[-6:]), H.loss, H.n_data, 2, H.mean
    found = ours.from_laplace(la)
    assert isinstance(found.curvature, co.LowRank)
    close(found.log_evidence(), la.log_marginal_likelihood())
    x, y = data("regression")
    covariance = found.posterior.predictive(co.Jacobian(la.model, (x[:4], y[:4])))[1]
    close(covariance, la.functional_variance(la.backend.jacobians(x[:4])[0]))


def test_what_is_no_fitted_posterior_is_refused() -> None:
    with pytest.raises(DataError, match="not fitted; call fit"):
        ours.from_laplace(laplace.Laplace(network(), "regression", "all", "full"))
    with pytest.raises(DataError, match="not fitted; call fit"):
        ours.from_laplace(laplace.Laplace(network(), "regression", "last_layer", "kron"))
    with pytest.raises(DataError, match="got Sequential"):
        ours.from_laplace(network())
    la = fitted(ours.NativeGGN, "regression", "all", "gp", n_subset=B)
    with pytest.raises(UnsupportedError, match="posterior over functions"):
        ours.from_laplace(la)
