"""Rectangular operators between parameters and outputs: the Jacobian, and the factor B of a curvature `BᵀB`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from curvops.curvature.matrixfree.base import Cache
from curvops.curvature.matrixfree.forms import Form, IdentityForm
from curvops.curvature.matrixfree.ggn import GaussNewton
from curvops.curvature.objective import Objective, Options
from curvops.nets.batches import Batch
from curvops.nets.jacobians import example_rows
from curvops.operators.autograd import linear_map
from curvops.operators.base import LinearOperator
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

    Shares the curvature's kept linearisations. Its number of rows is known once C is: from `model.output_size`, or by
    one forward of the first batch at the first look at `shape`.
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
        rows = []
        for _, piece in self.curvature._pieces():
            parts = [
                piece.form.pull(piece.linearisation.jvp(V[:, start:stop]))
                for start, stop in self.curvature._chunks(piece, V.shape[1])
            ]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def _push(self, U: Tensor) -> Tensor:
        total = U.new_zeros(self.curvature.shape[0], U.shape[1])
        offset = 0
        for _, piece in self.curvature._pieces():
            rows = rows_of(self.curvature, piece.outputs)
            for start, stop in self.curvature._chunks(piece, U.shape[1]):
                block = U[offset : offset + rows, start:stop]
                total[:, start:stop] += piece.linearisation.vjp(piece.form.push(block))
            offset += rows
        return total

    def _dense(self) -> Tensor:
        rows, size = self.shape
        if rows >= size:
            return super()._dense()
        eye = torch.eye(rows, dtype=self.dtype, device=self.device)
        return self._rapply(eye).T

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
        return type(self)(curvature)

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

    def __init__(
        self, model: nn.Module | GaussNewton, data: Any = None, *, cache: Cache = "auto", **options: Unpack[Options]
    ) -> None:
        if not isinstance(model, GaussNewton):
            model = UnweightedGGN.of(Objective(model, None, data, **options), cache=cache)
        super().__init__(model)

    @property
    def outputs(self) -> Tensor:
        """f of all data, `(N, C)` or `(N, T, C)`, detached; one pass of forwards unless kept."""
        return torch.cat([piece.outputs for _, piece in self.curvature._pieces()])

    def row_blocks(self) -> Iterator[Tensor]:
        """The rows datum by datum in chunks `(b, C, P)` that fit into an eighth of the memory budget (T·C rows for sequences)."""
        objective = self.curvature.objective
        for batch in objective.batches():
            for _, rows, f in example_rows(
                objective.network, objective.selection, batch.x, byte_budget=objective.budget() // 8
            ):
                yield rows
                del f

    def _formula(self) -> Formula:
        return Formula("leaf", f"Jacobian({', '.join(self.curvature._facts())})")


def rows_of(curvature: GaussNewton, f: Tensor) -> int:
    """Rows of function space of a batch with outputs f."""
    return f.shape[0] * curvature._rows(tuple(f.shape[1:]))


def known_function_space_size(curvature: GaussNewton) -> int | None:
    """n as far as it is known without a forward."""
    objective = curvature.objective
    if "function_space_size" in curvature._cache:
        return curvature._cache["function_space_size"]
    # `output_size` says nothing of sequences; only a batch's own targets do, and a loader's are not read for it.
    if objective.num_data is None or objective.num_outputs is None or not objective.is_flat:
        return None
    return objective.num_data * curvature._rows((objective.num_outputs,))


def function_space_size(curvature: GaussNewton) -> int:
    """n, by one pass of forwards where it is not known."""
    known = known_function_space_size(curvature)
    if known is None:
        known = sum(rows_of(curvature, f) for _, f in curvature.objective.evaluate())
        curvature._cache["function_space_size"] = known
    return known
