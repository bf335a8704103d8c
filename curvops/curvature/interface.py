"""The interface of `laplace.curvature`: names, argument order and scales of old, with lazy operators as results.

What every curvature shares: the model and its parameters, losses, Jacobians and gradients. `ggn`, `ef` and `hessian`
hold the native curvatures, `backends` those that another library computes.

Scales: `loss` is `factor · lossfunc = Σ −log p` without constants, summed over the batch and over the positions of a
sequence; `gradients` returns gradients and sum of the unscaled `lossfunc`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.curvature.objective import Objective
from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.linalg.probes import resolve_seed
from curvops.memory import default_budget, require
from curvops.nets.data import DataSource
from curvops.nets.forward import Network
from curvops.nets.jacobians import DEFAULT_BYTES, example_rows
from curvops.nets.jacobians import jacobians as attached_jacobians
from curvops.nets.likelihood import Likelihood
from curvops.nets.likelihoods import resolve
from curvops.nets.parameters import ParameterSelection, Params, unwrap
from curvops.operators.base import LinearOperator

Inputs = Tensor | Mapping[str, Any]


class CurvatureInterface:
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

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.likelihood = likelihood
        self._likelihood: Likelihood = resolve(likelihood)
        self.last_layer = bool(last_layer)
        self.dict_key_x, self.dict_key_y = dict_key_x, dict_key_y
        self.memory_budget: int | None = None
        if self.last_layer and not hasattr(unwrap(model), "last_layer"):
            raise DataError(
                f"last_layer=True needs a model with an attribute .last_layer; {type(model).__name__} has none: "
                "wrap it in curvops.FeatureExtractor"
            )
        self.subnetwork_indices = subnetwork_indices
        self._generator = _private_generator() if generator is None else generator

    # ---------------------------------------------------------------- facts

    @property
    def lossfunc(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss in torch's own scale, summed; for sequences `CrossEntropyLoss` wants `(B, C, T)`."""
        return self._likelihood.lossfunc

    @property
    def factor(self) -> float:
        """Between `lossfunc` and −log p."""
        return self._likelihood.factor

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters (of the last layer with `last_layer`), in the order of every flat vector."""
        return list(self.params_dict.values())

    @property
    def params_dict(self) -> dict[str, nn.Parameter]:
        """Their names in the model → the parameters."""
        model = unwrap(self.model)
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.last_layer:
            return found
        self._require_last_layer()
        last = {id(p) for p in model.last_layer.parameters()}  # type: ignore[union-attr]
        return {name: p for name, p in found.items() if id(p) in last}

    @property
    def buffers_dict(self) -> dict[str, Tensor]:
        """Names → buffers of the whole model."""
        return dict(unwrap(self.model).named_buffers())

    @property
    def subnetwork_indices(self) -> Tensor | None:
        """Entries of the flat parameter vector that count; None for all."""
        return self._subnetwork_indices

    @subnetwork_indices.setter
    def subnetwork_indices(self, indices: Tensor | None) -> None:
        before = getattr(self, "_subnetwork_indices", None)
        self._subnetwork_indices = indices
        if self.last_layer and getattr(unwrap(self.model), "last_layer", None) is None:
            return  # not known before the first forward; checked there
        try:
            self._selection()
        except Exception:
            self._subnetwork_indices = before
            raise

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
        return CurvatureInterface.jacobians(self, x, enable_backprop)

    def last_layer_jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "*f Q"], Float[Tensor, "*f"]]:
        """As `jacobians`, in the parameters of `model.last_layer` alone: `(B, C, P_last)` and f `(B, C)`.

        `subnetwork_indices` count where `last_layer=True`, whose vectors they index.
        """
        if self.last_layer:
            return CurvatureInterface.jacobians(self, x, enable_backprop)
        _find_last_layer(self.model, x)
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
        return self._rows(network, selection, x, f, cotangents), f

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Float[Tensor, "B P"], Float[Tensor, ""]]:
        """Gradient of the unscaled `lossfunc` of every example, summed over its positions.

        Args:
            x: Inputs of one batch.
            y: Targets.

        Returns:
            Gs `(B, P)`, and the unscaled loss summed over the batch, 0-dim; both detached.

        Cost: two forwards and one backward over each example, in chunks within the memory budget.
        """
        objective = self._objective(x, y)
        likelihood, factor = self._likelihood, self.factor
        ((batch, f),) = objective.evaluate()
        with torch.no_grad():
            residuals = likelihood.gradient(f, batch.y) / factor
            loss = likelihood.loss(f, batch.y) / factor
        rows = self._rows(objective.network, objective.selection, batch.x, f, residuals.unsqueeze(1))
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

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Float[Tensor, ""], LinearOperator]:
        """Loss and the Kronecker-factored curvature of one batch.

        Args:
            x, y: As for `full`.
            N: Number of data in all; see `CurvlinopsInterface.kron` for its place in the factors.
            kwargs: `mc_samples=` and `kfac_approx=`.

        Raises:
            UnsupportedError: This class has no Kronecker factorisation; the message names one that has.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no Kronecker factors; use CurvlinopsGGN or CurvlinopsEF from "
            "curvops.curvature, or full() and diag() of this class"
        )

    def _full(self, objective: Objective) -> LinearOperator:
        """The operator of `full`; no work."""
        raise UnsupportedError(
            f"{type(self).__name__} says nothing of which curvature; use GGNInterface, EFInterface or HessianInterface"
        )

    def _diag(self, objective: Objective) -> LinearOperator:
        """The operator of `diag`; no work."""
        return self._full(objective)  # refuses in the same words

    # ---------------------------------------------------------------- parts

    def _objective(self, x: Inputs, y: Tensor) -> Objective:
        """The negative log-likelihood of one batch."""
        if not isinstance(y, Tensor):
            raise DataError(f"y is {type(y).__name__}; expected a tensor of targets.")
        params = self._params_for(x)
        return Objective(
            self.model, self._likelihood, (self._without_targets(x), y), params=params,
            dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y, memory_budget=self.memory_budget,
        )  # fmt: skip

    def _params_for(self, x: Inputs) -> Params:
        """Which parameters count; a `FeatureExtractor` that does not know its last layer looks for it with x."""
        if self.last_layer:
            _find_last_layer(self.model, x)
        return self._params()

    def _params(self) -> Params:
        indices = self._subnetwork_indices
        if not self.last_layer:
            return indices
        self._require_last_layer()
        if indices is None:
            return "last_layer"
        everything = ParameterSelection(self.model)
        wanted = set(self.params_dict)
        places = zip(everything.names, everything.offsets, everything.sizes, strict=True)
        positions = torch.cat([torch.arange(o, o + size) for name, o, size in places if name in wanted])
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise ShapeError("subnetwork_indices must be a 1-dimensional LongTensor.")
        indices = indices.to(positions.device)
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(positions)):
            raise DataError(
                f"subnetwork_indices reach from {int(indices.min())} to {int(indices.max())}; with last_layer=True "
                f"they index the {len(positions)} entries of the last layer."
            )
        return positions[indices]

    def _selection(self) -> ParameterSelection:
        params = self._params()
        if params is not None and not isinstance(params, Tensor | str):
            raise ShapeError(f"subnetwork_indices must be a 1-dimensional LongTensor, got {type(params).__name__}.")
        return ParameterSelection(self.model, params)

    def _require_last_layer(self) -> None:
        if getattr(unwrap(self.model), "last_layer", None) is None:
            raise DataError(
                "the model does not know its last layer yet; call model.find_last_layer(x) with one batch, or name it: "
                "FeatureExtractor(model, last_layer_name=…)"
            )

    def _without_targets(self, x: Inputs) -> Inputs:
        if not isinstance(x, Mapping) or self.dict_key_y not in x:
            return x
        rest = {key: value for key, value in x.items() if key != self.dict_key_y}
        try:
            return rest if type(x) is dict else type(x)(rest)  # type: ignore[call-arg]
        except TypeError:
            return rest

    def _prepared(self, x: Inputs, params: Params) -> tuple[Inputs, Network, ParameterSelection]:
        """Inputs checked and where the parameters are, the network and the selection."""
        network, selection = Network(self.model), ParameterSelection(self.model, params)
        x = self._without_targets(x)
        counter = x.get(self.dict_key_x) if isinstance(x, Mapping) else x
        size = counter.shape[0] if isinstance(counter, Tensor) and counter.dim() else 1
        source = DataSource((x, torch.zeros(size)), dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)
        (batch,) = source.batches(selection.device)
        return batch.x, network, selection

    def _jacobians(self, x: Inputs, params: Params, enable_backprop: bool) -> tuple[Tensor, Tensor]:
        x, network, selection = self._prepared(x, params)
        if enable_backprop:
            return attached_jacobians(network, selection, x, enable_backprop=True)
        f = network.evaluate(x)
        return self._rows(network, selection, x, f).reshape(*f.shape, selection.size), f

    def _rows(
        self,
        network: Network,
        selection: ParameterSelection,
        x: Inputs,
        f: Tensor,
        cotangents: Float[Tensor, "B R *event"] | None = None,
    ) -> Float[Tensor, "B R P"]:
        """Rows `uᵀ J_n` of every example, written into the result chunk by chunk."""
        number = f.shape[1:].numel() if cotangents is None else cotangents.shape[1]
        needed = len(f) * number * selection.size * f.element_size()
        budget = default_budget(selection.device) if self.memory_budget is None else self.memory_budget
        require(
            needed, budget, selection.device,
            f"a result of {len(f)} x {number} rows of P={selection.size:,}",
            "Use co.Jacobian(model, data), which is matrix-free, fewer examples a call, last_layer=True, or "
            "subnetwork_indices.",
        )  # fmt: skip
        result = f.new_empty(len(f), number, selection.size)
        room = min(DEFAULT_BYTES, max(budget - needed, budget // 16))
        for start, rows, _ in example_rows(network, selection, x, cotangents, f=f, byte_budget=room):
            result[start : start + len(rows)] = rows
        return result

    def _seed(self) -> int:
        """A fresh seed; the generator advances."""
        return resolve_seed(self._generator)

    def __repr__(self) -> str:
        parts = [type(self.model).__name__, self._likelihood.name]
        parts += ["last layer"] if self.last_layer else []
        parts += [] if self._subnetwork_indices is None else [f"{len(self._subnetwork_indices):,} entries"]
        return f"{type(self).__name__}({', '.join(parts)})"


def _private_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()  # from the system; the global generator is not asked
    return generator


def _find_last_layer(model: nn.Module, x: Inputs) -> None:
    inner = unwrap(model)
    if getattr(inner, "last_layer", None) is None and callable(find := getattr(inner, "find_last_layer", None)):
        with torch.no_grad():
            find(x)


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
