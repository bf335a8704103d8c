"""What every curvature is built from: a network, a likelihood, data, and the parameters that count."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from curvops.errors import DataError
from curvops.memory import default_budget
from curvops.nets.batches import Batch
from curvops.nets.data import DataSource
from curvops.nets.forward import Network, rebuilt
from curvops.nets.likelihood import Likelihood
from curvops.nets.likelihoods import resolve
from curvops.nets.parameters import ParameterSelection, Params, unwrap
from curvops.nets.passes import PassRecord
from curvops.nets.watch import Watch, snapshot
from curvops.operators.base import Layout


class Options(TypedDict, total=False):
    """The keywords that every curvature's constructor shares; see `Objective`."""

    params: Params
    dict_key_x: str
    dict_key_y: str
    num_data: int | None
    memory_budget: int | None
    progress: bool
    snapshot: bool


class Objective:
    """The negative log-likelihood, summed over the data, as a function of the selected parameters.

    Building it reads the parameters once, runs no forward and reads nothing from an iterable.

    Args:
        model: The user's module.
        likelihood: As in design §2.2: a name, an enum, a loss module with `reduction="sum"`, or a `Likelihood`; None
            for what needs no likelihood (a Jacobian).
        data: One batch `(x, y)`, a Mapping, or a re-iterable of batches.
        params: None, "last_layer", names or prefixes, or flat indices.
        dict_key_x: Key of the inputs that count the data, where x is a Mapping.
        dict_key_y: Key of the targets, where a batch is a Mapping.
        num_data: N, where known in advance; never a scale.
        memory_budget: Peak bytes of a verb, kept graphs included; None for half of what is free at the call.
        progress: Show a bar for every pass over the data.
        snapshot: Work on a copy of the model and of in-memory batches, made now.
        cast: Convert floating data to the parameters' dtype (set for copies in another dtype).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        params: Params = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        num_data: int | None = None,
        memory_budget: int | None = None,
        progress: bool = False,
        snapshot: bool = False,
        cast: bool = False,
    ) -> None:
        self.model = _copied(model) if snapshot else model
        self._options: Options = {
            "params": params.clone() if isinstance(params, Tensor) else params,
            "dict_key_x": dict_key_x,
            "dict_key_y": dict_key_y,
            "num_data": num_data,
            "memory_budget": memory_budget,
            "progress": progress,
        }
        self._data = _copied_batches(data) if snapshot else data
        self._cast = cast
        self.network = Network(self.model)
        self.selection = ParameterSelection(self.model, params)
        # A copy: who turns the user's own to another scale shall not turn half of what is kept.
        self.likelihood: Likelihood | None = None if likelihood is None else copy.copy(resolve(likelihood))
        self.source = DataSource(self._data, dict_key_x=dict_key_x, dict_key_y=dict_key_y, num_data=num_data)
        self.record = PassRecord()
        self.watch = Watch(self.model, self.source.tensors())
        self.memory_budget, self.progress = memory_budget, progress
        self._checked = False
        self.generation = 0

    def needed_likelihood(self) -> Likelihood:
        """The likelihood.

        Raises:
            DataError: None was given to a curvature that needs one.
        """
        if self.likelihood is None:
            raise DataError(
                'The likelihood is None; a curvature of the loss needs one, such as "regression", "classification" or '
                '"binary". A Jacobian or an unweighted Gram matrix needs none.'
            )
        return self.likelihood

    @property
    def num_data(self) -> int | None:
        """N, or None until a pass has counted it."""
        return self.source.num_data

    @property
    def layout(self) -> Layout | None:
        """Where each parameter lies in a vector; None for a selection by flat indices."""
        if self.selection.indices is not None:
            return None
        ends = [offset + size for offset, size in zip(self.selection.offsets, self.selection.sizes, strict=True)]
        return {
            name: slice(start, end)
            for name, start, end in zip(self.selection.names, self.selection.offsets, ends, strict=True)
        }

    def budget(self) -> int:
        """Bytes that a verb may take now."""
        return default_budget(self.selection.device) if self.memory_budget is None else self.memory_budget

    def refresh(self) -> int:
        """The cheap watch, before every pass: a number that grows when graphs kept before must be dropped.

        Raises:
            StaleOperatorError: Parameters, buffers, in-memory data or modes have changed.
        """
        if self.watch.check():  # written in place with equal content: autograd refuses graphs of before
            self.generation += 1
        return self.generation

    def batches(self) -> Iterator[Batch]:
        """One pass over the data, on the parameters' device; `check` and `observe` each batch, in order."""
        dtype = self.selection.dtype if self._cast else None
        yield from self.source.batches(self.selection.device, dtype, self.progress, "curvature")
        self.record.finish()
        self._checked = True

    def check(self, f: Tensor, y: Tensor) -> None:
        """Refuse targets that do not fit the likelihood and the network's outputs, which are finite or were refused by
        the network itself; values are read until a pass was completed.
        """
        if self.likelihood is not None:
            self.likelihood.check_shapes(f, y)
            if not self._checked:
                self.likelihood.check_targets(f, y)

    def observe(self, batch: Batch, f: Tensor) -> None:
        """Note a batch's outputs and targets, so that a pass which does not repeat the first is found out."""
        self.record.observe(batch.index, f, batch.y)

    def evaluate(self) -> Iterator[tuple[Batch, Tensor]]:
        """One pass of forwards: every batch with its outputs, detached."""
        self.refresh()
        for batch in self.batches():
            f = self.network.evaluate(batch.x)
            self.check(f, batch.y)
            self.observe(batch, f)
            yield batch, f

    def loss(self) -> Tensor:
        """Σ −log p without constants, 0-dim; one no-grad forward per batch."""
        likelihood = self.needed_likelihood()
        total = torch.zeros((), dtype=self.selection.dtype, device=self.selection.device)
        with torch.no_grad():
            for batch, f in self.evaluate():
                total = total + likelihood.loss(f, batch.y)
        return total

    def to(self, dtype: torch.dtype, device: torch.device) -> Objective:
        """The same objective on a private copy of the model in another dtype or on another device."""
        self.refresh()
        self.watch.check_content()
        model = _copied(self.model).to(device=device, dtype=dtype)
        cast = self._cast or dtype != self.selection.dtype
        return Objective(model, self.likelihood, self._data, cast=cast, **self._options)


def _copied(model: nn.Module) -> nn.Module:
    return snapshot(unwrap(model))


def _copied_batches(data: Any) -> Any:
    """In-memory batches copied; an iterable that makes its batches anew stays what it is."""
    if isinstance(data, Tensor):
        return data.detach().clone()
    if isinstance(data, Mapping):
        return rebuilt(data, {key: _copied_batches(value) for key, value in data.items()})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_copied_batches(part) for part in data))
    if type(data) in (tuple, list):
        return type(data)(_copied_batches(part) for part in data)
    return data
