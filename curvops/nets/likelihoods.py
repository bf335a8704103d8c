"""The likelihoods, and `resolve`: from what a user writes ("classification", a torch loss, an enum) to one of them.

`Likelihood` says what each answers, and on which scale (sum over the data of −log p, without constants).
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from curvops.errors import DataError, ShapeError, UnsupportedError
from curvops.nets import draws
from curvops.nets.categorical import Categorical, check_weight
from curvops.nets.likelihood import Likelihood, addressed, columns_last
from curvops.nets.lossfunction import LossLikelihood

__all__ = ["Bernoulli", "Categorical", "Likelihood", "LossLikelihood", "Normal", "resolve"]


class Normal(Likelihood):
    """p(y | f) = N(y; f, σ² I): loss ½ Σ (f − y)²/σ², Λ = I/σ².

    Args:
        sigma: Standard deviation of the observation noise, the same for every output.
    """

    name = "regression"

    def __init__(self, sigma: float = 1.0) -> None:
        sigma = float(sigma)
        if not (math.isfinite(sigma) and sigma > 0):
            raise DataError(f"sigma is {sigma}; expected a positive standard deviation.")
        self.sigma = sigma

    @property
    def lossfunc(self) -> nn.MSELoss:
        """`nn.MSELoss(reduction="sum")`, which is 2σ² times −log p."""
        return nn.MSELoss(reduction="sum")

    @property
    def factor(self) -> float:
        """1/(2σ²): ½ for σ = 1."""
        return 0.5 / self.sigma**2

    def loss(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, ""]:
        """½ Σ (f − y)²/σ². O(f)."""
        self.check_shapes(f, y)
        return self.factor * F.mse_loss(f, y, reduction="sum")

    def gradient(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C"]:
        """(f − y)/σ². O(f)."""
        self.check_shapes(f, y)
        return (f - y) / self.sigma**2

    def output_hessian_product(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], U: Float[Tensor, "*_"]
    ) -> Float[Tensor, "*_"]:
        """U/σ². O(U)."""
        self.check_shapes(f, y)
        columns_last(U, f)
        return U / self.sigma**2

    def output_hessian_sqrt(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C C"]:
        """I/σ, a read-only view that repeats one C x C matrix. O(C²)."""
        self.check_shapes(f, y)
        C = f.shape[-1]
        return (torch.eye(C, dtype=f.dtype, device=f.device) / self.sigma).expand(*f.shape, C)

    def output_hessian_sqrt_through(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], W: Float[Tensor, "d C"]
    ) -> Float[Tensor, "*batch d C"]:
        """W/σ, a read-only view that repeats one matrix. O(W)."""
        self.check_shapes(f, y)
        return (W / self.sigma).expand(*f.shape[:-1], *W.shape)

    def output_hessian_sum(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "C C"]:
        """n I/σ². O(C²)."""
        self.check_shapes(f, y)
        C = f.shape[-1]
        return torch.eye(C, dtype=f.dtype, device=f.device) * (f.shape[:-1].numel() / self.sigma**2)

    def pseudo_gradients_at(
        self,
        f: Float[Tensor, "*batch C"],
        y: Shaped[Tensor, "*_"],
        *,
        seed: int,
        position: int | Int64[Tensor, " B"],
        sample: int,
    ) -> Float[Tensor, "*batch C"]:
        """ε/σ, ε ~ N(0, I). O(f)."""
        self.check_shapes(f, y)
        return addressed(draws.gaussians, f, f.shape[-1], seed, position, sample).to(f.dtype) / self.sigma

    def log_normaliser(self, n: int, C: int) -> float:
        """½ n C log(2πσ²)."""
        return 0.5 * n * C * math.log(2 * math.pi * self.sigma**2)

    def _arguments(self) -> dict[str, Any]:
        return {"sigma": self.sigma}


class Bernoulli(Likelihood):
    """p(y = 1 | f) = σ(f) for each output on its own; targets in [0, 1] of f's shape and dtype.

    With s = w (1 − y + c y), c = `pos_weight`, w = `weight`: gradient w (1 − y) σ(f) − w c y σ(−f), Λ = s σ(f) σ(−f).

    Args:
        pos_weight: `(C,)` or `(1,)` factors on the positive targets' terms, as in `nn.BCEWithLogitsLoss`; copied.
        weight: `(C,)` or `(1,)` factors per output; copied.
    """

    name = "binary"

    def __init__(self, pos_weight: Tensor | None = None, weight: Tensor | None = None) -> None:
        self.pos_weight = None if pos_weight is None else check_weight(pos_weight, "pos_weight", "(C,) or (1,)")
        self.weight = None if weight is None else check_weight(weight, "weight", "(C,) or (1,)")

    @property
    def lossfunc(self) -> nn.BCEWithLogitsLoss:
        """`nn.BCEWithLogitsLoss(reduction="sum")` with these weights."""
        return nn.BCEWithLogitsLoss(self.weight, reduction="sum", pos_weight=self.pos_weight)

    def loss(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, ""]:
        """Σ binary cross-entropy with logits. O(f)."""
        self.check_shapes(f, y)
        w, c = self._weights(f)
        return F.binary_cross_entropy_with_logits(f, y, w, reduction="sum", pos_weight=c)

    def gradient(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C"]:
        """w (1 − y) σ(f) − w c y σ(−f); σ(f) − y without weights, and without its cancellation. O(f)."""
        self.check_shapes(f, y)
        w, c = (1.0 if t is None else t for t in self._weights(f))
        return w * ((1 - y) * f.sigmoid() - c * y * (-f).sigmoid())

    def output_hessian_product(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], U: Float[Tensor, "*_"]
    ) -> Float[Tensor, "*_"]:
        """s σ(f) σ(−f) U, entry by entry. O(U)."""
        self.check_shapes(f, y)
        V = columns_last(U, f)
        return (self._variance(f, y).unsqueeze(-1) * V).reshape(U.shape)

    def output_hessian_sqrt(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C C"]:
        """diag √(s σ(f) σ(−f)). O(f·C)."""
        self.check_shapes(f, y)
        return torch.diag_embed(self._variance(f, y).sqrt())

    def output_hessian_sqrt_through(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], W: Float[Tensor, "d C"]
    ) -> Float[Tensor, "*batch d C"]:
        """W diag √(s σ(f) σ(−f)). O(f·d)."""
        self.check_shapes(f, y)
        return W * self._variance(f, y).sqrt().unsqueeze(-2)

    def output_hessian_sum(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "C C"]:
        """diag Σ s σ(f) σ(−f). O(f + C²)."""
        self.check_shapes(f, y)
        return torch.diag(self._variance(f, y).flatten(0, -2).sum(0))

    def pseudo_gradients_at(
        self,
        f: Float[Tensor, "*batch C"],
        y: Shaped[Tensor, "*_"],
        *,
        seed: int,
        position: int | Int64[Tensor, " B"],
        sample: int,
    ) -> Float[Tensor, "*batch C"]:
        """√s (σ(f) − ŷ), ŷ ~ Bernoulli(σ(f)), s of the observed target. O(f)."""
        self.check_shapes(f, y)
        uniform = addressed(draws.uniforms, f, f.shape[-1], seed, position, sample)
        drawn = uniform < f.to(uniform.dtype).sigmoid()
        return self._scale(f, y).sqrt() * torch.where(drawn, -(-f).sigmoid(), f.sigmoid())

    def _weights(self, f: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w = None if self.weight is None else self.weight.to(f)
        c = None if self.pos_weight is None else self.pos_weight.to(f)
        return w, c

    def _scale(self, f: Tensor, y: Tensor) -> Tensor:
        w, c = self._weights(f)
        s = torch.ones_like(f) if c is None else 1 - y + c * y
        return s if w is None else w * s

    def _variance(self, f: Tensor, y: Tensor) -> Tensor:
        return self._scale(f, y) * f.sigmoid() * (-f).sigmoid()

    def _check_target_shape(self, f: Tensor, y: Tensor) -> None:
        super()._check_target_shape(f, y)
        for what, t in (("pos_weight", self.pos_weight), ("weight", self.weight)):
            if t is not None and t.shape[0] not in (1, f.shape[-1]):
                raise ShapeError(
                    f"The likelihood's {what} has {t.shape[0]} entries, the network {f.shape[-1]} outputs."
                )

    def _check_values(self, f: Tensor, y: Tensor) -> None:
        if bool(((y < 0) | (y > 1)).any()):
            raise DataError(
                f"Binary targets reach from {float(y.min()):.4g} to {float(y.max()):.4g}; expected values in [0, 1] "
                "(for labels −1 and 1: y = (y + 1) / 2)."
            )

    def _arguments(self) -> dict[str, Any]:
        return {"pos_weight": self.pos_weight, "weight": self.weight}


_BY_NAME: dict[str, type[Likelihood]] = {"regression": Normal, "classification": Categorical, "binary": Bernoulli}
_KNOWN = (
    'Known are "regression", "classification", "binary"; nn.MSELoss, nn.CrossEntropyLoss and nn.BCEWithLogitsLoss with '
    'reduction="sum"; and curvops.likelihoods.Normal(sigma), Categorical(weight, ignore_index, label_smoothing), '
    "Bernoulli(pos_weight), Likelihood.from_loss(fn)."
)


def resolve(likelihood: Any) -> Likelihood:
    """The `Likelihood` that a user's argument means.

    Args:
        likelihood: A `Likelihood`; "regression", "classification" or "binary"; an enum with such a value; or
            `nn.MSELoss`, `nn.CrossEntropyLoss`, `nn.BCEWithLogitsLoss` with `reduction="sum"`, whose weights,
            `ignore_index` and `label_smoothing` are honoured. `nn.MSELoss` means `Normal(1)`: the curvature is that of
            ½ Σ (f − y)², as in laplace-torch.

    Raises:
        UnsupportedError: "reward_modeling", a torch loss with another reduction, or a subclass of a torch loss.
        DataError: Anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, Enum):
        return resolve(likelihood.value)
    if isinstance(likelihood, nn.Module):
        return _from_module(likelihood)
    if isinstance(likelihood, str) and likelihood in _BY_NAME:
        return _BY_NAME[likelihood]()
    if likelihood == "reward_modeling":
        raise UnsupportedError(
            'The likelihood "reward_modeling" trains on pairs, and its posterior is that of a regression of one reward '
            'per datum: use "regression" for the curvature, or Likelihood.from_loss(fn) for the pairwise loss.'
        )
    raise DataError(f"The likelihood is {likelihood!r}. {_KNOWN}")


def _from_module(loss: nn.Module) -> Likelihood:
    known = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
    cls = next((c for c in known if isinstance(loss, c)), None)
    if cls is None:
        raise DataError(f"The likelihood is the module {type(loss).__name__}. {_KNOWN}")
    if type(loss).forward is not cls.forward:
        raise UnsupportedError(
            f"{type(loss).__name__} redefines {cls.__name__}.forward, so its curvature is not that of {cls.__name__}; "
            "use Likelihood.from_loss(loss)."
        )
    if loss.reduction != "sum":
        reason = (
            "averages over the batch (and over class weights or positions)"
            if loss.reduction == "mean"
            else ("returns one number per datum")
        )
        raise UnsupportedError(
            f'{cls.__name__} has reduction="{loss.reduction}", which {reason}: its curvature would depend on the batch '
            f'size and not add up over batches. Use {cls.__name__}(reduction="sum") and divide the operator by N '
            "yourself where a mean is wanted."
        )
    if isinstance(loss, nn.MSELoss):
        return Normal()
    if isinstance(loss, nn.CrossEntropyLoss):
        return Categorical(loss.weight, loss.ignore_index, loss.label_smoothing)
    assert isinstance(loss, nn.BCEWithLogitsLoss)
    return Bernoulli(loss.pos_weight, loss.weight)
