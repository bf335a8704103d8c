"""Optional dependencies: which there are, and the sentence for one that is not installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

from curvops.errors import MissingExtraError

EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "plot": (("matplotlib", "matplotlib"),),
    "report": (("matplotlib", "matplotlib"), ("jinja2", "jinja2"), ("sklearn", "scikit-learn")),
    "asdl": (("asdl", "asdfghjkl"),),
    "laplace": (("laplace", "laplace-torch"),),
    "hf": (("transformers", "transformers"),),
    "peers": (
        ("laplace", "laplace-torch"),
        ("asdl", "asdfghjkl"),
        ("transformers", "transformers"),
        ("gpytorch", "gpytorch"),
    ),
    "notebooks": (("jupytext", "jupytext"), ("nbmake", "nbmake"), ("ipykernel", "ipykernel")),
}
"""Extra → (importable module, distribution) pairs that it adds."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise MissingExtraError(
            f"{module.partition('.')[0]} is not installed, and this needs it; run: pip install 'curvops[{extra}]'"
        ) from error


def require_version(distribution: str, wanted: str, extra: str) -> None:
    """Refuse an installed distribution that is older than `wanted`, a version in digits and dots.

    Raises:
        MissingExtraError: It is older; says what was found. One that is not installed is left to `require`.
    """
    found = version_of(distribution)
    if found is not None and _numbers(found) < _numbers(wanted):
        raise MissingExtraError(
            f"{distribution} {found} is installed, and this needs >= {wanted}; "
            f"run: pip install --upgrade 'curvops[{extra}]'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """`0.3.1rc2` → (0, 3, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
