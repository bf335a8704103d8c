"""laplace-torch missing or too old: said when the package is imported."""

from __future__ import annotations

import importlib
import sys

import pytest

from curvops.errors import MissingExtraError


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if curvops.interop.laplace had not been imported yet."""
    for name in [name for name in sys.modules if name.startswith("curvops.interop.laplace")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def test_without_laplace_torch_the_import_says_how_to_get_it(afresh: pytest.MonkeyPatch) -> None:
    afresh.setattr("curvops.extras.version_of", lambda distribution: None)
    afresh.setitem(sys.modules, "laplace", None)
    with pytest.raises(MissingExtraError, match=r"laplace is not installed.*pip install 'curvops\[laplace\]'"):
        importlib.import_module("curvops.interop.laplace")


@pytest.mark.parametrize("version", ["0.2.2.2", "0.1a2", "0.2"])
def test_an_old_laplace_torch_is_named(afresh: pytest.MonkeyPatch, version: str) -> None:
    afresh.setattr("curvops.extras.version_of", lambda distribution: version)
    wanted = rf"laplace-torch {version} is installed, and this needs >= 0\.3; run: pip install --upgrade"
    with pytest.raises(MissingExtraError, match=wanted):
        importlib.import_module("curvops.interop.laplace")


def test_the_rest_of_curvops_does_not_ask_for_it() -> None:
    importlib.import_module("curvops.interop")


@pytest.mark.peers
@pytest.mark.parametrize("version", ["0.3", "0.3.1", "0.10", "1.0rc1"])
def test_newer_ones_are_welcome(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Fails, rather than skips, where the environment for comparisons lacks laplace-torch."""
    from curvops.interop.laplace import library

    monkeypatch.setattr("curvops.extras.version_of", lambda distribution: version)
    library.require_version("laplace-torch", "0.3", "laplace")
