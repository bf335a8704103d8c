"""Laws of autograd: gradients reach v, b, the damping δ and a scalar factor c, and equal those of the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvops.operators import LinearOperator
from curvops.operators.methods import SOLVE_RTOL
from curvops.testing.lawbook.subject import Subject

Scalars = Callable[..., Tensor]


def gradients_of_products(s: Subject) -> None:
    """d/dv and d/dc of `uᵀ(cA)v`, d/dv, d/dδ of `vᵀ(A + δI)v`."""
    if not s.has_transpose():
        return
    rows, columns = s.M.shape
    u, v, c = s.vector(rows, 31), s.vector(columns, 32), s.vector(1, 33)[0]
    _compare(
        s,
        lambda v, c: u @ ((c * s.A) @ v),
        lambda v, c: u.cpu().double() @ (c * s.M) @ v,
        [v, c],
        s.norm * float(u.norm()) * max(1.0, float(v.norm()), abs(float(c))),
        "uᵀ(cA)v",
    )
    if s.is_square:
        eye = torch.eye(rows, dtype=torch.float64)
        for delta in (c, s.vector(rows, 34)):
            _compare(
                s,
                lambda v, d: s.A.add_diagonal(d).quadratic_form(v),
                lambda v, d: v @ (s.M + d * eye) @ v,
                [v, delta],
                (s.norm + float(delta.norm())) * float(v.norm()) * max(1.0, float(v.norm())),
                "vᵀ(A + δ)v",
            )


def gradients_of_solves_and_determinants(s: Subject) -> None:
    """d/db, d/dδ, d/dc of `Σ w (cA + δ)⁻¹b` and of `log det (cA + δ)`, δ a number and a vector."""
    if not s.is_square or not s.has_transpose():
        return
    size = len(s.M)
    b, w = s.vector(size, 35), s.vector(size, 36).cpu().double()
    eye = torch.eye(size, dtype=torch.float64)
    c = torch.tensor(1.5, dtype=s.A.dtype, device=s.A.device)
    # A shift that makes any operator well conditioned, so that rounding cannot excuse a wrong gradient.
    shift = 2.0 * max(s.norm, 1e-3)
    for delta in (torch.tensor(shift), shift * (1.0 + s.vector(size, 37).abs())):
        delta = delta.to(s.A.device, s.A.dtype)

        def damped(c: Tensor, d: Tensor) -> LinearOperator:
            return (c * s.A).add_diagonal(d)

        def solved(b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return w.to(b.device, b.dtype) @ damped(c, d).solve(b)

        _, report = damped(c, delta).solve(b, return_report=True)
        slack = 100.0 + (10 * SOLVE_RTOL[s.A.dtype] / s.rtol if report.iterations else 0.0)
        scale = float(w.norm()) / s.norm * max(1.0, float(b.norm()) * (1.0 + 1.0 / s.norm))
        _compare(
            s,
            solved,
            lambda b, c, d: w @ torch.linalg.solve(c * s.M + d * eye, b),
            [b, c, delta],
            scale,
            "wᵀ(cA + δ)⁻¹b",
            slack,
        )
        if s.A.is_symmetric:
            _compare(
                s, lambda c, d: damped(c, d).logdet(), lambda c, d: torch.logdet(c * s.M + d * eye), [c, delta],
                size * (1.0 + 1.0 / s.norm), "log det (cA + δ)", 100.0,
            )  # fmt: skip


def _compare(
    s: Subject,
    ours: Scalars,
    dense: Scalars,
    arguments: Sequence[Tensor],
    scale: float,
    what: str,
    slack: float = 10.0,
) -> None:
    mine = [a.detach().clone().requires_grad_() for a in arguments]
    theirs = [a.detach().cpu().double().requires_grad_() for a in arguments]
    value = ours(*mine)
    got = torch.autograd.grad(value, mine, allow_unused=True) if value.requires_grad else [None] * len(mine)
    expected = torch.autograd.grad(dense(*theirs), theirs)
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        reached = torch.zeros_like(e) if g is None else g  # autograd's way of saying zero, for the matrix to confirm
        s.close(reached, e, scale * len(e.reshape(-1)) ** 0.5, f"gradient of {what} in argument {index}", slack)


LAWS = (gradients_of_products, gradients_of_solves_and_determinants)
