"""The classes to pass as `backend=` to `laplace.Laplace`: its own interfaces, answered by ours.

What laplace-torch 0.3 asks of a backend, and how it is met here:

    isinstance and issubclass    a GGN is a `laplace.curvature.GGNInterface`, an EF an `EFInterface` (`SubnetLaplace`
                                 takes nothing else), a Hessian a `CurvatureInterface`; none is its `BackPackInterface`
                                 or `AsdlInterface`, whose restrictions (no frozen parameters, Jacobians by torch.func)
                                 are those of code that does not run here
    `__name__`                   "backpack" in it: mappings are refused; "asdl": predictions ask `functorch_jacobians`,
                                 with a warning. Both answer the same numbers here
    `==`                         `FunctionalLaplace` takes three classes, by `in`: a GGN here answers that it equals
                                 one of them. With its `CurvlinopsEF` (mappings are refused for a diagonal): never
    `(model, likelihood, …)`     keywords `dict_key_x`, `dict_key_y`, `last_layer`, and those of `backend_kwargs`
    `.subnetwork_indices`        written after construction
    `full kron diag`             `(loss, Tensor | Kron)`, the curvature of the loss, times `factor`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from curvops import curvature
from curvops.curvature.interface import CurvatureInterface
from curvops.curvature.structured.diagonal import DiagonalHessian
from curvops.curvature.subject import Inputs
from curvops.errors import NumericalWarning
from curvops.interop.laplace import library
from curvops.interop.laplace.kron import fitting_kron
from curvops.nets.likelihoods import resolve
from curvops.operators.base import LinearOperator


class _StandsIn(type):
    """Of classes that `==` takes for the one of laplace-torch that they stand in for.

    `FunctionalLaplace` asserts that its backend is in a list of three classes. Sets and dictionaries, which go by the
    hash first, keep all classes apart.
    """

    stands_in_for: type | None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and other is cls.stands_in_for)

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class LaplaceBackend(library.CurvatureInterface, metaclass=_StandsIn):
    """A backend of laplace-torch whose curvatures one of our interface classes computes; see `backend`.

    Args:
        model, likelihood: As laplace-torch passes them.
        arguments, options: Those of the interface class (`last_layer`, `subnetwork_indices`, `dict_key_x`,
            `dict_key_y`, `stochastic`, `num_samples`, `generator`), which `Laplace(…, backend_kwargs={…})` passes on.
        lossfunc: A torch loss with `reduction="sum"`, or a `curvops.likelihoods.Likelihood`, in place of the
            likelihood's plain one: class weights, ignored targets, label smoothing.

    Attributes:
        curvops: The interface itself, whose results are lazy operators: `la.backend.curvops.full(x, y)`.
    """

    interface: ClassVar[type[CurvatureInterface]]
    stands_in_for: ClassVar[type | None] = None

    def __init__(
        self, model: nn.Module, likelihood: Any, *arguments: Any, lossfunc: Any = None, **options: Any
    ) -> None:
        # The base class' constructor is left out: what it would set is read from the interface.
        self.curvops = self.interface(model, likelihood if lossfunc is None else lossfunc, *arguments, **options)
        self.likelihood = likelihood

    # ---------------------------------------------------------------- what laplace-torch reads

    @property
    def model(self) -> nn.Module:
        """The network, or laplace-torch's `FeatureExtractor` around it."""
        return self.curvops.model

    @property
    def last_layer(self) -> bool:
        """Whether only the last layer counts."""
        return self.curvops.last_layer

    @property
    def subnetwork_indices(self) -> Tensor | None:
        """Entries of the flat parameter vector that count; laplace-torch sets them."""
        return self.curvops.subnetwork_indices

    @subnetwork_indices.setter
    def subnetwork_indices(self, indices: Tensor | None) -> None:
        self.curvops.subnetwork_indices = indices

    @property
    def dict_key_x(self) -> str:
        """Key of the inputs in a mapping."""
        return self.curvops.dict_key_x

    @property
    def dict_key_y(self) -> str:
        """Key of the targets in a mapping."""
        return self.curvops.dict_key_y

    @property
    def lossfunc(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The torch loss, summed; may be set, as the keyword of the constructor."""
        return self.curvops.lossfunc

    @lossfunc.setter
    def lossfunc(self, loss: Any) -> None:
        self.curvops._likelihood = resolve(loss)

    @property
    def factor(self) -> float:
        """Between `lossfunc` and −log p."""
        return self.curvops.factor

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that count."""
        return self.curvops.params

    @property
    def params_dict(self) -> dict[str, nn.Parameter]:
        """Their names in the model → the parameters."""
        return self.curvops.params_dict

    @property
    def buffers_dict(self) -> dict[str, Tensor]:
        """Names → buffers of the model."""
        return self.curvops.buffers_dict

    # ---------------------------------------------------------------- Jacobians and gradients

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """As our interface's."""
        return self.curvops.jacobians(x, enable_backprop)

    def functorch_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """As our interface's: the native ones."""
        return self.curvops.functorch_jacobians(x, enable_backprop)

    def last_layer_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """As our interface's."""
        return self.curvops.last_layer_jacobians(x, enable_backprop)

    def selected_output_jacobians(
        self, x: Inputs, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As our interface's."""
        return self.curvops.selected_output_jacobians(x, outputs, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """As our interface's: of the unscaled `lossfunc`."""
        return self.curvops.gradients(x, y)

    # ---------------------------------------------------------------- curvatures

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss, and the matrix `(P, P)` of our `full`."""
        loss, operator = self.curvops.full(x, y, **kwargs)
        return loss, operator.to_dense()

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss, and the entries `(P,)` of our `diag`; a warning where they are estimates."""
        loss, operator = self.curvops.diag(x, y, **kwargs)
        entries = operator.diagonal()
        _warn_of_estimates(operator)
        return loss, entries

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Loss, and the factors of our `kron` as a `Kron`: `[B, A]` for a weight, `[B]` for a bias.

        Raises:
            UnsupportedError: A parameter has no such factors.
        """
        loss, operator = self.curvops.kron(x, y, N, **kwargs)
        return loss, fitting_kron(operator, self.curvops.params_dict, self.factor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.curvops!r})"


class _GGNBackend(LaplaceBackend, library.GGNInterface):
    curvops: Any
    stands_in_for = library.baselaplace.CurvlinopsGGN

    @property
    def stochastic(self) -> bool:
        """Whether targets are sampled."""
        return self.curvops.stochastic

    @property
    def num_samples(self) -> int:
        """Draws per datum."""
        return self.curvops.num_samples

    def _get_mc_functional_fisher(self, f: Tensor) -> Tensor:
        return self.curvops._get_mc_functional_fisher(f)

    def _get_functional_hessian(self, f: Tensor) -> Tensor | None:
        return self.curvops._get_functional_hessian(f)


class _EFBackend(LaplaceBackend, library.EFInterface):
    pass


def backend(interface: type[CurvatureInterface], name: str | None = None) -> type[LaplaceBackend]:
    """A class to pass as `backend=` to `laplace.Laplace`, for any interface class of ours, the user's own included.

    Args:
        interface: Subclass of `curvops.CurvatureInterface`.
        name: `__name__` of the class; that of the interface by default.
    """
    if issubclass(interface, curvature.GGNInterface):
        base: type[LaplaceBackend] = _GGNBackend
    else:
        base = _EFBackend if issubclass(interface, curvature.EFInterface) else LaplaceBackend
    summary = (interface.__doc__ or "").partition("\n")[0]
    return type(
        name or interface.__name__, (base,),
        {"interface": interface, "__module__": __name__, "__doc__": f"For laplace-torch: {summary}"},
    )  # fmt: skip


def _warn_of_estimates(operator: LinearOperator) -> None:
    if isinstance(operator, DiagonalHessian) and operator.report is not None and operator.report.seed is not None:
        warnings.warn(
            f"The diagonal was estimated by {operator.report.algorithm} and laplace-torch keeps no error bars; "
            "raise memory_budget (la.backend.curvops.memory_budget) for an exact one.",
            NumericalWarning, stacklevel=3,
        )  # fmt: skip


NativeGGN = backend(curvature.GGNInterface, "NativeGGN")
NativeEF = backend(curvature.EFInterface, "NativeEF")
NativeHessian = backend(curvature.HessianInterface, "NativeHessian")
CurvlinopsGGN = backend(curvature.CurvlinopsGGN)
CurvlinopsEF = backend(curvature.CurvlinopsEF)
CurvlinopsHessian = backend(curvature.CurvlinopsHessian)
BackPackGGN = backend(curvature.BackPackGGN)
BackPackEF = backend(curvature.BackPackEF)
AsdlGGN = backend(curvature.AsdlGGN)
AsdlEF = backend(curvature.AsdlEF)
AsdlHessian = backend(curvature.AsdlHessian)
