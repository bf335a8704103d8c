"""The libraries that tests marked `peers` compare with are all there where these run, or the run fails."""

from __future__ import annotations

import importlib
import warnings

import pytest

from curvops.extras import EXTRAS, version_of


@pytest.mark.peers
@pytest.mark.parametrize(("module", "distribution"), EXTRAS["peers"])
def test_it_is_installed(module: str, distribution: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(module)
    assert version_of(distribution) is not None
