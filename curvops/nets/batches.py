"""One batch: what it may look like, taken apart into inputs and targets, checked, and moved to where the network is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.errors import DataError, NumericalWarning
from curvops.nets.likelihood import require_finite

Inputs = Tensor | Mapping[str, Any]


class Batch(NamedTuple):
    """One batch of a pass.

    Attributes:
        index: Number of the batch, from 0.
        position: Data seen before it in this pass.
        x: Inputs, `(B, …)` or a mapping of such.
        y: Targets, `(B, …)`.
    """

    index: int
    position: int
    x: Inputs
    y: Tensor


def is_pair(data: Any) -> bool:
    """Whether `data` is a tuple of inputs and targets, which makes it one batch rather than a sequence of batches."""
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and isinstance(data[0], (Tensor, Mapping))
        and isinstance(data[1], Tensor)
    )


def split(batch: Any, what: str, dict_key_x: str, dict_key_y: str) -> tuple[Inputs, Tensor]:
    """Inputs and targets of a batch: a pair, or a Mapping that has its targets at `dict_key_y`.

    A Mapping is handed to the network without its targets, so that a model that computes a loss of its own when it
    sees labels (Hugging Face) does not.

    Args:
        batch: As the user's iterable gave it.
        what: "The data" or "Batch 3", the subject of the messages.
        dict_key_x: Key of the inputs whose first dimension counts the data.
        dict_key_y: Key of the targets.

    Raises:
        DataError: Not a batch, keys missing, or inputs and targets of different lengths.
    """
    if isinstance(batch, Mapping):
        if dict_key_y not in batch:
            raise DataError(f"{what} has no targets at {_missing(dict_key_y, batch, 'dict_key_y')}")
        x: Any = _like(batch, {key: value for key, value in batch.items() if key != dict_key_y})
        y = batch[dict_key_y]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
    else:
        raise DataError(
            f"{what} is {describe(batch)}; expected a pair (x, y) or a Mapping with the key {dict_key_y!r}."
        )
    if not isinstance(y, Tensor):
        raise DataError(f"{what} has {describe(y)} as targets; expected a tensor.{_from_numpy(y)}")
    if y.dim() == 0:
        raise DataError(
            f"{what} has 0-dim targets: it looks like a single datum. Expected a batch, (B, …) tensors; "
            "wrap a dataset in torch.utils.data.DataLoader."
        )
    length = batch_length(x, what, dict_key_x)
    if length != y.shape[0]:
        raise DataError(
            f"{what} has {length} inputs and {y.shape[0]} targets; expected as many of one as of the other."
        )
    return x, y


def batch_length(x: Any, what: str = "The batch", dict_key_x: str = "input_ids") -> int:
    """Number of data in the inputs of a batch: first dimension of x, or of `x[dict_key_x]`.

    Raises:
        DataError: Inputs of another type, strings among them, `dict_key_x` missing, or no batch dimension.
    """
    if isinstance(x, Mapping):
        for key, value in x.items():
            _check_value(f"{what}[{key!r}]", value)
        if dict_key_x not in x:
            raise DataError(f"{what} has no inputs at {_missing(dict_key_x, x, 'dict_key_x')}")
        x, what = x[dict_key_x], f"{what}[{dict_key_x!r}]"
    if not isinstance(x, Tensor):
        raise DataError(f"{what} has {describe(x)} as inputs; expected a tensor or a Mapping.{_from_numpy(x)}")
    if x.dim() == 0:
        raise DataError(f"{what} has 0-dim inputs; expected the data along the first dimension.")
    return x.shape[0]


def check_values(x: Inputs, y: Tensor, what: str, dict_key_x: str = "input_ids") -> None:
    """Raise `DataError` naming the batch and the place if anything in it is NaN or Inf. O(batch).

    Warns of labels that a causal language model of Hugging Face would still shift: they equal the tokens.
    """
    for name, t in named_tensors(x, y):
        if t.is_floating_point() or t.is_complex():
            require_finite(_values(t), f"The values of {name} in {what[:1].lower() + what[1:]}")
    if isinstance(x, Mapping):
        _warn_of_unshifted(x.get(dict_key_x), y, what)


def _warn_of_unshifted(tokens: Any, y: Tensor, what: str) -> None:
    if not isinstance(tokens, Tensor) or tokens.shape != y.shape or y.dim() != 2 or y.shape[1] < 2:
        return
    if tokens.is_floating_point() or y.is_floating_point() or not bool((y >= 0).any()):
        return
    if bool(((y == tokens) | (y < 0)).all()):
        warnings.warn(
            f"{what}: the labels equal the tokens, so that every position is to predict itself. Transformers shifts "
            "the labels of causal language models inside its own loss, which is not used here: write them with "
            "curvops.interop.huggingface.next_token_labels(batch).",
            NumericalWarning,
            stacklevel=2,
        )


def named_tensors(x: Inputs, y: Tensor) -> list[tuple[str, Tensor]]:
    """`("x", …)` or `("x['key']", …)` for each tensor of the inputs, then `("y", …)`."""
    if isinstance(x, Tensor):
        return [("x", x), ("y", y)]
    return [(f"x[{key!r}]", value) for key, value in x.items() if isinstance(value, Tensor)] + [("y", y)]


def move(
    x: Inputs,
    y: Tensor,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    fresh: bool = False,
) -> tuple[Inputs, Tensor]:
    """The batch on `device`, its floating tensors as `dtype`; what is so already is passed on, not copied.

    With `fresh`, nobody will write to these tensors: copies from pinned memory are queued and not waited for, so that
    the host goes on to the next batch while the accelerator works on this one.
    """
    overlap = fresh and device is not None and torch.device(device).type == "cuda"

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        queued = overlap and value.device.type == "cpu" and value.is_pinned()
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None, non_blocking=queued)

    y = one(y.detach() if y.requires_grad else y)
    if y.is_inference():  # autograd may not save such a tensor; a copy made outside inference mode it may
        with torch.inference_mode(False):
            y = y.clone()
    if isinstance(x, Tensor):
        return one(x), y
    moved = {key: one(value) for key, value in x.items()}
    return (x if all(moved[key] is x[key] for key in moved) else _like(x, moved)), y


def describe(value: Any) -> str:
    """Type of a thing that is not what was expected, with its shape or length where that helps."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        kinds = [type(v).__name__ for v in value[:4]] + ["…"] * (len(value) > 4)
        return f"a {name} of {len(value)} ({', '.join(kinds)})"
    return f"a {name}"


def _check_value(what: str, value: Any) -> None:
    """In a Mapping the network gets tensors and flags; text would reach the model only to fail there in other words."""
    if value is None or isinstance(value, (Tensor, bool, int, float)):
        return
    text = isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value))
    if text:
        raise DataError(f"{what} is text ({describe(value)}); expected tensors. Tokenise it, or remove that key.")
    raise DataError(f"{what} is {describe(value)}; expected a tensor (or None, a number, a flag).{_from_numpy(value)}")


def _like(mapping: Mapping[str, Any], changed: dict[str, Any]) -> Mapping[str, Any]:
    """`changed` as the user's kind of mapping, whose methods (BatchEncoding.to) the model may call; else as a dict."""
    if type(mapping) is dict:
        return changed
    try:
        return type(mapping)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def _missing(key: str, mapping: Mapping[str, Any], argument: str) -> str:
    return f"the key {key!r}; its keys are {sorted(map(str, mapping))}. Name the right one: {argument}=…"


def _from_numpy(value: Any) -> str:
    return " Use torch.from_numpy." if type(value).__module__ == "numpy" else ""


def _values(t: Tensor) -> Tensor:
    if t.layout == torch.strided:
        return t
    return t.coalesce().values() if t.layout == torch.sparse_coo else t.values()
