"""A model seen as features and a linear last layer."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvops.errors import DataError, UnsupportedLayerError
from curvops.nets.forward import Network

Inputs = Tensor | Mapping[str, Any]


class FeatureReduction(str, Enum):
    """How features `(B, …, D)` of more than two dimensions become `(B, D)`, where the model does so too."""

    PICK_FIRST = "pick_first"
    PICK_LAST = "pick_last"
    AVERAGE = "average"


class FeatureExtractor(nn.Module):
    """Wraps a model so that its last linear layer is at `.last_layer` and its input can be had beside the output.

    The layer is found by name, not registered a second time: it keeps one name in `named_parameters()` and one entry in
    the `state_dict`. No hook stays on the model between calls.

    Args:
        model: The network; its last layer with parameters must be an `nn.Linear` (a module like any other, called
            once in a forward).
        last_layer_name: The layer's name in `model.named_modules()`; None to find it in the first forward.
        enable_backprop: Leave the features attached to the graph.
        feature_reduction: "pick_first", "pick_last" or "average": what the model does with features of more than two
            dimensions; None leaves them.

    Example:
        >>> import torch, curvops as co
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        >>> f, features = co.FeatureExtractor(net).forward_with_features(torch.ones(4, 3))
        >>> f.shape, features.shape
        (torch.Size([4, 2]), torch.Size([4, 5]))
    """

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
    ) -> None:
        super().__init__()
        kinds = [kind.value for kind in FeatureReduction]
        if feature_reduction is not None and feature_reduction not in kinds:
            raise DataError(f"feature_reduction is {feature_reduction!r}; expected None or one of {kinds}.")
        self.model = model
        self.enable_backprop = enable_backprop
        self.feature_reduction = None if feature_reduction is None else FeatureReduction(feature_reduction)
        self._last_layer_name: str | None = None
        if last_layer_name is not None:
            self.set_last_layer(last_layer_name)

    @property
    def last_layer(self) -> nn.Linear | None:
        """The last layer; None until it is named or a forward has found it."""
        return None if self._last_layer_name is None else self._layer(self._last_layer_name)

    def set_last_layer(self, last_layer_name: str) -> None:
        """Name the last layer.

        Raises:
            DataError: The model has no module of that name.
            UnsupportedLayerError: It is not linear.
        """
        self._layer(last_layer_name)
        self._last_layer_name = last_layer_name

    def find_last_layer(self, x: Inputs) -> Tensor:
        """Find the last layer by one forward: the last module with parameters that runs.

        Args:
            x: Inputs of one batch.

        Returns:
            The model's output.

        Raises:
            UnsupportedLayerError: What runs last is not linear.
        """
        ran: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
            for name, module in self.model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        try:
            output = self._call(x)
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise UnsupportedLayerError(
                f"no module with parameters of its own ran in the forward of {type(self.model).__name__}; a last layer "
                "is an nn.Linear that is called as a module"
            )
        self.set_last_layer(ran[-1])
        return output

    def forward(self, x: Inputs) -> Tensor:
        """The model's output `(B, C)` or `(B, T, C)`; finds the last layer if it is not known yet."""
        return self.find_last_layer(x) if self._last_layer_name is None else self._call(x)

    def forward_with_features(self, x: Inputs) -> tuple[Tensor, Float[Tensor, "B *_ D"]]:
        """The model's output, and what went into the last layer.

        Args:
            x: Inputs of one batch.

        Returns:
            f, and the features `(B, D)` (`(B, T, D)` where nothing reduces them), detached unless `enable_backprop`.

        Raises:
            UnsupportedLayerError: The last layer runs not exactly once in a forward.
        """
        if self._last_layer_name is None:
            with torch.no_grad():
                self.find_last_layer(x)
        layer = self.last_layer
        assert layer is not None
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            f = self._call(x)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise UnsupportedLayerError(
                f"the last layer {self._last_layer_name!r} ran {len(seen)} times in one forward; expected once"
            )
        features = seen[0] if self.enable_backprop else seen[0].detach()
        return f, self._reduced(features)

    def _call(self, x: Inputs) -> Tensor:
        network = Network(self.model)
        return network.output_tensor(network.call(x))

    def _reduced(self, features: Tensor) -> Tensor:
        if features.dim() <= 2 or self.feature_reduction is None:
            return features
        flat = features.flatten(1, -2)
        if self.feature_reduction is FeatureReduction.AVERAGE:
            return flat.mean(1)
        return flat[:, 0] if self.feature_reduction is FeatureReduction.PICK_FIRST else flat[:, -1]

    def _layer(self, name: str) -> nn.Linear:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if name not in modules:
            raise DataError(f"the model has no module named {name!r}; it has {[n for n in modules if n][-8:]}")
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise UnsupportedLayerError(
                f"the last layer {name!r} is {type(layer).__name__}; expected nn.Linear. Name the linear layer with "
                "last_layer_name=…, or select its parameters with params=[…] in co.GGN and its like"
            )
        return layer
