"""The interface of `laplace.curvature`: names, argument order and scales of old, with lazy operators as results.

What every curvature shares: losses, Jacobians, gradients. `ggn`, `ef` and `hessian` hold the native curvatures,
`backends` those that another library computes.

Scales: `loss` is `factor · lossfunc = Σ −log p` without constants, summed over the batch and over the positions of a
sequence; `gradients` returns gradients and sum of the unscaled `lossfunc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree.cotangents import Cotangents, FisherKind
from curvops.curvature.objective import Objective
from curvops.curvature.structured.kfac import KFAC
from curvops.curvature.structured.statistics import Approx
from curvops.curvature.subject import Inputs, Subject, find_last_layer
from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.nets.jacobians import jacobians as attached_jacobians
from curvops.operators.base import LinearOperator


class CurvatureInterface(Subject):
    """A model and its likelihood, asked for curvatures batch by batch; subclasses say which curvature.

    Args:
        model: The network, in eval mode where it has BatchNorm or Dropout. With `last_layer=True` it has an attribute
            `.last_layer` (see `curvops.FeatureExtractor`).
        likelihood: "regression", "classification", "binary", an enum of these values, a loss module with
            `reduction="sum"`, or a `curvops.likelihoods.Likelihood`.
        last_layer: Restrict every method to the parameters of `model.last_layer`.
        subnetwork_indices: LongTensor of the entries that count in the flat vector of trainable parameters (of the last
            layer's with `last_layer`); may be set later too. Honoured by all methods but `kron`, which refuses.
        dict_key_x: Key of the inputs that count the data, where x is a Mapping.
        dict_key_y: Key of the targets within such a Mapping; the model does not get to see them.
        generator: Source of all randomness, which advances; None for a private one seeded by the system.

    Attributes:
        lossfunc: The likelihood's torch loss, `reduction="sum"`.
        factor: `factor · lossfunc = −log p`: ½ for regression, otherwise 1.
        memory_budget: Peak bytes of one call or verb; None for half of what is free then. May be set.

    Raises:
        DataError: Unknown likelihood, no trainable parameter, no `.last_layer`, indices out of range.
        UnsupportedError: `likelihood="reward_modeling"`.
    """

    _fisher: FisherKind | None = None

    # ---------------------------------------------------------------- Jacobians and gradients

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Float[Tensor, "*f P"], Float[Tensor, "*f"]]:
        """Jacobian of every example's outputs in the parameters that count.

        Args:
            x: Inputs of one batch.
            enable_backprop: Keep the graph from both results to `x` and the parameters (small batches).

        Returns:
            `(B, C, P)` and f `(B, C)`; `(B, T, C, P)` and `(B, T, C)` for sequences.

        Raises:
            MemoryBudgetError: The result itself is past the memory budget.

        Cost: two forwards and C (or T·C) backward passes over each example, in chunks within the memory budget.
        """
        return self._jacobians(x, self._params_for(x), enable_backprop)

    def functorch_jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "*f P"], Float[Tensor, "*f"]]:
        """The native `jacobians`, also where a backend overrides that one."""
        return self._jacobians(x, self._params_for(x), enable_backprop, native=True)

    def last_layer_jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "*f Q"], Float[Tensor, "*f"]]:
        """As `jacobians`, in the parameters of `model.last_layer` alone: `(B, C, P_last)` and f `(B, C)`.

        `subnetwork_indices` count where `last_layer=True`, whose vectors they index.
        """
        if self.last_layer:
            return self.jacobians(x, enable_backprop)
        find_last_layer(self.model, x)
        return self._jacobians(x, "last_layer", enable_backprop)

    def selected_output_jacobians(
        self, x: Inputs, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "B S P"], Float[Tensor, "B C"]]:
        """Rows of the Jacobian for some outputs of each example; the others are not computed.

        Args:
            x: Inputs of one batch.
            outputs: `(B,)` or `(B, S)` indices of outputs.
            enable_backprop: As in `jacobians`; then all rows are computed.

        Returns:
            `(B, S, P)` and f `(B, C)`.

        Raises:
            ShapeError: Selectors that do not fit the batch, or sequence outputs.
            DataError: An index out of range.
        """
        params = self._params_for(x)
        x, network, selection = self._prepared(x, params)
        f = network.evaluate(x)
        outputs = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
        if f.dim() != 2 or outputs.dim() != 2 or len(outputs) != len(f):
            raise ShapeError(
                f"outputs has shape {tuple(outputs.shape)} and the network's outputs {tuple(f.shape)}; expected (B,) "
                "or (B, S) indices for outputs (B, C)."
            )
        outputs = outputs.to(device=f.device, dtype=torch.long)
        if outputs.numel() and (int(outputs.min()) < 0 or int(outputs.max()) >= f.shape[1]):
            raise DataError(f"outputs reach from {int(outputs.min())} to {int(outputs.max())}; there are {f.shape[1]}.")
        if enable_backprop:
            J, f = attached_jacobians(network, selection, x, enable_backprop=True)
            return J.gather(1, outputs.unsqueeze(-1).expand(*outputs.shape, J.shape[-1])), f
        cotangents = torch.nn.functional.one_hot(outputs, f.shape[1]).to(f.dtype)
        return self._example_rows(network, selection, x, f, cotangents), f

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Float[Tensor, "B P"], Float[Tensor, ""]]:
        """Gradient of the unscaled `lossfunc` of every example, summed over its positions.

        Args:
            x: Inputs of one batch.
            y: Targets.

        Returns:
            Gs `(B, P)`, and the unscaled loss summed over the batch, 0-dim; both detached.

        Cost: two forwards and one backward over each example, in chunks within the memory budget, and a gradient of the
            chunk that they are compared with.
        """
        objective = self._objective(x, y)
        likelihood, factor = self._likelihood, self.factor
        ((batch, f),) = objective.evaluate()
        with torch.no_grad():
            residuals = likelihood.gradient(f, batch.y) / factor
            loss = likelihood.loss(f, batch.y) / factor
        rows = self._example_rows(objective.network, objective.selection, batch.x, f, residuals.unsqueeze(1))
        return rows[:, 0], loss.detach()

    # ---------------------------------------------------------------- curvatures

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Float[Tensor, ""], LinearOperator]:
        """Loss and the whole curvature of one batch, P x P, matrix-free: `to_dense()` is a choice.

        Args:
            x: Inputs of one batch.
            y: Targets: of f's shape for regression and binary, integers `(B,)` or `(B, T)` for classification.
            kwargs: `N` is accepted and ignored, since the curvature is a sum over the batch.

        Returns:
            `factor · lossfunc`, 0-dim and detached, and the operator, summed over the batch.

        Cost: one forward without graph, for the loss; the operator does its work at its first product.
        """
        refuse_unknown(self, "full", kwargs, ("N",))
        objective = self._objective(x, y)
        return objective.loss(), self._full(objective)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Float[Tensor, ""], LinearOperator]:
        """Loss and the exact diagonal of the curvature of one batch, as a diagonal operator.

        Args:
            x, y, kwargs: As for `full`.

        Returns:
            `factor · lossfunc`, and the operator, whose entries are computed at first need and kept.

        Cost: one forward without graph now; the entries later.
        """
        refuse_unknown(self, "diag", kwargs, ("N",))
        objective = self._objective(x, y)
        return objective.loss(), self._diag(objective)

    def kron(
        self,
        x: Inputs,
        y: Tensor,
        N: int,
        *,
        mc_samples: int | None = None,
        kfac_approx: Approx = "expand",
        **kwargs: Any,
    ) -> tuple[Float[Tensor, ""], LinearOperator]:
        """Loss and the Kronecker-factored curvature of one batch of M data (KFAC; Martens & Grosse 2015).

        One block per parameter, in their order: `B ⊗ A` for a weight `(out, in)`, `B` for a bias. B sums over the batch
        the outer products of output gradients; A is the mean of the layer's inputs' outer products, times M/N. So the
        factors of batches add up, B = Σ B_b and A = Σ A_b, to those of all N data; `+` adds operators, not factors.

        Args:
            x: Inputs of one batch.
            y: Targets.
            N: Number of data in all.
            mc_samples: Draws per datum where `stochastic`; None for `num_samples`.
            kfac_approx: "expand" or "reduce" for layers with several positions per datum (Eschenhagen et al. 2023).
            kwargs: None known.

        Returns:
            `factor · lossfunc`, and a block-diagonal operator `(P, P)`, whose factors are computed at first need.

        Raises:
            UnsupportedError: This curvature has no Kronecker factors, or `subnetwork_indices` are set.
            DataError: N, `mc_samples` or `kfac_approx` make no sense.

        Cost: one forward without graph now; C backward passes (exact), `mc_samples` (mc) or one (empirical) later. Of
        sequences exact and empirical take T times as many, but never more than about 256 (then by random signs).
        """
        refuse_unknown(self, "kron", kwargs, ("N", "mc_samples", "kfac_approx"))
        fisher = self._fisher
        if fisher is None:
            raise UnsupportedError(
                f"{type(self).__name__} has no Kronecker factors; use GGNInterface, CurvlinopsGGN or their EF "
                "twins from curvops.curvature, or full() and diag() of this class"
            )
        if self.subnetwork_indices is not None:
            raise UnsupportedError(
                "kron is a curvature of whole layers, and subnetwork_indices select single entries; use full(), diag()"
            )
        if isinstance(N, bool) or not isinstance(N, int) or N < 1:
            raise DataError(f"N is {N!r}; expected the number of data in all, at least 1.")
        if kfac_approx not in ("expand", "reduce"):
            raise DataError(f'kfac_approx is {kfac_approx!r}; expected "expand" or "reduce".')
        if mc_samples is not None and fisher != "mc":
            raise DataError(f"mc_samples={mc_samples} counts draws, and {self!r} draws none; set stochastic=True.")
        samples = getattr(self, "num_samples", 1) if mc_samples is None else mc_samples
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise DataError(f"mc_samples is {samples!r}; expected a whole number of at least 1.")
        self._require_root(fisher)
        objective = self._objective(x, y)
        cotangents = Cotangents(fisher, samples, self._seed() if fisher == "mc" else 0, tokens="auto")
        operator = self._kron(objective, cotangents, kfac_approx, N)
        return objective.loss(), operator

    def _require_root(self, fisher: FisherKind) -> None:
        """Refuse to pull Λ's root back where Λ has none."""
        if fisher == "exact" and not self._likelihood.is_convex:
            raise UnsupportedError(
                f"{self._likelihood!r} is not known to be convex in the outputs, so that Λ has no real root to pull "
                "back; use full(), whose operator has diagonal(), or Likelihood.from_loss(…, is_convex=True) if it is"
            )

    def _full(self, objective: Objective) -> LinearOperator:
        """The operator of `full`; no work."""
        raise UnsupportedError(
            f"{type(self).__name__} says nothing of which curvature; use GGNInterface, EFInterface or HessianInterface"
        )

    def _kron(self, objective: Objective, cotangents: Cotangents, approx: Approx, N: int) -> LinearOperator:
        """The operator of `kron`; no work."""
        scale = 1.0 / self.factor if cotangents.fisher == "empirical" else 1.0
        return KFAC.of(objective, cotangents, approx).fraction(N, objective.num_data or 0, scale)

    def _diag(self, objective: Objective) -> LinearOperator:
        """The operator of `diag`; no work."""
        return self._full(objective)  # refuses in the same words


def refuse_unknown(interface: object, method: str, kwargs: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise `TypeError` for keywords that the method does not know, as Python does for a function without `**`."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise TypeError(
            f"{type(interface).__name__}.{method}() got unknown keywords {unknown}; it takes x, y, {', '.join(known)}."
            + (
                " mc_samples= and kfac_approx= belong to kron()."
                if {"mc_samples", "kfac_approx"} & set(unknown)
                else ""
            )
        )
