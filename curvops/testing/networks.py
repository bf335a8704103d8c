"""The zoo of curvatures: matrix-free operators over a network, each beside its dense matrix by plain autograd.

>>> import torch
>>> from curvops.testing.networks import network_cases
>>> operator, matrix = network_cases()[0].build(torch.float64)
>>> operator
GGN(P=35, N=4, classification)
>>> bool((operator.to_dense() - matrix).norm() < 1e-12 * matrix.norm())
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvops.curvature.matrixfree import GGN, EmpiricalFisher, Gram, Hessian, Jacobian, MCFisher
from curvops.nets.likelihoods import resolve
from curvops.operators import Kronecker, LinearOperator
from curvops.testing.problems import Problem, problem
from curvops.testing.zoo import Case, Parts

_DELTAS = {"0.weight": 0.5, "0.bias": 1.0, "2.weight": 1.5, "2.bias": 2.0}


class Subject:
    """A problem's network and batch in the precision of the parts, and the dense matrices of its curvatures.

    Args:
        name: Name of a problem with a small network.
        parts: Precision and device; `exact` gives the same rounded numbers as float64 on the CPU.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        p: Problem = problem(name)
        self.model: nn.Module = p.model(parts.dtype, parts.device)
        self.x, self.y = p.data(parts.dtype, parts.device)
        self.likelihood = p.loss(parts.dtype, parts.device)
        if parts.exact:
            self.model = self.model.double().cpu()
            self.x, self.y = (t.double() if t.is_floating_point() else t for t in (self.x.cpu(), self.y.cpu()))
            self.likelihood = self.likelihood.double().cpu() if isinstance(self.likelihood, nn.Module) else p.loss()

    def operator(self, build: Callable[..., LinearOperator], **options: Any) -> LinearOperator:
        """`build(model, likelihood, data, **options)` over three ragged batches."""
        cuts = [slice(0, 1), slice(1, 3), slice(3, None)]
        return build(self.model, self.likelihood, [(self.x[cut], self.y[cut]) for cut in cuts], **options)

    def jacobian(self) -> Tensor:
        """`(N·C, P)`, one backward per row."""
        return torch.stack([_gradient(f, self.model) for f in self.model(self.x).flatten()]).detach()

    def loss_gradient(self, create_graph: bool = False) -> Tensor:
        """`(P,)` gradient of the summed negative log-likelihood."""
        return _gradient(resolve(self.likelihood).loss(self.model(self.x), self.y), self.model, create_graph)

    def hessian(self) -> Tensor:
        """`(P, P)`, row by row by double backward."""
        return torch.stack([_gradient(g, self.model) for g in self.loss_gradient(create_graph=True)]).detach()

    def weighted(self, root: Callable[[Tensor], Tensor]) -> Tensor:
        """`SᵀJ`, rows of the curvature `JᵀSSᵀJ`, from `root(f)`: S `(N[, T], C, R)`."""
        f = self.model(self.x).detach()
        S = root(f)
        J = self.jacobian().reshape(*f.shape, -1)
        return (S.mT @ J).flatten(0, -2)

    def ggn_factor(self) -> Tensor:
        """B of the GGN."""
        return self.weighted(lambda f: resolve(self.likelihood).output_hessian_sqrt(f, self.y))

    def ggn(self) -> Tensor:
        """`(P, P)`, from the Hessian of the loss in the outputs."""
        f = self.model(self.x).detach().requires_grad_()
        loss = resolve(self.likelihood).loss(f, self.y)
        (g,) = torch.autograd.grad(loss, f, create_graph=True)
        rows = [torch.autograd.grad(entry, f, retain_graph=True)[0].flatten() for entry in g.flatten()]
        J = self.jacobian()
        return J.T @ torch.stack(rows) @ J

    def mc_factor(self, samples: int) -> Tensor:
        """Rows of the MC Fisher of seed 0."""
        likelihood = resolve(self.likelihood)

        def root(f: Tensor) -> Tensor:
            draw = likelihood.pseudo_gradients_at
            draws = [draw(f, self.y, seed=0, position=0, sample=s) for s in range(samples)]
            return torch.stack(draws, -1) / samples**0.5

        return self.weighted(root)

    def gradient_factor(self) -> Tensor:
        """Rows of the empirical Fisher: a gradient per datum (and position)."""
        return self.weighted(lambda f: resolve(self.likelihood).gradient(f, self.y).unsqueeze(-1))


def network_cases() -> list[Case]:
    """Every matrix-free curvature, alone and within the algebra."""
    return [
        _case("GGN", "mlp", lambda s, m: s.operator(GGN), lambda s, m: s.ggn()),
        _case("GGN, regression", "mlp-regression", lambda s, m: s.operator(GGN), lambda s, m: s.ggn()),
        _case(
            "GGN, binary, nothing kept", "mlp-binary",
            lambda s, m: s.operator(GGN, cache=False), lambda s, m: s.ggn(),
        ),
        _case("GGN, class weights", "mlp-weighted", lambda s, m: s.operator(GGN), lambda s, m: s.ggn()),
        _case("GGN, sequences", "tokens", lambda s, m: s.operator(GGN), lambda s, m: s.ggn()),
        _case(
            "MC Fisher", "mlp", lambda s, m: s.operator(MCFisher, num_samples=2), lambda s, m: _square(s.mc_factor(2))
        ),
        _case(
            "empirical Fisher", "mlp",
            lambda s, m: s.operator(EmpiricalFisher), lambda s, m: _square(s.gradient_factor()),
        ),
        _case("Hessian", "mlp", lambda s, m: s.operator(Hessian), lambda s, m: s.hessian()),
        _case("Hessian, regression", "mlp-regression", lambda s, m: s.operator(Hessian), lambda s, m: s.hessian()),
        _case("Gram", "mlp", lambda s, m: s.operator(Gram), lambda s, m: _square(s.ggn_factor().T)),
        _case(
            "Gram, unweighted", "mlp",
            lambda s, m: s.operator(Gram, weighted=False), lambda s, m: _square(s.jacobian().T),
        ),
        _case("Jacobian", "mlp", lambda s, m: s.operator(_jacobian), lambda s, m: s.jacobian()),
        _case("Jacobian, transposed", "mlp", lambda s, m: s.operator(_jacobian).T, lambda s, m: s.jacobian().T),
        _case(
            "GGN + delta I", "mlp",
            lambda s, m: s.operator(GGN).add_diagonal(0.7), lambda s, m: s.ggn() + 0.7 * torch.eye(35).double(),
        ),
        _case(
            "GGN + delta per parameter", "mlp",
            lambda s, m: s.operator(GGN).add_diagonal(_DELTAS), lambda s, m: s.ggn() + torch.diag(_deltas(s.model)),
        ),
        _case(
            "3 GGN + delta vector", "mlp",
            lambda s, m: 3.0 * s.operator(GGN).add_diagonal(m.positive(35)),
            lambda s, m: 3.0 * (s.ggn() + torch.diag(m.positive(35))),
        ),
        _case(
            "Hessian + delta I", "mlp",
            lambda s, m: s.operator(Hessian).add_diagonal(30.0), lambda s, m: s.hessian() + 30 * torch.eye(35).double(),
        ),
        _case(
            "GGN + Kronecker", "mlp",
            lambda s, m: s.operator(GGN) + Kronecker(m.pd(5), m.pd(7, 1)),
            lambda s, m: s.ggn() + torch.kron(m.pd(5), m.pd(7, 1)),
        ),
        _case(
            "Hessian - GGN", "mlp",
            lambda s, m: s.operator(Hessian) - s.operator(GGN), lambda s, m: s.hessian() - s.ggn(),
        ),
        _case(
            "principal submatrix of a GGN", "mlp",
            lambda s, m: s.operator(GGN).submatrix(torch.tensor([30, 2, 9])),
            lambda s, m: s.ggn()[[30, 2, 9]][:, [30, 2, 9]],
        ),
        _case(
            "Jacobian.T @ Jacobian", "mlp",
            lambda s, m: (J := s.operator(_jacobian)).T @ J, lambda s, m: _square(s.jacobian()),
        ),
    ]  # fmt: skip


_Made = Callable[[Subject, Parts], Any]


def _case(name: str, network: str, operator: _Made, matrix: _Made) -> Case:
    return Case(name, lambda m: operator(Subject(network, m), m), lambda m: matrix(Subject(network, m), m))


def _jacobian(model: nn.Module, likelihood: Any, data: Any) -> Jacobian:
    return Jacobian(model, data)


def _square(B: Tensor) -> Tensor:
    return B.T @ B


def _deltas(model: nn.Module) -> Tensor:
    return torch.cat([torch.full((p.numel(),), _DELTAS[name]).double() for name, p in model.named_parameters()])


def _gradient(scalar: Tensor, model: nn.Module, create_graph: bool = False) -> Tensor:
    grads = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True, create_graph=create_graph)
    return torch.cat([g.flatten() for g in grads])
