"""What the tests of the matrix-free curvatures share: each kind of operator on a problem, beside its dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import reference
import torch
from torch import Tensor, nn

import curvops as co
from curvops.nets.likelihoods import resolve
from curvops.operators import LinearOperator
from curvops.testing.problems import Problem, problem

Build = Callable[..., LinearOperator]

KINDS: dict[str, Build] = {
    "GGN": lambda m, L, d, **o: co.GGN(m, L, d, **o),
    "MCFisher": lambda m, L, d, **o: co.MCFisher(
        m, L, d, num_samples=2, generator=torch.Generator().manual_seed(5), **o
    ),
    "EF": lambda m, L, d, **o: co.EmpiricalFisher(m, L, d, **o),
    "EF-example": lambda m, L, d, **o: co.EmpiricalFisher(m, L, d, datum="example", **o),
    "Hessian": lambda m, L, d, **o: co.Hessian(m, L, d, **o),
    "Jacobian": lambda m, L, d, **o: co.Jacobian(m, d, **o),
    "Gram": lambda m, L, d, **o: co.Gram(m, L, d, **o),
    "NTK": lambda m, L, d, **o: co.Gram(m, L, d, weighted=False, **o),
}
"""Name → constructor `(model, likelihood, data, **options)`."""

CURVATURES = ("GGN", "MCFisher", "EF", "EF-example", "Hessian")
"""The square ones in parameter space."""


def options(p: Problem) -> dict[str, Any]:
    """The keywords that a problem asks for."""
    return {"params": p.params, **({"dict_key_x": "a"} if p.name == "dictionary" else {})}


def built(kind: str, p: Problem, dtype: torch.dtype = torch.float64, data: Any = None, **own: Any) -> LinearOperator:
    """The operator of that kind on the problem's batch, or on other data."""
    return KINDS[kind](p.model(dtype), p.loss(dtype), p.data(dtype) if data is None else data, **options(p), **own)


@cache
def oracle(kind: str, name: str) -> Tensor:
    """The dense float64 matrix of that kind, by `reference`."""
    p = problem(name)
    model, loss, (x, y) = p.model(), reference.problem_nll(p), p.data()
    if kind == "GGN":
        return reference.ggn(model, loss, x, y, p.params)
    if kind.startswith("EF"):
        return reference.empirical_fisher(model, loss, x, y, p.params, "example" if "example" in kind else "token")
    if kind == "Hessian":
        return reference.hessian(p.oracle_model(), loss, x, y, p.params)
    J = reference.jacobian(model, x, p.params)
    if kind == "Jacobian":
        return J.flatten(0, -2)
    if kind == "NTK":
        return J.flatten(0, -2) @ J.flatten(0, -2).T
    likelihood, f = resolve(p.loss()), reference.outputs(model, x).detach()
    if kind == "MCFisher":
        seed = co.MCFisher(model, p.loss(), (x, y), generator=torch.Generator().manual_seed(5), **options(p)).seed
        draws = [likelihood.pseudo_gradients_at(f, y, seed=seed, position=0, sample=s) for s in range(2)]
        return reference.mc_fisher(model, x, draws, p.params)
    B = torch.einsum("...cr,...cp->...rp", likelihood.output_hessian_sqrt(f, y), J).flatten(0, -2)
    return B @ B.T


def piece(x: Any, start: int, stop: int) -> Any:
    """Data start … stop of a batch of inputs."""
    return {k: v[start:stop] for k, v in x.items()} if isinstance(x, Mapping) else x[start:stop]


def ragged(p: Problem, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (1, 3)) -> list[tuple[Any, Tensor]]:
    """The problem's batch as a list of batches of these sizes."""
    x, y = p.data(dtype)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(piece(x, end - size, end), y[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


class Loader:
    """A re-iterable of batches that counts its passes and the batches given."""

    def __init__(self, batches: list[Any]) -> None:
        self.data, self.passes, self.given = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for batch in self.data:
            self.given += 1
            yield batch


class Counted(nn.Module):
    """A small network that counts its forwards."""

    def __init__(self, width: int = 4, outputs: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.net(x)


def batches(count: int, size: int = 3, width: int = 4, classes: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for `Counted`, the last one short."""
    g = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [max(1, size - 1)]
    return [
        (torch.randn(n, width, dtype=torch.float64, generator=g), torch.randint(classes, (n,), generator=g))
        for n in sizes
    ]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    """Normal numbers from a private generator."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
