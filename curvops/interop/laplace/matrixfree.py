"""`MatrixFreeLaplace`: the full Laplace approximation of laplace-torch that never holds a P x P matrix.

A = H / (σ² T) + D ,   evidence = −loss / (σ² T) − constants − ½ (μ−μ₀)ᵀ D (μ−μ₀) − ½ (log det A − log det D)

H is one lazy curvature over the loader; every number comes from its operators, and what they say of its error is kept.
"""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from curvops.curvature.objective import Objective
from curvops.errors import DataError, NumericalWarning, UnsupportedError
from curvops.interop.laplace import library
from curvops.interop.laplace.backends import LaplaceBackend, NativeEF, NativeGGN, NativeHessian
from curvops.interop.laplace.predictions import Predictions
from curvops.linalg.results import Report
from curvops.linalg.spectrum import Spectrum
from curvops.nets.forward import Network
from curvops.nets.parameters import unwrap
from curvops.nets.watch import snapshot
from curvops.operators import methods
from curvops.operators.base import LinearOperator, Scalar
from curvops.operators.diagonal import damping
from curvops.operators.functionspace import MAX_ROWS
from curvops.operators.routes.plan import MAX_DENSE
from curvops.posterior import Gaussian

_WIDE = 0.1
"""Half-width of an optimal prior precision, relative to it, above which a warning is due."""


class MatrixFreeLaplace(Predictions):
    """Laplace approximation with the full curvature as an operator: `Laplace(model, lik, "all", "matrix_free")`.

    The numbers are those of laplace-torch's `FullLaplace`; where they are estimated, `reports` says how well. Of the
    network a private copy is made at `fit`, in eval mode: the user's model is neither changed nor watched, and may go
    on training. `posterior_precision` is an operator of curvops; `to_dense()` makes the matrix.

    Args:
        model, likelihood, sigma_noise, prior_precision, prior_mean, temperature, enable_backprop, dict_key_x,
            dict_key_y: As for `FullLaplace`; of likelihoods "regression" and "classification".
        backend: Which curvature: a class of `curvops.interop.laplace` (`NativeGGN` by default, `NativeEF`,
            `NativeHessian`, …), or one of laplace-torch's own, whose curvature is then computed natively.
        backend_kwargs: Its options: `stochastic`, `num_samples`, `lossfunc`, ….
        dtype: In which the curvature multiplies. float64 by default, also for a float32 network: evidences of 10⁶
            parameters need it. float32 halves time and memory, and what it cannot resolve is refused.
        logdet_method: How log det A is found (`co.SLQ(…)`, …); None to choose, see `la.posterior_precision.explain`.
        sample_method: How samples are drawn; None to choose.
        memory_budget: Peak bytes of one question; None for half of what is free.
        generator: Source of all draws for which no `generator=` is given, on the parameters' device; None for a private
            one seeded by the system. The global one is neither read nor advanced.

    Attributes:
        H: Curvature of the loss at σ = T = 1, an operator; None before `fit`.
        reports: Name of a number → `EstimateReport`, `SolveReport` or `Report` of the last time it was asked.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> import curvops.interop.laplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> x, y = torch.linspace(-1, 1, 40).double().reshape(20, 2), torch.arange(20) % 3
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
        >>> la = Laplace(model, "classification", "all", "matrix_free")
        >>> la.fit(loader)
        >>> la.posterior_precision
        GGN(P=51, N=20, classification) + 1.0·I
        >>> evidence = la.log_marginal_likelihood()
        >>> la.reports["log_marginal_likelihood"].algorithm
        'function space (determinant lemma)'
        >>> la(x[:4], link_approx="probit").shape
        torch.Size([4, 3])
    """

    _key = ("all", "matrix_free")

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        logdet_method: methods.Method | None = None,
        sample_method: methods.Method | None = None,
        memory_budget: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if likelihood == "reward_modeling":
            raise UnsupportedError(
                "MatrixFreeLaplace: reward modelling is fitted and predicted with two different likelihoods; use "
                'laplace-torch\'s hessian_structure="kron" or "diag" for it'
            )
        if dtype not in (torch.float32, torch.float64):
            raise DataError(f"MatrixFreeLaplace(dtype={dtype}): expected torch.float32 or torch.float64.")
        self.dtype, self.memory_budget = dtype, memory_budget
        self.logdet_method, self.sample_method = logdet_method, sample_method
        self.reports: dict[str, Report] = {}
        self._forget()
        super().__init__(
            model, likelihood, sigma_noise, prior_precision, prior_mean, temperature, enable_backprop, dict_key_x,
            dict_key_y, _ours(backend), backend_kwargs,
        )  # fmt: skip
        if generator is None:
            generator = torch.Generator(self._device)
            generator.seed()
        self.generator = generator

    def _init_H(self) -> None:
        self.H: LinearOperator | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of an earlier curvature."""
        self._network: Network | None = None
        self._scratch: Network | None = None
        self._spectra: dict[tuple[int, int], Spectrum] = {}
        self._made: tuple[tuple[Any, ...], tuple[Any, ...], Gaussian] | None = None

    def _check_H_init(self) -> None:
        if self.H is None:
            raise AttributeError(
                "This MatrixFreeLaplace has no curvature: run fit(train_loader); after load_state_dict, pass it the "
                "loader too: load_state_dict(state, train_loader)."
            )

    # ---------------------------------------------------------------- fit

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """Take the parameters as they are, build the curvature over the loader (lazily), and compute the loss.

        Args:
            train_loader: Loader, or list, of batches `(x, y)` or mappings. It is gone through again by later questions
                and must give the same data; one that shuffles is read in the data set's order.
            override: False adds the curvature and the loss of these data at the present parameters to those from
                earlier calls, as laplace-torch does for sequential updates: H becomes a sum of operators, each with a
                copy of the network and its own loader, and the mean moves to the present parameters.
            progress_bar: Show one for every pass over the data.

        Cost: one forward over the data without graph; the curvature's work comes with the first question.
        """
        mean = torch.nn.utils.parameters_to_vector(self.params)
        copy = self._copied()
        H, objective = self._curvature(copy, train_loader, progress_bar)
        loss = torch.zeros((), dtype=self.dtype, device=self._device)
        seen = outputs = 0
        with torch.no_grad():
            for batch, f in objective.evaluate():
                loss = loss + objective.needed_likelihood().loss(f, batch.y)
                seen, outputs = seen + len(batch.y), f.shape[-1]
        # An error above leaves the earlier fit as it was.
        before = None if override else self.H
        if before is None:
            self.loss, self.n_data = 0.0, 0
        self._forget()
        self.mean: Tensor = mean if self.enable_backprop else mean.detach()
        self.H = H if before is None else before + H
        self._network = Network(copy)
        self.loss = self.loss + loss
        self.n_data, self.n_outputs = self.n_data + seen, outputs

    def _copied(self) -> nn.Module:
        """The user's network as it is now, in the curvature's dtype and in eval mode."""
        return snapshot(unwrap(self.model)).to(self.dtype).eval()

    def _curvature(self, copy: nn.Module, loader: Any, progress: bool) -> tuple[LinearOperator, Objective]:
        backend = self._backend_cls(
            copy, self.likelihood, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y, **self._backend_kwargs
        )
        interface = backend.curvops
        objective = Objective(
            copy, interface._likelihood, _in_order(loader), dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y,
            memory_budget=self.memory_budget, progress=progress, cast=True,
        )  # fmt: skip
        return interface._full(objective), objective

    def release(self) -> None:
        """Drop the graphs, the Gram matrix and the factorisation that questions left; they are made again at need."""
        if self._made is not None:
            self._made[2].precision.release()
        if self.H is not None:
            self.H.release()
        self._made = self._scratch = None

    # ---------------------------------------------------------------- the posterior

    @property
    def _H_factor(self) -> Tensor:
        """1 / (σ² T), in the curvature's precision."""
        return 1 / self.sigma_noise.to(self.dtype).square() / self.temperature

    @property
    def posterior(self) -> Gaussian:
        """N(mean, A⁻¹) as a curvops `Gaussian`; kept, with its factorisations, while nothing it depends on changes."""
        self._check_H_init()
        parts = (self.H, self._prior_precision, self._sigma_noise, self.mean)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        facts = (self.temperature, *(t._version for t in tensors))
        if self._made is not None and self._made[1] == facts and all(map(operator.is_, self._made[0], parts)):
            return self._made[2]
        factor = self._H_factor if self._sigma_noise.requires_grad else float(self._H_factor)
        assert self.H is not None
        precision = factor * self.H + self._prior(self.H)
        made = Gaussian(self.mean.detach().to(self.dtype), precision, self.generator)
        if not any(t.requires_grad for t in tensors):  # a graph is walked once
            self._made = (parts, facts, made)
        return made

    def _prior(self, H: LinearOperator) -> LinearOperator:
        """D: a multiple of the identity, one number per parameter tensor, or a diagonal."""
        delta, layout = self.prior_precision, H.layout
        if len(delta) == 1:
            return damping(_plain(delta[0]), H)
        if len(delta) != self.n_params and layout is not None and len(delta) == len(layout):
            return damping({name: _plain(d) for name, d in zip(layout, delta, strict=True)}, H)
        return damping(self.prior_precision_diag.to(self.dtype), H)

    @property
    def posterior_precision(self) -> LinearOperator:
        """A = H / (σ² T) + D, an operator; `to_dense()` is the matrix of `FullLaplace`."""
        return self.posterior.precision

    @property
    def posterior_covariance(self) -> LinearOperator:
        """A⁻¹, an operator whose products are solves."""
        return self.posterior.precision.inverse()

    @property
    def log_likelihood(self) -> Tensor:
        """Σ log p(y | f) / T of the training data, differentiable in σ."""
        value = -self._H_factor * self.loss
        if self.likelihood == "regression":
            log_sigma = self.sigma_noise.to(self.dtype).log()
            value = value - self.n_data * self.n_outputs * (log_sigma + 0.5 * math.log(2 * math.pi))
        return value

    @property
    def scatter(self) -> Tensor:
        """(mean − prior_mean)ᵀ D (mean − prior_mean)."""
        self._check_H_init()
        assert self.H is not None
        return self._prior(self.H).quadratic_form((self.mean - self.prior_mean).to(self.dtype))

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """log det A, differentiable in the prior precision and σ; see `reports["log_det_posterior_precision"]`."""
        value, report = self.posterior.precision.logdet(self.logdet_method, return_report=True)
        self.reports["log_det_posterior_precision"] = report
        return value

    @property
    def log_det_prior_precision(self) -> Tensor:
        """log det D."""
        self._check_H_init()
        assert self.H is not None
        return self._prior(self.H).logdet()

    @property
    def log_det_ratio(self) -> Tensor:
        """log det A − log det D; see `reports["log_det_ratio"]`."""
        value = self.log_det_posterior_precision - self.log_det_prior_precision
        self.reports["log_det_ratio"] = self.reports["log_det_posterior_precision"].carried(value, 1.0)  # type: ignore[attr-defined]
        return value

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """As the base class's, differentiable in both; its error is in `reports["log_marginal_likelihood"]`.

        Cost: one log-determinant: exact where P or the rows of function space are few, otherwise estimated.
        """
        value = super().log_marginal_likelihood(prior_precision, sigma_noise)
        ratio = self.reports["log_det_ratio"]
        self.reports["log_marginal_likelihood"] = ratio.carried(value, -0.5)  # type: ignore[attr-defined]
        return value

    def square_norm(self, value: Tensor) -> Tensor:
        """(value − mean)ᵀ A (value − mean): 0-dim for `(P,)`, `(n,)` for `(n, P)`."""
        deviation = (value - self.mean).to(self.dtype)
        return self.posterior.precision.quadratic_form(deviation.T if deviation.dim() == 2 else deviation)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """As the base class's; `reports["log_prob"]` where it is normalised."""
        result = super().log_prob(value, normalized)
        if normalized:
            logdet = self.reports["log_det_posterior_precision"]
            self.reports["log_prob"] = logdet.carried(result, 0.5)  # type: ignore[attr-defined]
        return result

    # ---------------------------------------------------------------- prior precision

    def spectrum(self, probes: int = 10, steps: int = 64) -> Spectrum:
        """Of H, made once: it serves every δ, σ and T.

        All eigenvalues where P or the rows of function space are at most 4,096; Lanczos on the Gram matrix up to 12,288
        rows; otherwise Lanczos with `probes · steps` products.
        """
        self._check_H_init()
        assert self.H is not None
        if (probes, steps) not in self._spectra:
            size, gram = self.H.shape[0], self.H._gram()
            rows = size if gram is None else min(size, gram.shape[0])
            method: methods.Method | None = None
            if rows <= MAX_DENSE:
                method = methods.Eigh()
            elif rows < size and rows <= MAX_ROWS:
                method = methods.FunctionSpace()
            self._spectra[probes, steps] = self.H.spectrum(probes, steps, method)
        return self._spectra[probes, steps]

    def optimize_prior_precision(
        self,
        pred_type: Any = "glm",
        method: Any = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: Any = "scalar",
        val_loader: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As the base class's; a scalar prior precision by marginal likelihood is found from one `spectrum()`.

        That road goes to the maximum itself, in the bounds 10⁻⁶ and 10⁶ for δ σ² T: `n_steps`, `lr` and the initial
        value do not count. Its error is in `reports["optimize_prior_precision"]`, and a warning says so where it is
        above 10 %. Every other structure takes `n_steps` of Adam with gradients of the log-determinant; "gridsearch" is
        the base class's.
        """
        scalar = not isinstance(init_prior_prec, Tensor) or init_prior_prec.numel() == 1
        if str(getattr(method, "value", method)) != "marglik" or not scalar or prior_structure != "scalar":
            return super().optimize_prior_precision(
                pred_type, method, n_steps, lr, init_prior_prec, prior_structure, val_loader, *args, **kwargs
            )
        if val_loader is not None:
            warnings.warn('`val_loader` is ignored when method is "marglik"; use "gridsearch".', stacklevel=2)
        factor = float(self._H_factor.detach())
        distance = math.sqrt(factor) * (self.mean - self.prior_mean).detach().to(self.dtype)
        # With δ = factor · δ′ the evidence is that of H at δ′ and a mean √factor as far from the prior's.
        report = self.spectrum().optimal_prior_precision(float(self.loss), distance)
        low, high = report.bracket
        report = replace(
            report, value=factor * report.value, stderr=factor * report.stderr, half_width=factor * report.half_width,
            bracket=(factor * low, factor * high),
        )  # fmt: skip
        self.reports["optimize_prior_precision"] = report
        self.prior_precision = torch.tensor([report.value], dtype=self._dtype, device=self._device)
        if not report.converged or report.half_width > _WIDE * report.value:
            warnings.warn(
                f"the optimal prior precision is {report.value:.3g} ± {report.half_width:.2g}: {report.reason} More "
                f"probes or steps, la.spectrum(probes, steps).optimal_prior_precision(…), narrow it.",
                NumericalWarning,
                stacklevel=2,
            )
        if kwargs.get("verbose"):
            print(f"Optimized prior precision is {self.prior_precision}.")
        return None

    # ---------------------------------------------------------------- keeping

    def state_dict(self) -> dict[str, Any]:
        """As the base class's, with None for H: a curvature that is a function of network and data is not written."""
        return {**super().state_dict(), "H": None}

    def load_state_dict(self, state_dict: dict[str, Any], train_loader: Any = None) -> None:
        """As the base class's; with the loader that was fitted on, H is there again, at the mean of the state.

        Args:
            state_dict: What `state_dict` gave.
            train_loader: The training data. Without it only the numbers in the state can be asked for.

        Raises:
            DataError: Other data than those of the state.
        """
        super().load_state_dict(state_dict)
        self._init_H()
        if train_loader is None:
            return
        copy = self._copied()
        selected = [p for p in copy.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, piece in zip(selected, self.mean.split([p.numel() for p in selected]), strict=True):
                p.copy_(piece.view_as(p))
        H, objective = self._curvature(copy, train_loader, False)
        loss = float(objective.loss())
        if objective.num_data != self.n_data or not math.isclose(loss, float(self.loss), rel_tol=1e-4, abs_tol=1e-6):
            raise DataError(
                f"load_state_dict: the loader gives {objective.num_data} data with a loss of {loss:.6g}, and the state "
                f"was fitted on {self.n_data} with {float(self.loss):.6g}; expected the same data and network. A state "
                "from several fits (override=False) is fitted again."
            )
        self.H, self._network = H, Network(copy)


def _plain(value: Tensor) -> Scalar:
    """A number, or the tensor itself where gradients are asked of it."""
    return value if value.requires_grad else float(value)


def _ours(backend: type | None) -> type:
    """The class of ours with the curvature of that backend.

    Raises:
        UnsupportedError: None is known for it.
    """
    if backend is None:
        return NativeGGN
    if isinstance(backend, type):
        if issubclass(backend, LaplaceBackend):
            return backend
        if issubclass(backend, library.EFInterface):
            return NativeEF
        if issubclass(backend, library.GGNInterface):
            return NativeGGN
        if issubclass(backend, library.CurvatureInterface) and backend.__name__.endswith("Hessian"):
            return NativeHessian
    raise UnsupportedError(
        f"MatrixFreeLaplace(backend={backend!r}): expected a GGN, EF or Hessian backend of laplace-torch, or one of "
        "curvops.interop.laplace; backend(interface) there makes one of any curvops.CurvatureInterface"
    )


def _in_order(loader: Any) -> Any:
    """A loader that shuffles, in the data set's order: the same sum over the data, and every pass gives it again."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, RandomSampler) or sampler.replacement:
        return loader
    if loader.batch_size is None or sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
        return loader
    return DataLoader(
        loader.dataset, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
        drop_last=loader.drop_last,
    )  # fmt: skip
