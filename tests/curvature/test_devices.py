"""Curvatures are made where the network is, whatever the defaults of torch are, and are the same on every device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from curvature_subjects import options
from defaults import strange_defaults
from torch import Tensor

import curvops as co
from curvops.errors import NumericalWarning
from curvops.testing.problems import Problem, problem, problems

Build = Callable[..., Any]
Computed = Callable[[Build], Tensor]
"""A number, from `made(kind, **options)`, which builds that curvature of a problem."""

OF_ENTRIES: dict[str, Computed] = {
    "GGN": lambda made: made(co.GGN).to_dense(),
    "MC Fisher": lambda made: made(co.MCFisher, num_samples=2).to_dense(),
    "empirical Fisher": lambda made: made(co.EmpiricalFisher).to_dense(),
    "Hessian": lambda made: made(co.Hessian).to_dense(),
    "Gram": lambda made: made(co.Gram).to_dense(),
    "diagonal of the GGN": lambda made: made(co.DiagonalGGN).diagonal(),
    "diagonal of the MC Fisher": lambda made: made(co.DiagonalGGN, fisher="mc").diagonal(),
    "diagonal of the empirical Fisher": lambda made: made(co.DiagonalEF).diagonal(),
    "diagonal of the Hessian": lambda made: made(co.DiagonalHessian).diagonal(),
    "solve": lambda made: solved(made(co.GGN).add_diagonal(0.1), co.Cholesky()),
    "logdet": lambda made: made(co.GGN).add_diagonal(0.1).logdet(),
    "logdet, estimated": lambda made: made(co.GGN).add_diagonal(0.1).logdet(co.SLQ(atol=1e3, probes=4)),
    "eigenvalues": lambda made: made(co.Hessian).eigsh(2).values,
    "variance": lambda made: posterior(made(co.GGN).add_diagonal(0.1)).marginal_variance(),
    "samples": lambda made: posterior(made(co.GGN).add_diagonal(0.1)).sample(2, co.Cholesky()),
    "low rank": lambda made: co.low_rank(made(co.GGN), 3).to_dense(),
}
"""Curvatures of single entries of parameters, too."""

OF_PARAMETERS: dict[str, Computed] = {
    "KFAC": lambda made: made(co.KFAC).to_dense(),
    "KFAC, MC, reduce": lambda made: made(co.KFAC, fisher="mc", approx="reduce").to_dense(),
    "KFAC, joint": lambda made: made(co.KFAC, weight_and_bias="joint").to_dense(),
    "KFAC, solve": lambda made: solved(made(co.KFAC).add_diagonal(0.1)),
    "KFAC, logdet": lambda made: made(co.KFAC).add_diagonal(0.1).logdet(),
    "EKFAC": lambda made: made(co.EKFAC, fisher="empirical").to_dense(),
    "blocks of the GGN": lambda made: made(co.BlockGGN).to_dense(),
    "blocks of the Hessian": lambda made: made(co.BlockHessian).to_dense(),
    "blocks of modules": lambda made: made(co.BlockEF, by="module").to_dense(),
}
"""Curvatures of whole parameters alone."""

NUMBERS = {**OF_ENTRIES, **OF_PARAMETERS}


def posterior(A: Any) -> co.Gaussian:
    return co.Gaussian(torch.zeros(A.shape[0], dtype=A.dtype, device=A.device), A, torch.Generator().manual_seed(0))


def solved(A: Any, method: Any = None) -> Tensor:
    return A.solve(torch.ones(A.shape[0], dtype=A.dtype, device=A.device), method)


def subject(p: Problem, where: str = "cpu") -> Build:
    parts = p.model(device=where), p.loss(device=where), p.data(device=where)
    return lambda kind, **own: kind(*parts, **options(p), **own)


@pytest.fixture(autouse=True)
def _unused_parameters_are_reported() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the outputs do not depend on unused", NumericalWarning)
        yield


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_same_numbers_on_an_accelerator(name: str, p: Problem) -> None:
    if name in OF_PARAMETERS and isinstance(p.params, Tensor):
        pytest.skip("of whole parameters alone")
    expected, got = (NUMBERS[name](subject(p, where)) for where in ("cpu", "cuda"))
    assert got.device.type == "cuda"
    assert got.dtype == expected.dtype
    assert reference.relative_error(got.cpu(), expected) < 1e-9


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("network", ["mlp", "conv2d", "lstm", "embedding", "tied", "tokens-ignored-weighted"])
def test_defaults_of_torch_do_not_matter(name: str, network: str) -> None:
    p = problem(network)
    made, again = subject(p), subject(p)
    expected = NUMBERS[name](made)
    with strange_defaults():
        got = NUMBERS[name](again)
    assert torch.equal(got, expected)
