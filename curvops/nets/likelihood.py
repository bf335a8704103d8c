"""What every likelihood answers: the loss at a network's output, its gradient, its Hessian and a square root of it.

Scale, stated once for the whole library: everything is a **sum over the data** (and the positions of a sequence) of
−log p(y | f) without constants; never a mean, never a hidden 1/N. What the constants are, `log_normaliser` says.

Shapes: f is `(B, C)` or `(B, T, C)`; Λ = ∂²(−log p)/∂f² is block-diagonal, one C x C block per datum and position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.nets import draws


class Likelihood(ABC):
    """p(y | f) as the curvature needs it. Subclasses: `Normal`, `Categorical`, `Bernoulli`, and `from_loss`.

    The methods check shapes, dtypes and devices, which costs nothing; `check` also reads the values.

    Attributes:
        name: "regression", "classification", "binary" or "custom"; what `repr` of an operator shows.
        is_convex: Whether Λ is positive semi-definite for every f and y. If not, there is no square root and no
            lower bound on the spectrum of the GGN.
    """

    name: ClassVar[str] | str
    is_convex: bool = True

    # ---- the loss as other libraries see it -------------------------------------------------------------------

    @property
    @abstractmethod
    def lossfunc(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss in PyTorch's own scale, `reduction="sum"`; `factor · lossfunc(f, y) = loss(f, y)`."""

    @property
    def factor(self) -> float:
        """Scale between `lossfunc` and −log p: 1/(2σ²) for the squared error, else 1."""
        return 1.0

    # ---- the calculus ------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, ""]:
        """Σ −log p(y | f) without constants, 0-dim, summed over data and positions; differentiable in f. O(f)."""

    @abstractmethod
    def gradient(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C"]:
        """∂loss/∂f: the residual of each datum and position, in f's shape. Their outer products make the EF. O(f)."""

    @abstractmethod
    def output_hessian_product(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], U: Float[Tensor, "*_"]
    ) -> Float[Tensor, "*_"]:
        """Λ U without forming Λ.

        Args:
            f: `(B, C)` or `(B, T, C)`.
            y: Targets.
            U: f's shape, or f's shape with K columns behind it.

        Returns:
            Of U's shape. O(U) for the closed forms.
        """

    def output_hessian_map(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]
    ) -> Callable[[Float[Tensor, "*_"]], Float[Tensor, "*_"]]:
        """`U → Λ U` at fixed outputs, for many products: a subclass computes once what does not depend on U."""
        return lambda U: self.output_hessian_product(f, y, U)

    @abstractmethod
    def output_hessian_sqrt(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C R"]:
        """L with Λ = L Lᵀ for each datum and position, R = `rank(C)` columns. Needs `is_convex`. O(f·R)."""

    def output_hessian(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C C"]:
        """Λ itself, one C x C block per datum and position. O(f·C)."""
        C = f.shape[-1]
        return self.output_hessian_product(f, y, torch.eye(C, dtype=f.dtype, device=f.device).expand(*f.shape, C))

    def output_hessian_sqrt_through(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], W: Float[Tensor, "d C"]
    ) -> Float[Tensor, "*batch d R"]:
        """W L with Λ = L Lᵀ for each datum and position: a root of W Λ Wᵀ. L and its number of columns are at the
        likelihood's choice. Needs `is_convex`. O(f·d) for the closed forms.
        """
        return W @ self.output_hessian_sqrt(f, y)

    def output_hessian_sum(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "C C"]:
        """Σ Λ over data and positions. O(f·C)."""
        total = self.output_hessian(f, y).flatten(0, -3).sum(0)
        return (total + total.mT) / 2

    def rank(self, C: int) -> int:
        """Columns R of `output_hessian_sqrt`."""
        return C

    def active(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Bool[Tensor, "*batch"]:
        """True where a datum or position counts; False at ignored targets, whose loss and curvature are zero."""
        return torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device)

    def log_normaliser(self, n: int, C: int) -> float:
        """The constants that `loss` leaves out of Σ −log p, for n data (or positions) of C outputs."""
        return 0.0

    # ---- Monte Carlo --------------------------------------------------------------------------------------------

    def pseudo_gradients(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], generator: torch.Generator
    ) -> Float[Tensor, "*batch C"]:
        """One draw g per datum and position with E g gᵀ = Λ (MC Fisher; Kunstner et al. 2019).

        Args:
            f: `(B, C)` or `(B, T, C)`.
            y: The observed targets: their weights and ignored positions enter, the labels themselves do not.
            generator: Gives one 63-bit seed per call and so advances; may live on any device.

        Returns:
            Of f's shape. O(f).
        """
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        return self.pseudo_gradients_at(f, y, seed=seed, position=0, sample=0)

    def pseudo_gradients_at(
        self,
        f: Float[Tensor, "*batch C"],
        y: Shaped[Tensor, "*_"],
        *,
        seed: int,
        position: int | Int64[Tensor, " B"],
        sample: int,
    ) -> Float[Tensor, "*batch C"]:
        """`pseudo_gradients` whose draw for datum i depends on `(seed, position + i, sample)` alone.

        Args:
            f: `(B, C)` or `(B, T, C)`.
            y: The observed targets.
            seed: The operator's seed.
            position: Data seen before this batch, or `(B,)` positions of its data.
            sample: Number of the Monte-Carlo sample.

        Returns:
            Of f's shape. By default L ε with Gaussian ε, whose outer products average to Λ; O(f·R).
        """
        L = self.output_hessian_sqrt(f, y)
        eps = addressed(draws.gaussians, f, L.shape[-1], seed, position, sample).to(f.dtype)
        return (L @ eps.unsqueeze(-1)).squeeze(-1)

    # ---- what is refused ----------------------------------------------------------------------------------------

    def check(self, f: Shaped[Tensor, "*_"], y: Shaped[Tensor, "*_"]) -> None:
        """Refuse outputs and targets that cannot carry a curvature; reads every value once. O(f).

        Raises:
            ShapeError: Shape, dtype or device of y does not belong to f.
            DataError: NaN or Inf in f or y, or targets outside their range.
        """
        self.check_shapes(f, y)
        require_finite(f, "The network's outputs")
        self.check_targets(f, y)

    def check_targets(self, f: Shaped[Tensor, "*_"], y: Shaped[Tensor, "*_"]) -> None:
        """The part of `check` that reads the targets, which have the right shape. O(y)."""
        if y.is_floating_point():
            require_finite(y, "The targets")
        self._check_values(f, y)

    def check_shapes(self, f: Shaped[Tensor, "*_"], y: Shaped[Tensor, "*_"]) -> None:
        """The part of `check` that reads no values: shapes, dtypes and devices. O(1)."""
        if f.dim() not in (2, 3):
            raise ShapeError(
                f"The network's outputs have shape {tuple(f.shape)}; expected (B, C), or (B, T, C) for sequences. "
                "A model with one output per datum returns (B, 1): end it with .unsqueeze(-1)."
            )
        if not f.is_floating_point():
            raise ShapeError(f"The network's outputs are {f.dtype}; expected a real floating dtype.")
        if y.device != f.device:
            raise ShapeError(f"The targets are on {y.device}, the network's outputs on {f.device}; move one of them.")
        self._check_target_shape(f, y)

    def _check_target_shape(self, f: Tensor, y: Tensor) -> None:
        """Regression and binary: y is compared with f entry by entry, so nothing may broadcast."""
        if y.shape != f.shape:
            hint = ""
            if (*y.shape, 1) == tuple(f.shape):
                hint = f" As they stand they would broadcast to {tuple(torch.broadcast_shapes(y.shape, f.shape))}, and "
                hint += "every target would meet every output: use y.unsqueeze(-1)."
            raise ShapeError(
                f"The targets of a {self.name} likelihood have shape {tuple(y.shape)}, the network's outputs "
                f"{tuple(f.shape)}; expected exactly the same shape.{hint}"
            )
        if y.dtype != f.dtype:
            raise ShapeError(
                f"The targets of a {self.name} likelihood are {y.dtype}, the network's outputs {f.dtype}; "
                f"expected the same dtype: use y.to({f.dtype})."
            )

    def _check_values(self, f: Tensor, y: Tensor) -> None:  # noqa: B027  (a hook: most likelihoods take any number)
        """What a subclass demands of the targets' values, beyond being finite."""

    # ---- from a loss function ---------------------------------------------------------------------------------------

    @staticmethod
    def from_loss(fn: Callable[[Tensor, Tensor], Tensor], is_convex: bool = False, name: str = "custom") -> Likelihood:
        """A likelihood whose −log p is any function of (f, y), differentiated by autograd.

        Args:
            fn: `(f, y) → 0-dim`, twice differentiable in f and a *sum* over the data.
            is_convex: Promise that fn is convex in f; allows the square root, and with it everything that rests on
                Λ = L Lᵀ. The promise is checked on every Λ that is factorised.
            name: What `repr` of an operator shows.
        """
        from curvops.nets.lossfunction import LossLikelihood  # the subclass knows its base, so not at import

        return LossLikelihood(fn, is_convex=is_convex, name=name)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={_short(value)}" for key, value in self._arguments().items() if value is not None)
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        """Constructor arguments that `repr` shows; None is left out."""
        return {}


def require_finite(t: Tensor, what: str) -> None:
    """Raise `DataError` with the count and first place of NaN or Inf in `t`. O(t), one synchronisation."""
    # A finite sum has finite terms, and is had in a tenth of the time; one that overflowed says nothing.
    if t.dtype in (torch.float32, torch.float64) and math.isfinite(t.detach().sum()):
        return
    bad = ~torch.isfinite(t)
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise DataError(f"{what} contain {int(bad.sum())} NaN or Inf of {t.numel()}, the first at index {first}.")


def columns_last(U: Tensor, f: Tensor) -> Tensor:
    """U as `(*f.shape, K)`, whether it came with columns or without.

    Raises:
        ShapeError: U is neither of f's shape nor of f's shape with columns.
    """
    if U.shape == f.shape:
        return U.unsqueeze(-1)
    if U.shape[:-1] == f.shape:
        return U
    raise ShapeError(
        f"U has shape {tuple(U.shape)}; expected the outputs' shape {tuple(f.shape)}, or that with K columns behind it."
    )


def addressed(
    kind: Callable[..., Tensor], f: Tensor, count: int, seed: int, position: int | Tensor, sample: int
) -> Tensor:
    """`(*batch, count)` numbers of `draws`; the positions of a sequence are coordinates of their datum's address."""
    B = f.shape[0]
    if isinstance(position, Tensor):
        if position.shape != (B,):
            raise ShapeError(f"position has shape {tuple(position.shape)}; expected an integer or ({B},).")
        positions = position.to(device="cpu", dtype=torch.int64)
    else:
        positions = torch.arange(position, position + B, device="cpu")
    per_datum = f.shape[1:-1].numel() * count
    return kind(seed, positions, sample, per_datum, device=f.device).reshape(*f.shape[:-1], count)


def _short(value: Any) -> str:
    return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
