"""What `MatrixFreeLaplace` draws and predicts: samples, functional covariances, linearised and sampled outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.curvature.matrixfree.jacobian import Jacobian
from curvops.curvature.objective import Objective
from curvops.interop.laplace import library
from curvops.linalg.results import Report
from curvops.memory import columns_within
from curvops.nets.forward import Network
from curvops.nets.parameters import unwrap
from curvops.nets.watch import snapshot
from curvops.operators import methods
from curvops.posterior import Gaussian


class Predictions(library.baselaplace.ParametricLaplace):
    """Everything that follows from the posterior as a `Gaussian`; `MatrixFreeLaplace` says what that is."""

    dtype: torch.dtype
    memory_budget: int | None
    sample_method: methods.Method | None
    generator: torch.Generator
    reports: dict[str, Report]
    _asked: torch.Generator | None = None
    _network: Network | None
    _scratch: Network | None

    @property
    def posterior(self) -> Gaussian:
        """N(mean, A⁻¹)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- samples

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draws from N(mean, A⁻¹), `(n_samples, P)`, in the network's dtype; see `reports["sample"]`.

        Args:
            n_samples: How many.
            generator: Source of the draws; None for the approximation's own.
        """
        posterior = self.posterior
        source = Gaussian(posterior.mean, posterior.precision, self._source(generator))
        samples, report = source.sample(n_samples, self.sample_method, return_report=True)
        self.reports["sample"] = report
        return samples.to(self._dtype)

    def _source(self, generator: torch.Generator | None) -> torch.Generator:
        return generator or self._asked or self.generator

    def _draws(self, n_samples: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Samples one by one, drawn in blocks that fit into the memory budget."""
        per_draw = 8 * self.n_params * self.dtype.itemsize
        block = columns_within(self.memory_budget, self._device, per_draw, n_samples)
        for start in range(0, n_samples, block):
            yield from self.sample(min(block, n_samples - start), generator)

    def _sampled_outputs(
        self, x: Any, n_samples: int, generator: torch.Generator | None, **model_kwargs: Any
    ) -> Iterator[Tensor]:
        """Outputs under each sample, of a copy of the network that takes them in turn: the user's keeps its own."""
        network = self._scratch
        if network is None:
            network = self._scratch = Network(snapshot(unwrap(self.model)).to(self._dtype).eval())
        selected = [p for p in network.module.parameters() if p.requires_grad]
        x = _moved(x, self._device)
        for sample in self._draws(n_samples, generator):
            with torch.no_grad():
                for p, piece in zip(selected, sample.split([p.numel() for p in selected]), strict=True):
                    p.copy_(piece.view_as(p))
            with torch.set_grad_enabled(self.enable_backprop and torch.is_grad_enabled()):
                yield network.output_tensor(network.module(x, **model_kwargs) if model_kwargs else network.call(x))

    def _nn_functional_samples(
        self, X: Any, n_samples: int = 100, generator: torch.Generator | None = None, **model_kwargs: Any
    ) -> Tensor:
        return torch.stack(list(self._sampled_outputs(X, n_samples, generator, **model_kwargs)))

    def _nn_predictive_classification(self, X: Any, n_samples: int = 100, **model_kwargs: Any) -> Tensor:
        total: Any = 0.0
        for f in self._sampled_outputs(X, n_samples, None, **model_kwargs):
            total = total + torch.softmax(f.detach(), dim=-1) / n_samples
        return total

    def _glm_functional_samples(
        self, f_mu: Tensor, f_var: Tensor, n_samples: int, diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        return super()._glm_functional_samples(f_mu, f_var, n_samples, diagonal_output, self._source(generator))

    # ---------------------------------------------------------------- predictive

    def __call__(
        self,
        x: Any,
        pred_type: Any = "glm",
        joint: bool = False,
        link_approx: Any = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The posterior predictive, as the base class's; `generator` serves every draw that it makes."""
        self._asked = generator
        try:
            return super().__call__(
                x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting, **model_kwargs
            )
        finally:
            self._asked = None

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the linearised network; Jacobians of all inputs only for `enable_backprop`."""
        if self.enable_backprop:
            return super()._glm_predictive_distribution(X, joint, diagonal_output)
        J = self._jacobian(X)
        f_mu, f_var, report = self.posterior.predictive(J, joint=joint, return_report=True)
        self.reports["predictive"] = report
        f_mu, f_var = f_mu.detach().to(self._dtype), f_var.detach().to(self._dtype)
        if joint:
            return f_mu.flatten(), f_var
        return f_mu, torch.diagonal(f_var, dim1=-2, dim2=-1) if diagonal_output else f_var

    def _jacobian(self, X: Any) -> Jacobian:
        """J over the inputs, of the network that was fitted."""
        self._check_H_init()
        assert self._network is not None
        x = _moved(X, self._device)
        count = x if isinstance(x, Tensor) else x[self.dict_key_x]
        batch = x if isinstance(x, Mapping) and self.dict_key_y in x else (x, torch.zeros(len(count)))
        objective = Objective(
            self._network.module, None, batch, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y,
            memory_budget=self.memory_budget, cast=True,
        )  # fmt: skip
        return Jacobian.of(objective)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """`Js A⁻¹ Jsᵀ` per datum, `(B, C, P)` → `(B, C, C)`; see `reports["functional_variance"]`."""
        return self._covariance(Js, "functional_variance")

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """`Js A⁻¹ Jsᵀ` between all data, `(B, C, P)` → `(B·C, B·C)`; see `reports["functional_covariance"]`."""
        return self._covariance(Js.reshape(-1, Js.shape[-1]), "functional_covariance")

    def _covariance(self, rows: Tensor, name: str) -> Tensor:
        value, self.reports[name] = self.posterior.functional_covariance(rows.to(self.dtype), return_report=True)
        return value.to(rows.dtype)


def _moved(x: Any, device: torch.device) -> Any:
    """Inputs on the network's device."""
    return x.to(device) if hasattr(x, "to") else x
