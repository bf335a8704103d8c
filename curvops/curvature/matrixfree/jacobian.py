"""Rectangular operators between parameters and outputs: the Jacobian, and the factor B of a curvature `BᵀB`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from curvops.curvature.matrixfree.base import Cache, by_columns
from curvops.curvature.matrixfree.forms import Form, IdentityForm
from curvops.curvature.matrixfree.ggn import GaussNewton, LinearPiece
from curvops.curvature.objective import Objective, Options
from curvops.errors import ShapeError
from curvops.nets.batches import Batch
from curvops.nets.jacobians import example_rows
from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator, verb
from curvops.operators.formula import Formula


class UnweightedGGN(GaussNewton):
    """`JᵀJ` without a likelihood: what the Jacobian and the unweighted Gram matrix are factors of."""

    def _begin(self, objective: Objective, **facts: Any) -> None:
        super()._begin(objective, cache=facts.get("cache", "auto"), is_psd=True)

    def _form(self, batch: Batch, f: Tensor) -> Form:
        return IdentityForm(f)

    def _rows(self, outputs: tuple[int, ...]) -> int:
        return torch.Size(outputs).numel()


class Factor(LinearOperator):
    """B `(n, P)` of a curvature `A = BᵀB = Σ Jᵀ Λ J`: `B = SᵀJ` with Λ = S Sᵀ, rows in the order of the data.

    Shares the curvature's kept linearisations. How many rows it has, the first forward tells: at the first look at
    `shape`, unless a pass was made before. What no row needs (`repr`, `.T`, `explain`) does not ask.
    """

    def __init__(self, curvature: GaussNewton) -> None:
        super().__init__(
            (0, curvature.shape[0]), curvature.dtype, curvature.device, memory_budget=curvature.memory_budget
        )
        self.curvature = curvature

    @property
    def shape(self) -> tuple[int, int]:
        return (function_space_size(self.curvature), self.curvature.shape[0])

    def _known_shape(self) -> tuple[int | None, int | None]:
        return (known_function_space_size(self.curvature), self.curvature.shape[0])

    def _matmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._pull, self._push)

    def _rmatmat(self, V: Tensor) -> Tensor:
        return linear_map(V, self._push, self._pull)

    def _pull(self, V: Tensor) -> Tensor:
        result = V.new_empty(self.shape[0], V.shape[1])
        for batch, piece, rows in self._blocks():
            for start, stop in self.curvature._chunks(batch, piece, V.shape[1]):
                result[rows, start:stop] = piece.form.pull(piece.linearisation.jvp(V[:, start:stop]))
        return result

    def _push(self, U: Tensor) -> Tensor:
        total = U.new_zeros(self.curvature.shape[0], U.shape[1])
        for batch, piece, rows in self._blocks():
            for start, stop in self.curvature._chunks(batch, piece, U.shape[1]):
                total[:, start:stop] += piece.linearisation.vjp(piece.form.push(U[rows, start:stop]))
        return total

    def _blocks(self) -> Iterator[tuple[Batch, LinearPiece, slice]]:
        """Every batch with its piece and its rows."""
        expected, end = self.shape[0], 0
        for batch, piece in self.curvature._pieces():
            start, end = end, end + rows_of(self.curvature, piece.outputs.shape)
            if end <= expected:
                yield batch, piece, slice(start, end)
        if end != expected:
            raise ShapeError(
                f"the batches of {self!r} gave {end:,} rows, the first of them promised {expected:,}; expected outputs "
                "(B, C) with the same C in every batch."
            )

    def _dense(self) -> Tensor:
        rows, size = self.shape
        if rows >= size:
            return by_columns(self._apply, size, 1024, self.dtype, self.device)
        return by_columns(self._rapply, rows, 1024, self.dtype, self.device).T

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.curvature,)

    @property
    def layout(self) -> None:
        return None

    def _holds_tensors(self) -> bool:
        return False

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        curvature = self.curvature._to(dtype, device)
        assert isinstance(curvature, GaussNewton)
        twin = type(self).__new__(type(self))
        Factor.__init__(twin, curvature)
        return twin

    def _formula(self) -> Formula:
        return Formula("leaf", f"Factor({', '.join(self.curvature._facts())})")


class Jacobian(Factor):
    """J `(N·C, P)` of the outputs in the parameters (`(N·T·C, P)` for sequences), rows in the order of the data.

    Args:
        model: The network.
        data: As for `GGN`; targets are not looked at.
        cache, options: As for `GGN`.

    `J @ v` is a forward derivative, `J.T @ u` a backward one; `J.outputs` are the outputs themselves.
    """

    def __init__(self, model: nn.Module, data: Any, *, cache: Cache = "auto", **options: Unpack[Options]) -> None:
        super().__init__(UnweightedGGN.of(Objective(model, None, data, **options), cache=cache))

    @classmethod
    def of(cls, objective: Objective, *, cache: Cache = "auto") -> Self:
        """The Jacobian over an objective that is already there."""
        J = cls.__new__(cls)
        Factor.__init__(J, UnweightedGGN.of(objective, cache=cache))
        return J

    @property
    @verb
    def outputs(self) -> Tensor:
        """f of all data, `(N, C)` or `(N, T, C)`, detached; one pass of forwards unless kept."""
        if self.curvature.keeps:
            return torch.cat([piece.outputs for _, piece in self.curvature._pieces()])
        return torch.cat([f for _, f in self.curvature.objective.evaluate()])

    def row_blocks(self) -> Iterator[Tensor]:
        """The rows datum by datum, in chunks `(b, C, P)` (`(b, T·C, P)`) of at most an eighth of the memory budget."""
        objective = self.curvature.objective
        objective.refresh()
        for batch in objective.batches():
            outputs = []
            for _, rows, f in example_rows(
                objective.network, objective.selection, batch.x, byte_budget=objective.budget() // 8
            ):
                outputs.append(f)
                yield rows
            objective.observe(batch, torch.cat(outputs))

    def _formula(self) -> Formula:
        return Formula("leaf", f"Jacobian({', '.join(self.curvature._facts())})")


def rows_of(curvature: GaussNewton, outputs: tuple[int, ...]) -> int:
    """Rows of function space of a batch with outputs of that shape."""
    return outputs[0] * curvature._rows(tuple(outputs[1:]))


def known_function_space_size(curvature: GaussNewton) -> int | None:
    """n as far as it is known without a forward."""
    shapes = curvature.objective.record.shapes
    if shapes is not None:
        return sum(rows_of(curvature, shape) for shape in shapes)
    return curvature.function_space_size


def function_space_size(curvature: GaussNewton) -> int:
    """n; where it is not known yet by one forward of the first batch, or of all where that does not tell."""
    known = known_function_space_size(curvature)
    if known is None:
        known = curvature.function_space_size = _counted(curvature)
    return known


def _counted(curvature: GaussNewton) -> int:
    objective, total = curvature.objective, 0
    for _, f in objective.evaluate():
        # C is the network's, so that one batch tells it; T may be another one in each batch.
        if f.dim() == 2 and objective.num_data is not None:
            return rows_of(curvature, (objective.num_data, *f.shape[1:]))
        total += rows_of(curvature, f.shape)
    return total
