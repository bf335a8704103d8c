"""The network as a function of its inputs: called the right way, checked, and left as it was found."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import (
    CurvopsError,
    DataError,
    NonDeterministicDataError,
    NumericalWarning,
    ShapeError,
    StaleOperatorError,
    UnsupportedError,
    UnsupportedLayerError,
)
from curvops.nets.parameters import unwrap
from curvops.nets.patches import (
    differentiable,
    has_recurrence,
    needs_plain_kernels,
    tracked_only,
    without_backward_hooks,
)

Inputs = Tensor | Mapping[str, Any]


class Network:
    """A module seen as `x → f`, with `f` of shape `(B, C)` or `(B, T, C)`.

    Args:
        model: The user's module; a compiled one is looked through. Nothing is copied, hooked or altered.

    A Mapping `x` goes to `model(**x)` when the keys are names of the forward's arguments (Hugging Face), otherwise to
    `model(x)`. Of an output that has `logits`, those are taken.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise DataError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
        self.module: nn.Module = unwrap(model)
        named = list(self.module.named_modules())
        for path, module in named:
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedError(
                    f"module {path or '(the model itself)'!r} is compiled to TorchScript, which hides its parameters "
                    "and its operations; build the curvature on the Python module that it was made from"
                )
        self.fused = False
        """Whether attention runs fused, which makes the forward faster, each pass slower, and a second derivative
        impossible: for graphs that few cotangents pass over."""
        modules = [module for _, module in named]
        self.recurrent: bool = has_recurrence(modules)
        self.plain: bool = needs_plain_kernels(modules)

    def fusing(self) -> Network:
        """The same with `fused`."""
        network = copy.copy(self)
        network.fused = True
        return network

    def __call__(
        self,
        x: Inputs,
        selected: Sequence[Tensor] | None = None,
        *,
        detach: bool = True,
        within: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """One forward with autograd on.

        Args:
            x: Inputs of one batch.
            selected: The parameters to track; the graph keeps nothing for the sake of others. None tracks all that
                require a gradient, the empty tuple none.
            detach: Cut `x` off its own graph (False to differentiate through it).
            within: What the module runs in, and what checks it does not: modes that look at every operation.

        Returns:
            f, `(B, C)` or `(B, T, C)`, in the parameters' dtype, attached to the graph.

        Raises:
            DataError: NaN outputs, inputs of another dtype or device than the parameters, modules in train mode.
            ShapeError: an output that is neither `(B, C)` nor `(B, T, C)`.
            UnsupportedError: a forward that changes buffers or mixes the batch through its own statistics.
            NonDeterministicDataError: a forward that draws random numbers.
        """
        named = list(self.module.named_modules())  # walked over once: for a small network that is half of a forward
        modules = [module for _, module in named]
        parameter = _first_parameter(modules)
        _check_modes(named)
        with (
            self.differentiable(),
            without_backward_hooks(modules),
            nullcontext() if selected is None else tracked_only(modules, selected),
            _buffers_unchanged(named),
            _no_randomness(_device_of(parameter, x)),
        ):
            x = _prepared(x, detach)
            try:
                with nullcontext() if within is None else within:
                    output = self.call(x)
            except CurvopsError:
                raise
            except RuntimeError as error:
                raise _explained_forward(error, self.module, x) from error
            f = self._normalised(output, x, parameter)
        tracked = self.module.parameters() if selected is None else selected
        if not f.requires_grad and any(p.requires_grad for p in tracked):
            warnings.warn(
                f"the outputs of {type(self.module).__name__} depend on none of the selected parameters, and every "
                "curvature is zero; is there a detach() or a no_grad() in the forward?",
                NumericalWarning,
                stacklevel=2,
            )
        return f

    def evaluate(self, x: Inputs) -> Tensor:
        """As calling, without a graph: f, detached. One forward."""
        return self(x, ()).detach()

    def call(self, x: Inputs) -> Any:
        """The module's raw output; no guard, no check."""
        if isinstance(x, Mapping) and self.by_keyword(x):
            return self.module(**dict(x))
        return self.module(x)

    def differentiable(self) -> AbstractContextManager[None]:
        """Kernels with second derivatives, for this network; see `patches.differentiable`."""
        return differentiable(recurrent=self.recurrent, plain=self.plain, fused=self.fused)

    def by_keyword(self, x: Inputs) -> bool:
        """Whether `x` is a Mapping that goes to the forward as keywords."""
        if not isinstance(x, Mapping):
            return False
        named, any_keyword = self._arguments
        known = [k for k in x if k in named]
        if not known:
            return False
        if len(known) < len(x) and not any_keyword:
            unknown = [k for k in x if k not in named]
            raise DataError(
                f"the forward of {type(self.module).__name__} takes {sorted(named)}, "
                f"but the batch also holds {unknown}; drop those keys"
            )
        return True

    @functools.cached_property
    def _arguments(self) -> tuple[frozenset[str], bool]:
        """Names of the forward's arguments, and whether it takes any other keyword."""
        return _forward_arguments(self.module)

    def output_tensor(self, output: Any) -> Tensor:
        """The tensor within a raw output: itself, or its `logits`."""
        if isinstance(output, Tensor):
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ShapeError(
                f"the forward of {type(self.module).__name__} returned {type(output).__name__}; expected a Tensor "
                "(B, C) or (B, T, C), or an output with .logits: wrap the model in a module that returns that part"
            )
        return logits

    def _normalised(self, output: Any, x: Inputs, parameter: Tensor | None) -> Tensor:
        output = self.output_tensor(output)
        if output.ndim not in (2, 3):
            advice = "return f.unsqueeze(-1)" if output.ndim == 1 else "flatten the positions: f.flatten(1, -2)"
            raise ShapeError(
                f"the forward returned shape {tuple(output.shape)}; expected (B, C) or (B, T, C): {advice}"
            )
        if isinstance(x, Tensor) and output.shape[0] != x.shape[0]:
            raise ShapeError(
                f"the forward returned {output.shape[0]} outputs for {x.shape[0]} inputs; expected one per datum, "
                "with the batch first in both"
            )
        if output.dtype in (torch.float16, torch.bfloat16) or not output.is_floating_point():
            raise UnsupportedError(
                f"the forward returned dtype {output.dtype}; curvature needs float32 or float64 outputs "
                "(is there an autocast inside the model?)"
            )
        if parameter is not None and parameter.dtype in (torch.float32, torch.float64):
            output = output.to(parameter.dtype)
        # A finite sum proves every entry finite at a tenth of the cost; an infinite one may be an overflow.
        if not (math.isfinite(output.detach().sum()) or bool(output.detach().isfinite().all())):
            raise DataError("the network's outputs hold NaN or infinite values; look at the inputs' scale")
        return output


def take(x: Inputs, start: int, stop: int, size: int) -> Inputs:
    """Data `start … stop` of a batch of `size`: every tensor whose first axis is the batch is sliced, the rest kept."""
    if isinstance(x, Tensor):
        return x[start:stop]
    return rebuilt(x, {k: v[start:stop] for k, v in x.items() if is_batched(v, size)})


def is_batched(value: Any, size: int) -> bool:
    """Whether a value of a mapping has one row per datum."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def tensors_of(x: Inputs) -> list[Tensor]:
    """The tensors that a batch of inputs holds."""
    return [x] if isinstance(x, Tensor) else [v for v in x.values() if isinstance(v, Tensor)]


def explained(error: RuntimeError) -> Exception:
    """What a failed differentiation means and what to do; the error itself where nothing better is known."""
    text = str(error)
    if "Checkpointing is not compatible" in text or "use_reentrant" in text:
        return UnsupportedError(
            "the model uses reentrant activation checkpointing, which autograd.grad cannot enter; "
            "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
        )
    if "does not currently support double backward" in text:
        return UnsupportedError(
            "a compiled function inside the model does not differentiate twice; build the operator on the "
            "uncompiled model, or import torch._dynamo before so that compiled parts run eagerly"
        )
    if "once_differentiable" in text:
        return UnsupportedLayerError(
            "a custom autograd.Function in the model is marked once_differentiable; its backward must be made of "
            "differentiable operations for curvature products"
        )
    if "is not implemented" in text and "derivative" in text:
        return UnsupportedLayerError(
            f"an operation of the model has no second derivative in PyTorch ({text.splitlines()[0]}); "
            "replace it by its plain equivalent (EmbeddingBag: use the module nn.EmbeddingBag, sum or mean)"
        )
    return error


def explained_product(error: RuntimeError) -> Exception:
    """As `explained`, for a product on a kept graph."""
    if "modified by an inplace operation" in str(error):
        return StaleOperatorError(
            "a tensor that the kept graph needs was changed in place since it was built (parameters, buffers or "
            "inputs); build the operator again, or with snapshot=True"
        )
    return explained(error)


def _forward_arguments(module: nn.Module) -> tuple[frozenset[str], bool]:
    if callable(getattr(module, "forward_with_features", None)):
        return frozenset(), False  # a feature extractor hands on what it gets, whatever it calls it
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = frozenset(p.name for p in parameters if p.kind in kinds)
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _first_parameter(modules: Iterable[nn.Module]) -> Tensor | None:
    return next((p for m in modules for p in m._parameters.values() if p is not None), None)


def _device_of(parameter: Tensor | None, x: Inputs) -> torch.device:
    if parameter is not None:
        return parameter.device
    tensors = tensors_of(x)
    return tensors[0].device if tensors else torch.device("cpu")


_RANDOM_POOLS = nn.FractionalMaxPool2d, nn.FractionalMaxPool3d


def _check_modes(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules that are random, or that mix or remember batches, in the mode they are in.

    Raises:
        DataError: dropout or batch statistics in train mode; the way out is `model.eval()`.
        UnsupportedError: BatchNorm without running statistics, FractionalMaxPool.
    """
    for path, module in modules:
        complaint = _mode_complaint(module)
        if complaint is not None:
            kind, why = complaint
            raise kind(f"module {path or '(the model itself)'!r} ({type(module).__name__}) {why}")


def _mode_complaint(module: nn.Module) -> tuple[type[CurvopsError], str] | None:
    if isinstance(module, _RANDOM_POOLS):
        return UnsupportedError, "pools over random regions at every forward; use MaxPool or AvgPool"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None and not module.training:
            return UnsupportedError, (
                "has no running statistics and normalises by the batch even in eval mode, so that one example's output "
                "depends on the others; build it with track_running_stats=True"
            )
        if module.training:
            return DataError, "is in train mode and normalises by the batch; call model.eval() first"
    if not module.training:
        return None
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return DataError, "is in train mode and drops at random; call model.eval() first"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return DataError, "is in train mode and updates its running statistics; call model.eval() first"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
        return DataError, "is in train mode with dropout; call model.eval() first"
    if isinstance(module, nn.RReLU):
        return DataError, "is in train mode and draws random slopes; call model.eval() first"
    return None


def _prepared(x: Inputs, detach: bool) -> Inputs:
    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A tensor made under inference_mode cannot be saved for backward; a copy can.
        if value.is_inference():
            return value.clone()
        return value.detach() if detach and value.requires_grad else value

    if isinstance(x, Tensor):
        return one(x)
    if not any(isinstance(v, Tensor) and (v.is_inference() or v.requires_grad) for v in x.values()):
        return x
    return rebuilt(x, {k: one(v) for k, v in x.items()})


def rebuilt(x: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping of the same kind (a BatchEncoding stays one) with some values changed."""
    changed = {**x, **values}
    if type(x) is dict:
        return changed
    try:
        return type(x)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


@contextmanager
def _buffers_unchanged(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """Put buffers back, and refuse, when the forward changed them."""
    held = []
    for path, module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                version = None if buffer.is_inference() else buffer._version
                held.append((path, module, key, buffer, version, buffer.detach().clone()))
    changed = []
    try:
        yield
    finally:
        for path, module, key, buffer, version, copy in held:
            moved = version is not None and buffer._version != version
            if module._buffers.get(key) is buffer and not moved:
                continue
            if moved and not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)
                changed.append(f"{path}.{key}".lstrip("."))
            elif not moved:
                changed.append(f"{path}.{key}".lstrip("."))
            module._buffers[key] = buffer
    if changed:
        raise UnsupportedError(
            f"the forward changes the buffers {', '.join(changed)}, so that no two forwards agree; "
            "call model.eval(), or make the update conditional on self.training"
        )


@contextmanager
def _no_randomness(device: torch.device) -> Iterator[None]:
    """Put the global random state back, and refuse, when the forward drew from it."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [g.get_state() for g in generators]
    drew = False
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
                drew = True
    if drew:
        raise NonDeterministicDataError(
            "the forward drew random numbers, so that no two forwards agree; call model.eval(), or pass "
            "training=self.training to functional dropout"
        )


def _explained_forward(error: RuntimeError, module: nn.Module, x: Inputs) -> Exception:
    parameter = next(module.parameters(), None)
    if parameter is not None:
        for tensor in tensors_of(x):
            if tensor.device != parameter.device:
                return DataError(f"inputs on {tensor.device}, parameters on {parameter.device}: move the batch")
            if tensor.is_floating_point() and tensor.dtype != parameter.dtype:
                return DataError(
                    f"inputs of dtype {tensor.dtype}, parameters of {parameter.dtype}: pass x.to({parameter.dtype})"
                )
    return explained(error)
