"""What a report is about: a network, its likelihood and its data; the built-in one, or the user's own by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvops.errors import DataError


@dataclass(frozen=True)
class Subject:
    """A trained network and what it was trained on.

    Attributes:
        title: One line for the head of the report.
        model: The network, at the parameters whose curvature is asked for.
        likelihood: Anything that `co.GGN` takes.
        data: One batch `(x, y)`, a Mapping, or a re-iterable of batches.
        inputs: Data whose predictions the posterior's spread is taken of, in the same forms.
        notes: Sentences for the head of the report.
    """

    title: str
    model: nn.Module
    likelihood: Any
    data: Any
    inputs: Any
    notes: tuple[str, ...] = ()


def load(spec: str, what: str) -> Any:
    """Call the factory that `module:name` names, without arguments.

    Args:
        spec: `"package.module:factory"`; the module is looked for in the current directory too.
        what: What it should return, for the error ("a network").

    Raises:
        DataError: The spec has another form, the module or the name does not exist, or it cannot be called.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise DataError(f"got {spec!r}; expected module:factory, a callable without arguments that returns {what}.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise DataError(
            f"{spec!r}: there is no module {module_name!r} on the Python path; run from the folder that holds it."
        ) from error
    if not hasattr(module, name):
        public = ", ".join(sorted(n for n in vars(module) if not n.startswith("_"))) or "nothing"
        raise DataError(f"{spec!r}: {module_name} has no {name!r}; it has {public}.")
    factory = getattr(module, name)
    if not callable(factory):
        raise DataError(f"{spec!r} is a {type(factory).__name__}; expected a function that returns {what}.")
    return factory()


def users_subject(model_spec: str, data_spec: str, likelihood: str) -> Subject:
    """The user's own network and data.

    Args:
        model_spec: `module:factory` of the trained network, an `nn.Module` in eval mode.
        data_spec: `module:factory` of the data: a tuple `(x, y)`, a Mapping, or a re-iterable of batches.
        likelihood: "regression", "classification" or "binary".
    """
    model = load(model_spec, "a torch.nn.Module")
    if not isinstance(model, nn.Module):
        raise DataError(f"{model_spec!r} returned a {type(model).__name__}; expected a torch.nn.Module.")
    data = load(data_spec, "a tuple (x, y), a Mapping or a re-iterable of batches")
    return Subject(
        title=f"{model_spec} on {data_spec}",
        model=model,
        likelihood=likelihood,
        data=data,
        inputs=data,
        notes=("The predictive spread below is taken on the first inputs of the data.",),
    )
