"""The softmax likelihood, with the class weights, ignored targets and label smoothing of `nn.CrossEntropyLoss`.

With target weights t_c = (1−ε) w_y [c = y] + (ε/C) w_c, as torch smooths, and their sum s:
−log p = −Σ_c t_c log p_c, gradient s p − t, Λ = s (diag p − p pᵀ); all zero where y is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from curvops.errors import DataError, ShapeError
from curvops.nets import draws
from curvops.nets.likelihood import Likelihood, addressed, columns_last, require_finite


class Categorical(Likelihood):
    """p(y | f) = softmax(f)_y for integer targets, summed over data and positions.

    Args:
        weight: `(C,)` non-negative class weights; copied. Λ and −log p carry the weight of the observed label once, the
            empirical Fisher twice.
        ignore_index: Targets of this value contribute nothing.
        label_smoothing: ε in [0, 1], torch's definition: a share ε of the target is spread over the classes, each
            entry multiplied by its class's weight.
    """

    name = "classification"

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if weight is not None:
            weight = check_weight(weight, "weight", "(C,), one per class")
        if not 0.0 <= label_smoothing <= 1.0:
            raise DataError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1].")
        self.weight = weight
        self.ignore_index = int(ignore_index)
        self.label_smoothing = float(label_smoothing)

    @property
    def lossfunc(self) -> nn.CrossEntropyLoss:
        """`nn.CrossEntropyLoss(reduction="sum")` with these arguments; it wants `(B, C, T)` for sequences."""
        return nn.CrossEntropyLoss(
            self.weight, ignore_index=self.ignore_index, reduction="sum", label_smoothing=self.label_smoothing
        )

    def loss(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, ""]:
        """Σ w_y · cross-entropy, smoothed if asked for. O(f)."""
        self.check_shapes(f, y)
        return F.cross_entropy(
            f.reshape(-1, f.shape[-1]),
            y.reshape(-1).long(),
            self._weight(f),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def gradient(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C"]:
        """s p − t. O(f)."""
        self.check_shapes(f, y)
        p, labels = f.softmax(-1), self._labels(f, y)
        g = _minus_one_hot(p, labels) * self._label_weight(f, labels).unsqueeze(-1)
        if self.label_smoothing:
            weight = self._weight(f)
            w = f.new_ones(f.shape[-1]) if weight is None else weight
            g = (1 - self.label_smoothing) * g + self.label_smoothing * (w.mean() * p - w / f.shape[-1])
        return g * self.active(f, y).unsqueeze(-1)

    def output_hessian_product(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], U: Float[Tensor, "*_"]
    ) -> Float[Tensor, "*_"]:
        """s (diag p − p pᵀ) U. O(U)."""
        return self.output_hessian_map(f, y)(U)

    def output_hessian_map(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]
    ) -> Callable[[Float[Tensor, "*_"]], Float[Tensor, "*_"]]:
        """`U → s (diag p − p pᵀ) U`; p, which costs more than a product with few columns, is computed once. O(f)."""
        self.check_shapes(f, y)
        p = f.softmax(-1).unsqueeze(-1)
        top = p.argmax(-2, keepdim=True)
        weighted = self._scale(f, y)[..., None, None] * p

        def product(U: Tensor) -> Tensor:
            V = columns_last(U, f)
            # Λ 1 = 0, so a shift of u is free. Measured from the likeliest class, p∘(u − ⟨p, u⟩) no longer cancels
            # when that class has p ≈ 1, which is where trained networks live.
            V = V - V.gather(-2, top.expand(*p.shape[:-2], 1, V.shape[-1]))
            return (weighted * (V - (p * V).sum(-2, keepdim=True))).reshape(U.shape)

        return product

    def output_hessian_sqrt(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "*batch C R"]:
        """√s (diag √p − p√pᵀ) Q, R = C − 1, with Q the complement of √p by one Householder reflection. O(f·C).

        As √pᵀQ = 0 this is √s · diag(√p) Q, and reflecting r = √p to −e₀ gives Q_ij = [i = j] − u_i r_j / (1 + r₀) with
        u = r + e₀, j ≥ 1: nothing larger than L itself is formed, and no entry is a difference of near numbers.
        """
        self.check_shapes(f, y)
        p, complement = softmax_and_complement(f)
        r = p.sqrt()
        r0, rest = r[..., :1], r[..., 1:]
        # Entry (i, i): 1 − p_i / (1 + r₀), with 1 − p_i taken from the complement, which is accurate near p_i = 1.
        u = torch.cat([r0 + 1, rest], -1)
        L = -(r * u / (1 + r0)).unsqueeze(-1) * rest.unsqueeze(-2)
        diagonal = rest * (r0 + complement[..., 1:]) / (1 + r0)
        L.diagonal(-1, -2, -1).copy_(diagonal)
        return L * self._scale(f, y).sqrt()[..., None, None]

    def output_hessian_sqrt_through(
        self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"], W: Float[Tensor, "d C"]
    ) -> Float[Tensor, "*batch d C"]:
        """√s (W − W p 1ᵀ) diag √p, of C columns: Σ_c p_c (w_c − w̄)(w_c − w̄)ᵀ = W (diag p − p pᵀ) Wᵀ. O(f·d)."""
        self.check_shapes(f, y)
        p = f.softmax(-1)
        # Measured from the likeliest class, as in `output_hessian_map`: neither difference cancels where p ≈ 1.
        V = W - W.T[p.argmax(-1)].unsqueeze(-1)
        V -= V @ p.unsqueeze(-1)
        return V.mul_((self._scale(f, y).unsqueeze(-1) * p).sqrt_().unsqueeze(-2))

    def output_hessian_sum(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Float[Tensor, "C C"]:
        """diag(Σ s p) − Σ s p pᵀ, whose diagonal is summed from s p (1 − p). O(f·C)."""
        self.check_shapes(f, y)
        p, complement = softmax_and_complement(f)
        s = self._scale(f, y).unsqueeze(-1)
        q = (s.sqrt() * p).flatten(0, -2)
        total = -(q.T @ q)
        total.diagonal().copy_((s * p * complement).flatten(0, -2).sum(0))
        return (total + total.mT) / 2  # products are symmetric up to rounding

    def rank(self, C: int) -> int:
        """C − 1: a softmax does not see a common shift of its inputs."""
        return C - 1

    def active(self, f: Float[Tensor, "*batch C"], y: Shaped[Tensor, "*_"]) -> Bool[Tensor, "*batch"]:
        """False where y is `ignore_index`."""
        return y != self.ignore_index

    def pseudo_gradients_at(
        self,
        f: Float[Tensor, "*batch C"],
        y: Shaped[Tensor, "*_"],
        *,
        seed: int,
        position: int | Int[Tensor, " B"],
        sample: int,
    ) -> Float[Tensor, "*batch C"]:
        """√s (p − e_ŷ), ŷ ~ p, s of the *observed* label, so that the outer products average to Λ. O(f)."""
        self.check_shapes(f, y)
        # Not `softmax`, which takes rows of a few classes one by one: a third of the time for ten.
        odds = (f - f.amax(-1, keepdim=True)).exp_()
        uniform = addressed(draws.uniforms, f, 1, seed, position, sample)
        cumulative = odds.to(uniform.dtype).cumsum(-1).contiguous()
        total = cumulative[..., -1:]
        # 0 < u·total ≤ total, and the first place that reaches it has p > 0: no class of probability 0 is drawn.
        drawn = torch.searchsorted(cumulative, (uniform * total).contiguous()).squeeze(-1)
        g = _minus_one_hot(odds / total.to(f.dtype), drawn)
        # Without weights √s is 1 or 0: whether the target counts.
        root = self.active(f, y) if self.weight is None else self._scale(f, y).sqrt()
        return g * root.unsqueeze(-1)

    # ---- weights and labels -------------------------------------------------------------------------------------

    def _weight(self, f: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(f)

    def _labels(self, f: Tensor, y: Tensor) -> Tensor:
        """y as indices; ignored targets point at class 0, where `active` removes them."""
        return torch.where(self.active(f, y), y, 0).long()

    def _label_weight(self, f: Tensor, labels: Tensor) -> Tensor:
        weight = self._weight(f)
        return torch.ones_like(labels, dtype=f.dtype) if weight is None else weight[labels]

    def _scale(self, f: Tensor, y: Tensor) -> Tensor:
        """s: the total target weight of each datum and position, 0 where ignored."""
        weight, active = self._weight(f), self.active(f, y)
        if weight is None:  # smoothed or not, the targets sum to one
            return active.to(f.dtype)
        s = weight[self._labels(f, y)]
        if self.label_smoothing:
            s = (1 - self.label_smoothing) * s + self.label_smoothing * weight.mean()
        return s * active

    # ---- what is refused ----------------------------------------------------------------------------------------

    def _check_target_shape(self, f: Tensor, y: Tensor) -> None:
        C = f.shape[-1]
        if y.is_floating_point() or y.dtype == torch.bool or y.is_complex():
            way_out = "use y.long()"
            if y.shape == f.shape:
                way_out = (
                    "for class probabilities use Likelihood.from_loss(lambda f, y: "
                    'F.cross_entropy(f, y, reduction="sum"), is_convex=True); for one-hot targets y.argmax(-1)'
                )
            raise ShapeError(
                f"Classification targets are {y.dtype} of shape {tuple(y.shape)}; expected integers: {way_out}."
            )
        if y.shape != f.shape[:-1]:
            hint = " Use y.squeeze(-1)." if tuple(y.shape) == (*f.shape[:-1], 1) else ""
            raise ShapeError(
                f"Classification targets have shape {tuple(y.shape)}; the network's outputs {tuple(f.shape)} need "
                f"{tuple(f.shape[:-1])}, one label per datum and position.{hint}"
            )
        if C < 2:
            raise ShapeError(
                "The network has one output, and a softmax over one class has no curvature; "
                'for a single logit use the likelihood "binary".'
            )
        if self.weight is not None and self.weight.shape[0] != C:
            raise ShapeError(f"The likelihood has {self.weight.shape[0]} class weights, the network {C} outputs.")

    def _check_values(self, f: Tensor, y: Tensor) -> None:
        C = f.shape[-1]
        if y.numel():
            least, most = torch.aminmax(y)
            if least >= 0 and most < C:
                return
        bad = ((y < 0) | (y >= C)) & self.active(f, y)
        if bool(bad.any()):
            raise DataError(
                f"Classification targets reach from {int(y[bad].min())} to {int(y[bad].max())} outside 0 … {C - 1} "
                f"({int(bad.sum())} of {y.numel()}, the first at index {tuple(bad.nonzero()[0].tolist())}); expected "
                f"a class of the network's {C} outputs, or ignore_index={self.ignore_index}."
            )

    def _arguments(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": None if self.ignore_index == -100 else self.ignore_index,
            "label_smoothing": self.label_smoothing or None,
        }


def softmax_and_complement(f: Float[Tensor, "*batch C"]) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch C"]]:
    """p and 1 − p, the latter by summing the other classes where p is largest: accurate relative to itself. O(f)."""
    p = f.softmax(-1)
    top = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, top, 0).sum(-1, keepdim=True)
    return p, (1 - p).scatter(-1, top, others)


def check_weight(weight: Shaped[Tensor, "*_"], what: str, expected: str) -> Tensor:
    """A private copy of 1-dim weights, refused where they would break convexity."""
    if weight.dim() != 1:
        raise ShapeError(f"{what} has shape {tuple(weight.shape)}; expected {expected}.")
    require_finite(weight, f"The entries of {what}")
    if bool((weight < 0).any()):
        raise DataError(f"{what} has negative entries (least {float(weight.min()):.3g}); the loss would not be convex.")
    return weight.detach().clone()


def _minus_one_hot(p: Tensor, labels: Tensor) -> Tensor:
    """p − e_label, with 1 − p at the label summed over the other classes, which is accurate near p = 1."""
    index = labels.unsqueeze(-1)
    others = p.scatter(-1, index, 0)
    return others.scatter_(-1, index, -others.sum(-1, keepdim=True))
