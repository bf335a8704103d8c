"""What every backend shares: products that another library computes, under watch, and results that it computes once."""

from __future__ import annotations

import importlib.metadata
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.matrixfree.base import DataOperator
from curvops.curvature.matrixfree.forms import RootForm
from curvops.curvature.matrixfree.ggn import GGN
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.errors import CurvopsError, NumericalWarning, UnsupportedError
from curvops.linalg.probes import rademacher
from curvops.memory import columns_within
from curvops.nets.batches import Batch
from curvops.operators.base import LinearOperator
from curvops.operators.deferred import Deferred
from curvops.operators.formula import Formula, size_text

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative difference between two right ways to compute one product."""

Multiply = Callable[[Tensor], Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """Deprecations and missing batching rules beneath another library are none of the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def named_version(name: str, distribution: str) -> str:
    """`curvlinops 3.0.1`, without importing it."""
    return f"{name} {importlib.metadata.version(distribution)}"


# -------------------------------------------------------------------- products


class ForeignProduct(DataOperator):
    """One of our curvatures over one batch, whose products another library computes on a copy of the model.

    The first product is compared with double backward, once (about three gradients). Where the library fails or
    departs, curvops' own products answer, `repr` says so, and a warning unless it was expected. Holds the native
    operator as well: it is the reference, and answers what is asked of the curvature in function space.

    A subclass names its library, says where not even to try it, and connects a copy of the model with it.
    """

    @abstractmethod
    def _library(self) -> str:
        """Name and version."""

    def _known_trouble(self) -> str | None:
        """Why the library is not even tried, from the layers' names; None if it is."""
        return None

    @abstractmethod
    def _connect(self, outputs: Outputs, batch: Batch, f: Tensor) -> Multiply:
        """The library's product with columns `(Q, k)` over all entries of the selected parameters.

        Args:
            outputs: The copy of the model; its graphs may be kept until the product is dropped.
            batch: The batch, checked.
            f: Its outputs, detached.
        """

    def _begin(self, objective: Objective, *, native: type[DataOperator], own: Mapping[str, Any] | None = None) -> None:
        self._native_type, self._native_own = native, dict(own or {})
        self.native: Any = native.of(objective, **self._native_own)
        super()._begin(objective, is_psd=self.native.is_psd)
        self._theirs: Multiply | None = None
        self._outputs: Outputs | None = None
        self._column_bytes = 0
        self._why_native = self._known_trouble()

    def _own(self) -> dict[str, Any]:
        return {"native": self._native_type, "own": self._native_own}

    def _product(self, V: Tensor) -> Tensor:
        self.objective.watch.check()
        if self._why_native is None and self._theirs is None:
            self._meet()
        if self._why_native is not None:
            return self.native._product(V)
        return self._multiplied(V)

    def _meet(self) -> None:
        """Build their product, and compare its first with ours."""
        probe = rademacher(self.shape[1], 0, 1, seed=0, dtype=self.dtype, device=self.device)
        try:
            ours = self.native._product(probe)
            self._column_bytes = sum(piece.graph_bytes for _, piece in self.native._pieces())
            self._outputs = Outputs(self.objective.model, self.objective.selection)
            ((batch, f),) = self.objective.evaluate()
            try:
                with self._outputs.network.differentiable(), quiet():
                    self._theirs = self._connect(self._outputs, batch, f)
                theirs = self._multiplied(probe)
            except CurvopsError:
                raise
            except Exception as error:  # Whatever its transforms trip over: double backward has just shown the way.
                self._leave(f"fails on this model ({first_line(error)})")
                return
            difference = float((theirs - ours).norm()) / max(float(ours.norm()), torch.finfo(self.dtype).tiny)
            if not difference <= TOLERANCES[self.dtype]:
                self._leave(f"departs from double backward by {difference:.1e}")
        finally:
            if self._why_native is None:
                self.native.release()

    def _leave(self, why: str) -> None:
        self._why_native, self._theirs, self._outputs = f"{self._library()} {why}", None, None
        warnings.warn(
            f"{self._why_native}; the products of this operator are curvops' own.", NumericalWarning, stacklevel=2
        )

    def _loss(self, batch: Batch, f: Tensor) -> nn.Module:
        """Whose Hessian in the outputs is Λ."""
        if self._native_type in (GGN, Hessian):
            return NegativeLogLikelihood(self.objective)
        with torch.no_grad():
            return HalfSquare(self.native._form(batch, f))

    def _multiplied(self, V: Tensor) -> Tensor:
        assert self._outputs is not None
        assert self._theirs is not None
        selection = self.objective.selection
        full = selection.scatter(V)
        per_column = max(4 * self._column_bytes, 4 * selection.full_size * self.dtype.itemsize)
        step = columns_within(self.objective.budget() // 4, self.device, per_column, max(V.shape[1], 1))
        with self._outputs.network.differentiable(), quiet():
            parts = [self._theirs(plain(part).contiguous()) for part in full.split(step, 1)]
        return selection.gather(torch.cat(parts, 1).detach())

    def _gram(self) -> LinearOperator | None:
        return self.native._gram()

    def _factor(self) -> LinearOperator | None:
        return self.native._factor()

    def release(self) -> None:
        super().release()
        self.native.release()
        self._theirs, self._outputs = None, None

    def _explain_product(self) -> str:
        return self.native._explain_product() if self._why_native else f"one product by {self._library()}"

    def _formula(self) -> Formula:
        note = f"by curvops: {self._why_native}" if self._why_native else f"by {self._library()}"
        return Formula("leaf", self.native._formula().text, notes=(note,))


class NegativeLogLikelihood(nn.Module):
    """−log p(y | f) as a loss module, as other libraries ask for one."""

    reduction = "sum"

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.likelihood = objective.needed_likelihood()

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.loss(f, y)


class HalfSquare(nn.Module):
    """½ ‖Sᵀ f‖², whose GGN is `Σ Jᵀ S Sᵀ J`."""

    reduction = "sum"

    def __init__(self, form: RootForm) -> None:
        super().__init__()
        self.form = form

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.form.pull(f.unsqueeze(-1)).square().sum()


def plain(x: Any) -> Any:
    """Inputs that autograd may save, and that no graph hangs on."""
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x.detach()
    return {key: plain(value) for key, value in x.items()} if isinstance(x, Mapping) else x


# -------------------------------------------------------------------- results


def deferred(
    objective: Objective,
    watch: LinearOperator,
    build: Callable[[], LinearOperator],
    kind: type[LinearOperator],
    *,
    library: str,
    label: str | None = None,
    is_psd: bool = True,
) -> Deferred:
    """A structured curvature that a library computes at first need; `repr` says which.

    Args:
        objective: What it is the curvature of.
        watch: Its matrix-free operator, by which changes of the network are found out.
        build: Computes it, and returns an instance of `kind`.
        kind, label, is_psd: As for `Deferred`.
        library: Name and version.
    """
    label = size_text([watch.shape[0]]) if label is None else label
    return Deferred(
        build, kind, watch.shape, watch.dtype, watch.device, label=label,
        note=f"by {library}", watch=watch, is_symmetric=True, is_psd=is_psd, layout=objective.layout,
        memory_budget=objective.memory_budget,
    )  # fmt: skip


def require_entries(found: int, expected: int, what: str, library: str, way_out: str) -> None:
    """Refuse a result that has not exactly one entry per selected parameter entry.

    Raises:
        UnsupportedError: It has more or fewer.
    """
    if found != expected:
        raise UnsupportedError(
            f"{library} returned {found:,} entries for {what} of P={expected:,} parameters; {way_out}"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
