"""Fixtures for every test; `reference` and `conftest` are importable from anywhere below."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# The matrices of the tests are small: threads that wait for each other cost many times what they save.
torch.set_num_threads(1)


# -------------------------------------------------------------------- shapes (pytest --shapes)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shapes`: check the shapes in curvops' annotations while the tests run; more than doubles their time."""
    parser.addoption("--shapes", action="store_true", help="check the shapes in annotations (jaxtyping, beartype)")


def pytest_configure(config: pytest.Config) -> None:
    """Install the import hook before any test imports curvops."""
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        install_import_hook("curvops", "shapecheck.check")


# -------------------------------------------------------------------- fixtures


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is; CUDA tests are skipped without one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both precisions."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks that a test initialises without a seed of its own are the same every time."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A private generator, seed 0."""
    return torch.Generator().manual_seed(0)
