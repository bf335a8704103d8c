"""Fitted posteriors of laplace-torch as ours.

A = H / (σ² T) + D      H: curvature of the loss at σ = T = 1 (`la.H`), σ: `sigma_noise`, T: `temperature`, D: prior
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from curvops.errors import DataError, UnsupportedError
from curvops.interop.laplace import library
from curvops.interop.laplace.kron import from_laplace_kron
from curvops.nets.parameters import unwrap
from curvops.operators.base import Layout, LinearOperator, Scalar
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal, damping
from curvops.operators.lowrank import LowRank
from curvops.posterior import Gaussian


@dataclass(frozen=True)
class Fitted:
    """What a fitted Laplace approximation knows; every tensor is a copy, which refitting does not change.

    Attributes:
        posterior: N(mean, A⁻¹), A = curvature / (σ² T) + diag(prior_precision).
        curvature: H of the loss, summed over the data, at σ = T = 1.
        prior_precision: `(P,)`.
        prior_mean: Scalar or `(P,)`.
        loss: Σ −log p(y | f) without constants, divided by σ² T.
        log_normaliser: The constants: N C log(σ √2π) for regression, otherwise 0.
        sigma_noise: σ.
        temperature: T.
        subnetwork_indices: Entries of the network's flat parameter vector that the posterior is over; None for all.
    """

    posterior: Gaussian
    curvature: LinearOperator
    prior_precision: Tensor = field(repr=False)
    prior_mean: Tensor = field(repr=False)
    loss: Scalar
    log_normaliser: Scalar
    sigma_noise: Scalar
    temperature: float
    subnetwork_indices: Tensor | None = field(repr=False)

    def log_evidence(self, **options: Any) -> Any:
        """`la.log_marginal_likelihood()`, differentiable in the prior precision and σ where these want gradients.

        Args:
            options: `method`, `return_report`, as for `Gaussian.log_evidence`.
        """
        return self.posterior.log_evidence(
            self.loss, self.prior_precision, self.prior_mean, self.log_normaliser, **options
        )


def from_laplace(la: Any, generator: torch.Generator | None = None) -> Fitted:
    """A fitted parametric Laplace approximation of laplace-torch, of whatever backend, in our terms.

    Args:
        la: Full, Kronecker, diagonal or low-rank; of all weights, the last layer or a subnetwork.
        generator: Of the `Gaussian`'s draws.

    Returns:
        The posterior as a `Gaussian`, and its parts. A prior precision or `sigma_noise` that wants gradients is kept
        attached; so is the Kronecker structure, whose precision has closed forms for every verb.

    Raises:
        DataError: `la` is not fitted, or no Laplace approximation of laplace-torch.
        UnsupportedError: It has no posterior over weights (`hessian_structure="gp"` and its like).

    Cost: copies; nothing is decomposed.
    """
    if isinstance(la, library.baselaplace.BaseFunctionalLaplace):
        raise UnsupportedError(
            f"{type(la).__name__} is a posterior over functions; there is no precision over weights to convert. Fit "
            'hessian_structure="full", "kron" or "diag", or build co.Gaussian(mean, co.GGN(…).add_diagonal(δ)), which '
            "works in function space where that is cheaper"
        )
    if not isinstance(la, library.baselaplace.ParametricLaplace):
        raise DataError(f"from_laplace: got {type(la).__name__}; expected a fitted approximation of laplace-torch.")
    if not la.n_data or la.H is None:
        raise DataError(f"from_laplace: this {type(la).__name__} is not fitted; call fit(train_loader) first.")
    curvature, indices = _curvature(la), _indices(la)
    mean = (la.mean if indices is None else la.mean[indices]).detach().clone().to(curvature.dtype)
    scale, sigma = _kept(la._H_factor), _kept(la.sigma_noise)
    prior = _prior(la, curvature)
    return Fitted(
        posterior=Gaussian(mean, scale * curvature + prior, generator),
        curvature=curvature,
        prior_precision=prior.diagonal(),
        prior_mean=la.prior_mean.reshape(()) if la.prior_mean.numel() == 1 else la.prior_mean.clone(),
        loss=scale * _kept(torch.as_tensor(la.loss)),
        log_normaliser=_log_normaliser(la, sigma),
        sigma_noise=sigma,
        temperature=float(la.temperature),
        subnetwork_indices=None if indices is None else indices.clone(),
    )


def _curvature(la: Any) -> LinearOperator:
    H = la.H
    if isinstance(H, LinearOperator):
        return H
    if isinstance(la, library.baselaplace.KronLaplace):
        return from_laplace_kron(la.H_facs, _layout(la))
    if isinstance(H, tuple):
        U, values = H
        return LowRank(U.clone(), values.clone())
    return Diagonal(H.detach().clone()) if H.dim() == 1 else Dense(H.detach().clone(), is_symmetric=True)


def _prior(la: Any, curvature: LinearOperator) -> LinearOperator:
    """D, in the form that keeps the structure of what it is added to."""
    delta = la.prior_precision
    if delta.numel() == 1:
        return damping(_kept(delta.reshape(())), curvature)
    if isinstance(curvature, BlockDiagonal) and len(delta) == len(curvature.blocks):
        parts = [damping(_kept(d), block) for d, block in zip(delta, curvature.blocks, strict=True)]
        return BlockDiagonal(*parts, layout=curvature.layout)
    return Diagonal(la.prior_precision_diag.clone())


def _kept(value: Tensor) -> Scalar:
    """A number, or the tensor itself where gradients are asked of it."""
    return value if value.requires_grad else float(value)


def _log_normaliser(la: Any, sigma: Scalar) -> Scalar:
    if la.likelihood != "regression":
        return 0.0
    log_sigma = sigma.log() if isinstance(sigma, Tensor) else log(sigma)
    return la.n_data * la.n_outputs * (log_sigma + 0.5 * log(2 * pi))


def _indices(la: Any) -> Tensor | None:
    return la.backend.subnetwork_indices if isinstance(la, library.laplace.SubnetLaplace) else None


def _layout(la: Any) -> Layout:
    """Names of the user's network, which a last-layer approximation wraps."""
    named = {name: p for name, p in unwrap(la.model).named_parameters() if p.requires_grad}
    if isinstance(la, library.laplace.LLLaplace):
        last = {id(p) for p in la.model.last_layer.parameters()}
        named = {name.removeprefix("model."): p for name, p in named.items() if id(p) in last}
    ends = list(accumulate(p.numel() for p in named.values()))
    return {name: slice(end - p.numel(), end) for (name, p), end in zip(named.items(), ends, strict=True)}
