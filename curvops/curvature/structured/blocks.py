"""Dense blocks along the diagonal: of each parameter, of each module, or of the user's own groups."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.fisher import Datum
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.matrixfree.layerdense import add_blocks, symmetrised
from curvops.curvature.matrixfree.layerpass import LayerPass
from curvops.curvature.objective import Objective, Options
from curvops.curvature.structured.factored import refuse_indices
from curvops.errors import DataError, NumericalWarning, UnsupportedError
from curvops.memory import require
from curvops.nets.parameters import ParameterSelection
from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.deferred import Deferred
from curvops.operators.dense import Dense
from curvops.operators.formula import times_text

By = Literal["parameter", "module"] | Sequence[Sequence[str]]


class _Blocks(BlockDiagonal):
    """Dense blocks of groups of parameters, deferred."""

    def _lay(
        self,
        objective: Objective,
        by: By,
        watch: LinearOperator,
        build: Callable[[list[range]], list[Callable[[], Tensor]]],
        *,
        is_psd: bool,
    ) -> None:
        selection = objective.selection
        refuse_indices(type(self).__name__, selection)
        self.groups = groups_of(selection, by)
        sizes = [sum(selection.sizes[i] for i in group) for group in self.groups]
        self._objective, self._bytes = objective, sum(p * p for p in sizes) * selection.dtype.itemsize
        blocks = [
            Deferred(
                lambda make=make: Dense(make(), is_symmetric=True, is_psd=is_psd), Dense, (p, p), selection.dtype,
                selection.device, label=times_text([p]), watch=watch, is_symmetric=True, is_psd=is_psd,
            )
            for p, make in zip(sizes, build(self.groups), strict=True)
        ]  # fmt: skip
        BlockDiagonal.__init__(self, *blocks, layout=objective.layout)
        self.memory_budget = objective.memory_budget

    def _require_room(self) -> None:
        require(
            self._bytes, self._objective.memory_budget, self.device, f"the blocks of {type(self).__name__}",
            "Take smaller groups (by=…), KFAC, a diagonal, or raise memory_budget.",
        )  # fmt: skip


class _GaussNewtonBlocks(_Blocks):
    @classmethod
    def of(cls, objective: Objective, cotangents: Cotangents, by: By = "parameter") -> Self:
        """The blocks over an objective that is already there."""
        blocks = cls.__new__(cls)
        blocks._begin(objective, cotangents, by)
        return blocks

    def _begin(self, objective: Objective, cotangents: Cotangents, by: By) -> None:
        objective.needed_likelihood()
        self._cotangents = cotangents
        self._lock = threading.Lock()
        self._made: dict[int, Tensor] = {}
        self._lay(objective, by, cotangents.operator(objective), self._makers, is_psd=True)

    def _makers(self, groups: list[range]) -> list[Callable[[], Tensor]]:
        return [lambda number=number: self._block(number) for number in range(len(groups))]

    def _block(self, number: int) -> Tensor:
        """Block `number`; the first to be asked for makes all, and each is handed over once."""
        with self._lock:
            if number not in self._made:
                self._require_room()
                self._made = dict(enumerate(self._all()))
            return self._made.pop(number)

    def release(self) -> None:
        super().release()
        self._made = {}

    def _all(self) -> list[Tensor]:
        sizes = self._objective.selection.sizes
        found = [torch.zeros(p, p, dtype=self.dtype, device=self.device) for p in self.sizes]
        with torch.no_grad():
            for step in LayerPass(self._objective, self._cotangents, together=True):
                for M, group in zip(found, self.groups, strict=True):
                    add_blocks(M, [step.factors[i] for i in group], [sizes[i] for i in group])
        return [symmetrised(M) for M in found]


class BlockGGN(_GaussNewtonBlocks):
    """The diagonal blocks of the GGN (or of a Monte-Carlo Fisher), dense, summed over the data.

    Args:
        model, likelihood, data, options: As for `GGN`; `params` by flat indices is refused.
        by: "parameter", "module" (the parameters that a module itself owns), or groups of names or dotted prefixes,
            each a stretch of consecutive parameters; parameters in no group have a block of their own.
        fisher, num_samples, generator: As for `DiagonalGGN`.

    Cost: as `DiagonalGGN`, and 2·N·p² for a block of p entries without weight sharing, whatever C (2·N·C·p² with it).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        by: By = "parameter",
        fisher: Literal["exact", "mc"] = "exact",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        if fisher == "empirical":
            raise ValueError('BlockGGN(fisher="empirical"): use BlockEF.')
        cotangents = Cotangents.chosen("BlockGGN", fisher, num_samples, generator)
        self._begin(Objective(model, likelihood, data, **options), cotangents, by)


class BlockEF(_GaussNewtonBlocks):
    """The diagonal blocks of the empirical Fisher, dense, summed over the data.

    Args:
        model, likelihood, data, by, options: As for `BlockGGN`.
        datum: As for `EmpiricalFisher`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        *,
        by: By = "parameter",
        datum: Datum = "token",
        **options: Unpack[Options],
    ) -> None:
        cotangents = Cotangents.chosen("BlockEF", "empirical", datum=datum)
        self._begin(Objective(model, likelihood, data, **options), cotangents, by)


class BlockHessian(_Blocks):
    """The diagonal blocks of the Hessian, dense and exact, each computed when it is needed.

    Args:
        model, likelihood, data, by, options: As for `BlockGGN`.

    Cost: p products with the Hessian of the block's own parameters for a block of p entries.
    """

    def __init__(
        self, model: nn.Module, likelihood: Any, data: Any, *, by: By = "parameter", **options: Unpack[Options]
    ) -> None:
        self._begin(Objective(model, likelihood, data, **options), by)

    @classmethod
    def of(cls, objective: Objective, by: By = "parameter") -> Self:
        """The blocks over an objective that is already there."""
        blocks = cls.__new__(cls)
        blocks._begin(objective, by)
        return blocks

    def _begin(self, objective: Objective, by: By) -> None:
        objective.needed_likelihood()
        self._lay(objective, by, Hessian.of(objective), self._makers, is_psd=False)

    def _makers(self, groups: list[range]) -> list[Callable[[], Tensor]]:
        return [lambda group=group: self._block(group) for group in groups]

    def _block(self, group: range) -> Tensor:
        self._require_room()
        part = copy.copy(self._objective)
        part.selection = ParameterSelection(part.model, [self._objective.selection.names[i] for i in group])
        hessian = Hessian.of(part)
        with warnings.catch_warnings():
            # Said of one block it would sound as if it were true of the whole network; the zero block says it.
            warnings.filterwarnings("ignore", "the outputs of .* depend on none", NumericalWarning)
            try:
                return hessian._dense()
            finally:
                hessian.release()


def groups_of(selection: ParameterSelection, by: By) -> list[range]:
    """Consecutive positions of parameters that make one block.

    Raises:
        DataError: Unknown names, or a parameter in two groups.
        UnsupportedError: A group whose parameters do not follow each other in the model.
    """
    names = selection.names
    if by == "parameter":
        return [range(i, i + 1) for i in range(len(names))]
    if by == "module":
        owners = [name.rpartition(".")[0] for name in names]
        starts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(names)], strict=True)]
    if isinstance(by, str) or not isinstance(by, Iterable):
        raise DataError(f'by={by!r}: expected "parameter", "module", or lists of parameter names.')
    groups = [_positions(names, wanted) for wanted in by]
    taken = [i for group in groups for i in group]
    if len(set(taken)) != len(taken):
        raise DataError("by: a parameter is in two groups; expected each in one.")
    groups += [range(i, i + 1) for i in range(len(names)) if i not in taken]
    return sorted(groups, key=lambda group: group.start)


def _positions(names: tuple[str, ...], wanted: Sequence[str]) -> range:
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise DataError(f"by: {wanted!r} stands where a group is expected; write a list of names, by=[[{wanted!r}]].")
    found: set[int] = set()
    for entry in wanted:
        below = [i for i, name in enumerate(names) if name == entry or name.startswith(f"{entry}.")]
        if not below:
            raise DataError(f"by: no selected parameter is named {entry!r} or lies below it; there are {list(names)}.")
        found.update(below)
    if not found:
        raise DataError("by: a group is empty.")
    group = range(min(found), max(found) + 1)
    if len(group) != len(found):
        between = [names[i] for i in group if i not in found]
        raise UnsupportedError(
            f"by: the group {list(wanted)} is not a stretch of consecutive parameters; {between} lie between. Take "
            "them in, or split the group."
        )
    return group
