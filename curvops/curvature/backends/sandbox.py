"""A copy of the user's model for libraries that set hooks and attributes: numbers are shared, modules are not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import UnsupportedError
from curvops.nets.forward import Network
from curvops.nets.parameters import ParameterSelection, unwrap


class Outputs(nn.Module):
    """A private copy of a model as `x → f`, `(B, C)` or `(B, T, C)`, with the selected parameters alone trainable.

    Parameters share their storage with the user's, so that the copy costs no memory to speak of; buffers are copied.
    Hooks on backward passes do not come along. What is done to the copy, also by an exception, leaves no trace.

    Args:
        model: The user's module.
        selection: The parameters that keep `requires_grad`.

    Attributes:
        module: The copy.
        network: The copy, callable the right way.
        selected: Its parameters in the order of `selection`.

    Raises:
        UnsupportedError: The module does not copy.
    """

    def __init__(self, model: nn.Module, selection: ParameterSelection) -> None:
        super().__init__()
        model = unwrap(model)
        chosen = {id(p) for p in selection.tensors}
        memo: dict[int, Any] = {}
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        with torch.inference_mode(False):
            twins = {id(p): nn.Parameter(p.detach(), requires_grad=id(p) in chosen) for p in model.parameters()}
            memo.update(twins)
            try:
                self.module: nn.Module = copy.deepcopy(model, memo)
            except Exception as error:  # The modules' own __deepcopy__ runs here and may fail in any way.
                raise UnsupportedError(
                    f"{type(model).__name__} does not copy ({error}), and other libraries only get to see a copy; use "
                    "the native interfaces (GGNInterface, EFInterface, HessianInterface)"
                ) from error
        for module in self.module.modules():
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        self.network = Network(self.module)
        self.selected: list[nn.Parameter] = [twins[id(p)] for p in selection.tensors]

    def forward(self, x: Any) -> Tensor:
        """The output tensor."""
        return self.network.output_tensor(self.network.call(x))
