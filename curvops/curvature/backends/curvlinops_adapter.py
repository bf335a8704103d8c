"""curvlinops: its linear operators as ours, and its KFAC as blocks; every quirk of it, of every version, in here.

What it gets wrong in silence, and what happens here instead (checked on 3.0.1):

* Its constructor's check costs 6 to 9 gradients: off. Operators are built at the first product, on a copy of the model.
* Its Hessian errs where layer or instance normalisation is differentiated twice; other products fail, or depart from
  autograd, where forward mode does (padding rows of embeddings). So the first product of an operator is compared with
  double backward, once; where they differ curvops' own products answer, `repr` says so, and a warning unless expected.
* Its Monte-Carlo and empirical Fishers are GGNs of a pseudo-loss. That loss is formed here from our likelihoods, so
  that class weights, ignored targets and label smoothing count, and the draws are those of `co.MCFisher`.
* Its KFAC ignores class weights, and propagates the positions of a sequence together, cross terms and all: what is
  propagated here comes from our likelihoods, position by position. What it would lose or confuse
  (layers but Linear and Conv2d, groups, padding modes, tied or twice-used parameters, ignored targets) is refused by
  name.
* An exhausted generator as data gives zeros: refused by `from_curvlinops`, whose operators also have the right dtype.
* Its next release takes `params` as a dict and moves the factors: the first is detected, the second refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.backends.foreign import ForeignProduct, Multiply, named_version, plain, quiet
from curvops.curvature.backends.layers import Owner, blocks_label, owners, refuse_ignored_targets, require_only_uses
from curvops.curvature.backends.sandbox import Outputs
from curvops.curvature.matrixfree.cotangents import Cotangents
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.objective import Objective
from curvops.errors import CurvopsError, DataError, UnsupportedError, UnsupportedLayerError
from curvops.nets.batches import Batch
from curvops.operators.base import LinearOperator
from curvops.operators.closure import Closure
from curvops.operators.dense import Dense
from curvops.operators.formula import Formula
from curvops.operators.kronecker import Kronecker

_HESSIAN_ERRS = (nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_HESSIAN_FAILS = (nn.GroupNorm, nn.SiLU)


@lru_cache(maxsize=1)
def library() -> Any:
    """The package; imported at first need, since that takes as long as importing torch."""
    with quiet():
        return importlib.import_module("curvlinops")


def provenance() -> str:
    """`curvlinops 3.0.1`, without importing it."""
    return named_version("curvlinops", "curvlinops-for-pytorch")


# -------------------------------------------------------------------- products


class CurvlinopsProduct(ForeignProduct):
    """One of our curvatures over one batch, whose products curvlinops computes."""

    def _library(self) -> str:
        return provenance()

    def _known_trouble(self) -> str | None:
        for module in self.objective.network.module.modules():
            kind = type(module).__name__
            if self._native_type is Hessian and isinstance(module, _HESSIAN_ERRS):
                return f"{provenance()} errs where {kind} is differentiated twice"
            if self._native_type is Hessian and isinstance(module, _HESSIAN_FAILS):
                return f"{provenance()} has no forward mode through the backward of {kind}"
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return f"{provenance()} lets the padding row of {kind} count"
        return None

    def _connect(self, outputs: Outputs, batch: Batch, f: Tensor) -> Multiply:
        kind = library().HessianLinearOperator if self._native_type is Hessian else library().GGNLinearOperator
        params: Any = outputs.selected
        if "dict" in str(inspect.signature(kind.__init__).parameters["params"].annotation).lower():
            names = {id(p): name for name, p in outputs.named_parameters()}
            params = {names[id(p)]: p for p in outputs.selected}
        theirs = kind(
            outputs, self._loss(batch, f), params, [(plain(batch.x), batch.y)],
            check_deterministic=False, num_data=len(batch.y), batch_size_fn=lambda _: len(batch.y),
        )  # fmt: skip
        return lambda V: theirs @ V


def from_curvlinops(operator: Any, *, is_psd: bool | None = None, lower_bound: float | None = None) -> Closure:
    """A curvlinops linear operator as one of ours, of its own dtype and device.

    Args:
        operator: A `curvlinops` `PyTorchLinearOperator` (GGN, Hessian, KFAC, Jacobian, sums and inverses of them, …).
        is_psd: Whether it is positive semidefinite; None to go by its class (the Fishers and KFAC are).
        lower_bound: A proven lower bound on the spectrum.

    Raises:
        DataError: Its data are an iterator, which would be exhausted by the first product and give zeros then.
        UnsupportedError: Not such an operator, or one that does not say its dtype and device.

    Example:
        >>> import torch, curvlinops, curvops as co
        >>> model, loss = torch.nn.Linear(2, 1), torch.nn.MSELoss(reduction="sum")
        >>> data = [(torch.ones(3, 2), torch.zeros(3, 1))]
        >>> H = curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), data)
        >>> co.from_curvlinops(H)
        HessianLinearOperator(3) [by curvlinops 3.0.1]
    """
    names = {kind.__name__ for kind in type(operator).__mro__}
    if "PyTorchLinearOperator" not in names:
        raise UnsupportedError(
            f"from_curvlinops got {type(operator).__name__}; expected a curvlinops operator. For SciPy's there is "
            "Closure.from_scipy, for a function Closure."
        )
    if any(isinstance(part, Iterator) for part in _data_within(operator)):
        raise DataError(
            "the curvlinops operator reads an iterator, which its first product exhausts; later ones would be zero. "
            "Build it on a list or a DataLoader: data = list(…)."
        )
    try:
        dtype, device = operator.dtype, operator.device
    except NotImplementedError as error:
        raise UnsupportedError(f"{type(operator).__name__} does not say its dtype and device.") from error
    if is_psd is None:
        is_psd = bool(names & {"EFLinearOperator", "FisherMCLinearOperator", "KFACLinearOperator"})

    def product(V: Tensor) -> Tensor:
        return (operator @ V.contiguous()).detach()

    def adjoint(V: Tensor) -> Tensor:
        return (operator.adjoint() @ V.contiguous()).detach()

    return _Foreign(
        product, tuple(operator.shape), dtype=dtype, device=device, rmatvec=adjoint, batched=True,
        is_symmetric=bool(operator.SELF_ADJOINT), is_psd=is_psd, lower_bound=lower_bound, name=type(operator).__name__,
    )  # fmt: skip


class _Foreign(Closure):
    def _formula(self) -> Formula:
        node = super()._formula()
        return Formula(node.kind, node.text, notes=(f"by {provenance()}",))


def _data_within(operator: Any) -> Iterator[Any]:
    """Data of the operator and of those that it is made of."""
    yield getattr(operator, "_data", None)
    for part in vars(operator).values():
        if any(kind.__name__ == "PyTorchLinearOperator" for kind in type(part).__mro__):
            yield from _data_within(part)


# -------------------------------------------------------------------- Kronecker factors


class KroneckerFactors:
    """KFAC of one batch by curvlinops, as blocks in the order of the parameters.

    Args:
        objective: The negative log-likelihood of one batch.
        cotangents: What is propagated backward.
        approx: "expand" or "reduce", for layers that see a datum at several positions (Eschenhagen et al. 2023).
        total: N, the number of data in all.
        scale: Factor on B.

    Raises:
        UnsupportedLayerError: A layer that curvlinops loses or gets wrong; named.
    """

    def __init__(self, objective: Objective, cotangents: Cotangents, approx: str, total: int, scale: float) -> None:
        self.objective, self.cotangents, self.approx = objective, cotangents, approx
        self.total, self.scale = total, scale
        if not hasattr(library().KFACLinearOperator, "compute_kronecker_factors"):
            raise UnsupportedError(
                f"the factors of {provenance()} are not where they were in 3.0.1; install "
                f"curvlinops-for-pytorch==3.0.1, or use {_NATIVE_KRON}"
            )
        self.owners = owners(
            objective.model, objective.selection, (nn.Linear, nn.Conv2d), provenance(), f"use {_NATIVE_KRON}"
        )
        refuse_ignored_targets(objective, provenance(), f"use {_NATIVE_KRON}")
        for owner in self.owners:
            _refuse_convolution(owner, objective.network.module.get_submodule(owner.path), approx)

    def blocks(self) -> list[LinearOperator]:
        """`B ⊗ A` for weights, `B` for biases. Cost: four forwards and R + 1 backward passes (T·R of sequences)."""
        objective = self.objective
        objective.watch.check()
        outputs = Outputs(objective.model, objective.selection)
        ((batch, _),) = objective.evaluate()
        x = plain(batch.x)
        require_only_uses(outputs, x, self.owners, provenance(), f"use {_NATIVE_KRON}")
        kfac = _kfac_class()(
            outputs, nn.MSELoss(reduction="sum"), outputs.selected, [(x, batch.y)],
            check_deterministic=False, fisher_type="empirical", kfac_approx=self.approx, num_data=len(batch.y),
            num_per_example_loss_terms=1, separate_weight_and_bias=True, batch_size_fn=lambda _: len(batch.y),
        )  # fmt: skip
        kfac.backward = lambda f, y: self._backward(f, batch, outputs)
        try:
            with outputs.network.differentiable(), quiet():
                kfac.compute_kronecker_factors()
        except (ValueError, NotImplementedError) as error:
            if isinstance(error, CurvopsError):
                raise
            raise UnsupportedLayerError(f"{provenance()} refuses this model: {error}; use {_NATIVE_KRON}") from error
        return [
            self._block(owner, shape, kfac)
            for owner, shape in zip(self.owners, objective.selection.shapes, strict=True)
        ]

    def _backward(self, f: Tensor, batch: Batch, outputs: Outputs) -> None:
        """Propagate the columns of Λ's root (or draws, or residuals), those of a sequence's positions one by one.

        curvlinops propagates all positions at once, whose cross terms then stay wherever positions meet.
        """
        likelihood = self.objective.likelihood
        assert likelihood is not None
        with torch.no_grad():
            columns = self.cotangents.of(likelihood, f.detach(), batch)
        for number, column in enumerate(columns.chunks(1)):
            last = number == columns.count - 1
            u = column[..., 0].contiguous()
            torch.autograd.grad(f, outputs.selected, u, retain_graph=not last, allow_unused=True)

    def _block(self, owner: Owner, shape: torch.Size, kfac: Any) -> LinearOperator:
        selection = self.objective.selection
        path = f"module.{owner.path}".rstrip(".")
        zero = torch.zeros(shape[0], shape[0], dtype=selection.dtype, device=selection.device)
        # A layer that the output does not depend on has no factors, and no curvature.
        B = kfac._gradient_covariances.get(path)
        B = Dense(zero if B is None else _symmetric(B) * self.scale, is_psd=True)
        if owner.role == "bias":
            return B
        A = kfac._input_covariances.get(path)
        A = zero.new_zeros(shape[1:].numel(), shape[1:].numel()) if A is None else _symmetric(A)
        return Kronecker(B, Dense(A * (self.objective.num_data or 0) / self.total, is_psd=True))

    def label(self) -> str:
        """The blocks in one line, from shapes alone."""
        return blocks_label(self.owners, self.objective.selection.shapes)


_NATIVE_KRON = "kron() of GGNInterface or EFInterface, or co.KFAC"


@lru_cache(maxsize=1)
def _kfac_class() -> Any:
    """Their KFAC with our backward passes in place of its own."""

    class Kfac(library().KFACLinearOperator):  # type: ignore[misc]
        backward: Callable[[Tensor, Tensor], None]

        def _rearrange_for_larger_than_2d_output(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return output, y

        def _compute_loss_and_backward(self, output: Tensor, y: Tensor) -> None:
            self.backward(output, y)

    return Kfac


def _refuse_convolution(owner: Owner, layer: nn.Module, approx: str) -> None:
    if not isinstance(layer, nn.Conv2d):
        return
    complaint = None
    if layer.groups > 1:
        complaint = f"has groups={layer.groups}, which it averages over"
    elif layer.padding_mode != "zeros":
        complaint = f"has padding_mode={layer.padding_mode!r}, which it takes for zeros"
    elif layer.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    ):
        complaint = 'has padding="same" with more on one side than on the other, which it does not unfold'
    if complaint is not None:
        raise UnsupportedLayerError(
            f"convolution {owner.path!r} {complaint} ({provenance()}); use {_NATIVE_KRON}, or full() and diag()"
        )


def _symmetric(M: Tensor) -> Tensor:
    M = M.detach()
    return (M + M.T) / 2
