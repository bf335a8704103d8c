"""What the interface works on: a model, the parameters of it that count, a likelihood, and a source of randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.curvature.objective import Objective
from curvops.errors import DataError, ShapeError
from curvops.linalg.probes import resolve_seed
from curvops.memory import default_budget, require
from curvops.nets.data import DataSource
from curvops.nets.forward import Network
from curvops.nets.jacobians import DEFAULT_BYTES, example_rows
from curvops.nets.jacobians import jacobians as attached_jacobians
from curvops.nets.likelihood import Likelihood
from curvops.nets.likelihoods import resolve
from curvops.nets.parameters import ParameterSelection, Params, unwrap

Inputs = Tensor | Mapping[str, Any]


class Subject:
    """Model, parameters, likelihood and generator; arguments and attributes are told at `CurvatureInterface`."""

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
            find_last_layer(self.model, x)
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
        positions = torch.cat([torch.arange(o, o + size, device="cpu") for name, o, size in places if name in wanted])
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
        batch = x, torch.zeros(size, device="cpu")
        source = DataSource(batch, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)
        (batch,) = source.batches(selection.device)
        return batch.x, network, selection

    def _jacobians(
        self, x: Inputs, params: Params, enable_backprop: bool, *, native: bool = False
    ) -> tuple[Tensor, Tensor]:
        x, network, selection = self._prepared(x, params)
        if enable_backprop:
            return attached_jacobians(network, selection, x, enable_backprop=True)
        f = network.evaluate(x)
        rows = self._rows if native else self._example_rows
        return rows(network, selection, x, f).reshape(*f.shape, selection.size), f

    def _example_rows(
        self,
        network: Network,
        selection: ParameterSelection,
        x: Inputs,
        f: Tensor,
        cotangents: Float[Tensor, "B R *event"] | None = None,
    ) -> Float[Tensor, "B R P"]:
        """Rows `uᵀ J_n` of every example; a backend overrides it where its library computes them.

        Args:
            network, selection, x: What is differentiated, and where; prepared.
            f: Outputs at x.
            cotangents: u of every example; None for all unit vectors of its outputs.
        """
        return self._rows(network, selection, x, f, cotangents)

    def _rows(
        self,
        network: Network,
        selection: ParameterSelection,
        x: Inputs,
        f: Tensor,
        cotangents: Float[Tensor, "B R *event"] | None = None,
    ) -> Float[Tensor, "B R P"]:
        """The native `_example_rows`, written into the result chunk by chunk."""
        result, room = self._room_for_rows(selection, f, cotangents)
        for start, rows, _ in example_rows(network, selection, x, cotangents, f=f, byte_budget=room):
            result[start : start + len(rows)] = rows
        return result

    def _room_for_rows(
        self, selection: ParameterSelection, f: Tensor, cotangents: Tensor | None
    ) -> tuple[Float[Tensor, "B R P"], int]:
        """An empty result, and the bytes left for computing it.

        Raises:
            MemoryBudgetError: The result itself does not fit.
        """
        number = f.shape[1:].numel() if cotangents is None else cotangents.shape[1]
        needed = len(f) * number * selection.size * f.element_size()
        budget = default_budget(selection.device) if self.memory_budget is None else self.memory_budget
        require(
            needed, budget, selection.device,
            f"a result of {len(f)} x {number} rows of P={selection.size:,}",
            "Use co.Jacobian(model, data), which is matrix-free, fewer examples a call, last_layer=True, or "
            "subnetwork_indices.",
        )  # fmt: skip
        room = min(DEFAULT_BYTES, max(budget - needed, budget // 16))
        return f.new_empty(len(f), number, selection.size), room

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


def find_last_layer(model: nn.Module, x: Inputs) -> None:
    """Let a `FeatureExtractor` that does not know its last layer look for it, by one forward."""
    inner = unwrap(model)
    if getattr(inner, "last_layer", None) is None and callable(find := getattr(inner, "find_last_layer", None)):
        with torch.no_grad():
            find(x)
