"""A likelihood from any differentiable loss, its curvature at the outputs by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvops.errors import NotPositiveDefiniteError, ShapeError, UnsupportedError
from curvops.nets import draws
from curvops.nets.likelihood import Likelihood, addressed, columns_last


class LossLikelihood(Likelihood):
    """What `Likelihood.from_loss` returns: −log p(y | f) = fn(f, y), constants included as fn has them.

    Gradient and Hessian products are exact for any fn. The square root wants Λ block by block, which it reads off C
    products with unit vectors; that is right if fn is a sum over data and positions, and this is verified with one more
    product. Each product is one double backward through fn.
    """

    def __init__(
        self, fn: Callable[[Tensor, Tensor], Tensor], *, is_convex: bool = False, name: str = "custom"
    ) -> None:
        self._fn = fn
        self.is_convex = is_convex
        self.name = name

    @property
    def lossfunc(self) -> Callable[[Tensor, Tensor], Tensor]:
        """fn itself."""
        return self._fn

    def loss(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, ""]:
        """fn(f, y), which must be 0-dim."""
        self.check_shapes(f, y)
        value = self._fn(f, y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"The loss function returned {given}; expected a 0-dim tensor, the sum over the data.")
        return value

    def gradient(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C"]:
        """∂fn/∂f by one backward."""
        with torch.inference_mode(False), torch.enable_grad():
            _, g = self._graph(f, y, create_graph=False)
        return g

    def output_hessian_product(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], U: Float[Tensor, "*_"]
    ) -> Float[Tensor, "*_"]:
        """Λ U by one double backward per column; exact also where fn couples data or positions."""
        V = columns_last(U, f)
        with torch.inference_mode(False), torch.enable_grad():
            leaf, g = self._graph(f, y, create_graph=True)
            if not g.requires_grad:  # fn is linear in f
                return torch.zeros_like(U)
            V = _plain(V)
            columns = [_backward(g, leaf, V[..., k]) for k in range(V.shape[-1])]
        return torch.stack(columns, -1).reshape(U.shape) if columns else torch.zeros_like(U)

    def output_hessian_sqrt(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C R"]:
        """Λ^½ = Q diag(√λ) Qᵀ of each block, R = C; unlike Q diag(√λ) it is unique, so that batching changes nothing.

        Cost O(C) double backwards and O(f·C²).

        Raises:
            UnsupportedError: `is_convex` was not promised, or fn couples data or positions.
            NotPositiveDefiniteError: A block has a negative eigenvalue, so that fn is not convex.
        """
        if not self.is_convex:
            raise UnsupportedError(
                f"{self!r} is not known to be convex in the network's outputs, so Λ has no real square root. Use what "
                "needs only output_hessian_product (GGN and Hessian products, MINRES), or pass is_convex=True to "
                "Likelihood.from_loss if it is."
            )
        blocks = self.output_hessian(f, y)
        probe = addressed(draws.gaussians, f, f.shape[-1], 0, 0, 0).to(f.dtype)
        exact = self.output_hessian_product(f, y, probe)
        by_block = (blocks @ probe.unsqueeze(-1)).squeeze(-1)
        eps = torch.finfo(f.dtype).eps
        if not float((exact - by_block).norm()) <= eps**0.5 * float(blocks.norm() + exact.norm()):
            raise UnsupportedError(
                f"{self!r} couples the data or positions of a batch: its Hessian is not one {f.shape[-1]} x "
                f"{f.shape[-1]} block each, and has no square root of that form. Use what needs only "
                "output_hessian_product (GGN and Hessian products), or a loss that is a sum over data and positions."
            )
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
        floor = -100 * eps * f.shape[-1] * values.abs().amax(-1, keepdim=True)
        if bool((values < floor).any()):
            where = tuple((values < floor).any(-1).nonzero()[0].tolist())
            raise NotPositiveDefiniteError(
                f"{self!r} was promised convex, but its Hessian at datum {where} of the batch has the eigenvalue "
                f"{float(values[where].min()):.3g}. Build it with is_convex=False."
            )
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    def _graph(self, f: Tensor, y: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        """A private leaf of f's values, and ∂fn/∂f there."""
        leaf = _plain(f.detach()).requires_grad_()
        value = self.loss(leaf, _plain(y))
        if not value.requires_grad:
            raise UnsupportedError(f"{self!r} does not depend on the network's outputs differentiably.")
        (g,) = torch.autograd.grad(value, leaf, create_graph=create_graph)
        return leaf, g

    def _check_target_shape(self, f: Tensor, y: Tensor) -> None:
        """What y looks like is between fn and the user; only its batch has to be f's."""
        if y.dim() == 0 or y.shape[0] != f.shape[0]:
            raise ShapeError(f"The targets have shape {tuple(y.shape)}; expected {f.shape[0]} data in front, as in f.")

    def _arguments(self) -> dict[str, Any]:
        return {"name": self.name, "is_convex": self.is_convex}


def _backward(g: Tensor, leaf: Tensor, u: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(g, leaf, u, retain_graph=True, materialize_grads=True)
    return product.detach()


def _plain(t: Tensor) -> Tensor:
    """A tensor that autograd may save: inference tensors are copied, others are only viewed."""
    return t.clone() if t.is_inference() else t.detach()
