"""Kronecker factors from laplace-torch and to it.

laplace-torch keeps one entry of `Kron.kfacs` per parameter: `[B, A]` for `B ⊗ A`, `[H]` for a single matrix; a factor
that is a vector is a diagonal one. These are the blocks of `co.KFAC` in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import DataError, UnsupportedError
from curvops.interop.laplace import library
from curvops.memory import require
from curvops.operators.base import Layout, LinearOperator, Scalar, number
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.composites import Scaled, Sum
from curvops.operators.deferred import Deferred
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal, Identity, Zero, diagonal_of
from curvops.operators.eigen import Eigen
from curvops.operators.kronecker import Kronecker
from curvops.operators.lowrank import LowRank

# -------------------------------------------------------------------- Kronecker factors of laplace-torch


class Kron(library.Kron):
    """laplace-torch's `Kron`, whose products with a scalar keep the scalar's gradient.

    laplace-torch takes roots of a scalar by `math.pow`, so that the gradient of its evidence in `sigma_noise` misses
    the log-determinant. Sums and decompositions of this class are again of this kind.
    """

    def __add__(self, other: Any) -> Kron:
        return Kron(super().__add__(other).kfacs)

    def __mul__(self, scalar: Scalar) -> Kron:
        return Kron([[_root(scalar, len(F)) * factor for factor in F] for F in self.kfacs])

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """Eigenvectors and eigenvalues of every factor."""
        plain = super().decompose(damping)
        return KronDecomposed(plain.eigenvectors, plain.eigenvalues, plain.deltas, plain.damping)

    # Asked before `library.Kron.__add__` when the left operand is one: so that `plain + ours` is ours.
    __radd__, __rmul__ = __add__, __mul__


class KronDecomposed(library.KronDecomposed):
    """laplace-torch's `KronDecomposed`, whose products with a scalar keep the scalar's gradient."""

    def __add__(self, deltas: Tensor) -> KronDecomposed:
        plain = super().__add__(deltas)
        return KronDecomposed(plain.eigenvectors, plain.eigenvalues, plain.deltas, plain.damping)

    def __mul__(self, scalar: Scalar) -> KronDecomposed:
        eigenvalues = [[_root(scalar, len(ls)) * values for values in ls] for ls in self.eigenvalues]
        return KronDecomposed(self.eigenvectors, eigenvalues, self.deltas)  # without damping, as in laplace-torch

    __radd__, __rmul__ = __add__, __mul__


def _root(scalar: Scalar, order: int) -> Scalar:
    return scalar ** (1.0 / order)


# -------------------------------------------------------------------- to laplace-torch


def to_laplace_kron(operator: LinearOperator) -> Kron | KronDecomposed:
    """The factors of a block-diagonal operator as laplace-torch holds them; a deferred operator is computed. A copy.

    Args:
        operator: Block-diagonal over parameters: Kronecker products of two factors, dense or diagonal blocks, and
            multiples of such (the multiple goes to the first factor), e.g. `co.KFAC(…)`; each with a multiple of the
            identity or without.

    Returns:
        A `Kron`, or where a multiple of the identity was added to a block a `KronDecomposed`, which is the type of
        laplace-torch's posterior precisions.

    Raises:
        UnsupportedError: A block that laplace-torch cannot hold; named, with the way out.
    """
    kfacs, deltas = [], []
    for name, block in zip(_names(operator), _blocks(operator), strict=True):
        inner, delta = _undamped(_computed(block))
        factors = _factors(inner)
        if factors is None:
            raise UnsupportedError(
                f"the block {name}, {_computed(block)!r}, is neither a Kronecker product of two factors nor one "
                f"matrix (plus a multiple of the identity), and laplace-torch holds nothing else; {_ways_out(inner)}"
            )
        kfacs.append(factors)
        deltas.append(torch.as_tensor(delta, dtype=operator.dtype, device=operator.device))
    kron = Kron(kfacs)
    return kron if all(number(delta) == 0.0 for delta in deltas) else kron.decompose() + torch.stack(deltas)


def _undamped(block: LinearOperator) -> tuple[LinearOperator, Scalar]:
    """`A + δI` as (A, δ)."""
    if isinstance(block, Sum) and len(block.terms) == 2:
        for one, other in (block.terms, block.terms[::-1]):
            if isinstance(other, Identity):
                return one, other.scale
    return block, 0.0


def _names(operator: LinearOperator) -> list[str]:
    """What to call each block in an error; refuses blocks of several parameters."""
    blocks, layout = _blocks(operator), operator.layout
    if layout is None:
        return [f"number {i}" for i in range(len(blocks))]
    starts = {where.start: name for name, where in layout.items()}
    position, names = 0, []
    for block in blocks:
        stop = position + block.shape[0]
        inside = [name for name, where in layout.items() if position <= where.start < stop]
        if position not in starts or len(inside) != 1 or layout[inside[0]].stop != stop:
            raise UnsupportedError(
                f"the block {block!r} of entries {position:,} to {stop:,} is a joint one of {inside}; "
                'laplace-torch keeps one per parameter: build it with weight_and_bias="separate" (KFAC) or '
                'by="parameter" (dense blocks), or hand over its to_dense() as a full curvature'
            )
        names.append(f"of {starts[position]!r}")
        position = stop
    return names


def _blocks(operator: LinearOperator) -> list[LinearOperator]:
    if isinstance(operator, Deferred):
        return _blocks(operator.content())
    if isinstance(operator, Scaled):
        return [operator.factor * block for block in _blocks(operator.operator)]
    return list(operator.blocks) if isinstance(operator, BlockDiagonal) else [operator]


def _factors(block: LinearOperator) -> list[Tensor] | None:
    """One or two factors, each a matrix or the vector of a diagonal one; None where the block is made of others."""
    if isinstance(block, Deferred):
        return _factors(block.content())
    if isinstance(block, Scaled):
        factors = _factors(block.operator)
        return None if factors is None else [block.factor * factors[0], *factors[1:]]
    if isinstance(block, Kronecker) and len(block.factors) == 2:
        return [_tensor(factor) for factor in block.factors]
    is_one = isinstance(block, Dense | LowRank | Diagonal | Identity | Zero) or _decomposed(block)
    return [_tensor(block)] if is_one else None


def _decomposed(block: LinearOperator) -> bool:
    """Whether it is a single matrix kept as its eigenvalues and dense eigenvectors."""
    return isinstance(block, Eigen) and isinstance(block.Q, Dense)


def _tensor(factor: LinearOperator) -> Tensor:
    if isinstance(factor, Deferred):
        return _tensor(factor.content())
    if isinstance(factor, Zero):
        return torch.zeros(factor.shape[0], dtype=factor.dtype, device=factor.device)
    d = diagonal_of(factor)
    return factor.to_dense().clone() if d is None else d.clone()


def _computed(block: LinearOperator) -> LinearOperator:
    return block.content() if isinstance(block, Deferred) else block


def _ways_out(block: LinearOperator) -> str:
    if isinstance(block, BlockDiagonal):
        return "of a grouped convolution take co.BlockGGN, whose blocks are dense, or a diagonal"
    return "hand over co.Dense(block.to_dense()), or stay with co.Gaussian"


def fitting_kron(operator: LinearOperator, params: Mapping[str, nn.Parameter], factor: float) -> Kron:
    """The factors in the shapes to which laplace-torch adds them while it fits.

    It starts from zeros: one matrix for a vector, two for a parameter of two to four dimensions, whatever the backend
    returns. Diagonal blocks of vectors become matrices, everything else that does not fit is refused.

    Args:
        operator: What `kron` returned.
        params: The parameters, in the order of the blocks.
        factor: Between `lossfunc` and −log p; laplace-torch spreads it evenly over the two factors.

    Raises:
        UnsupportedError: A parameter whose block is not of that shape.
    """
    blocks = _blocks(operator)
    kfacs = [_fitted(name, p, block) for (name, p), block in zip(params.items(), blocks, strict=True)]
    return Kron([[F[0] / sqrt(factor), F[1] * sqrt(factor)] if len(F) == 2 else F for F in kfacs])


def _fitted(name: str, p: nn.Parameter, block: LinearOperator) -> list[Tensor]:
    wanted = [p.numel()] if p.dim() == 1 else [p.shape[0], p.shape[1:].numel()]
    factors = _factors(block) or []
    if len(wanted) == 2 and len(factors) == 1 and not bool(factors[0].any()):  # the outputs do not depend on it
        factors = [p.new_zeros(size) for size in wanted]
    if [len(F) for F in factors] != wanted:
        raise UnsupportedError(
            f"the Kronecker block of {name!r} {tuple(p.shape)} is {_computed(block)!r}, and laplace-torch adds up "
            f"{' ⊗ '.join(f'{size} x {size}' for size in wanted)} there. Use hessian_structure='diag' or 'full', set "
            "requires_grad=False on the parameter, or take co.KFAC and co.Gaussian, which hold every block"
        )
    return [_matrix(F.detach()) for F in factors]


def _matrix(factor: Tensor) -> Tensor:
    if factor.dim() > 1:
        return factor
    require(
        len(factor) ** 2 * factor.element_size(), None, factor.device, f"the diagonal factor of size {len(factor):,}",
        "laplace-torch holds it as a full matrix; use hessian_structure='diag', or co.KFAC and co.Gaussian.",
    )  # fmt: skip
    return torch.diag(factor)


# -------------------------------------------------------------------- from laplace-torch


def from_laplace_kron(kron: Any, layout: Layout | None = None) -> BlockDiagonal:
    """laplace-torch's `Kron` or `KronDecomposed` as a block-diagonal operator, one block per entry; a copy.

    `to_laplace_kron` of the result gives the same factors back. The eigenvalues and deltas of a `KronDecomposed` stay
    in use: nothing is decomposed again.

    Args:
        kron: The factors.
        layout: Where each named parameter lies in a vector.
    """
    if isinstance(kron, library.KronDecomposed):
        return BlockDiagonal(*_decomposed_blocks(kron), layout=layout)
    if not isinstance(kron, library.Kron):
        raise DataError(
            f"from_laplace_kron: got {type(kron).__name__}; expected laplace-torch's Kron or KronDecomposed."
        )
    return BlockDiagonal(*(_product([_operator(F) for F in factors]) for factors in kron.kfacs), layout=layout)


def _operator(factor: Tensor) -> LinearOperator:
    return Diagonal(factor.clone()) if factor.dim() == 1 else Dense(factor.clone(), is_symmetric=True)


def _product(factors: Sequence[LinearOperator]) -> LinearOperator:
    return factors[0] if len(factors) == 1 else Kronecker(*factors)


def _decomposed_blocks(kron: Any) -> list[LinearOperator]:
    blocks: list[LinearOperator] = []
    deltas = kron.deltas.expand(len(kron))
    for Qs, values, delta in zip(kron.eigenvectors, kron.eigenvalues, deltas, strict=True):
        damped = kron.damping and len(values) == 2
        shift = delta.sqrt() if damped else 0.0
        block = _product([Eigen(Q.clone(), l + shift) for Q, l in zip(Qs, values, strict=True)])
        blocks.append(block if damped or not number(delta) else block.add_diagonal(_scalar(delta)))
    return blocks


def _scalar(value: Tensor) -> Scalar:
    """A tensor that gradients reach stays one."""
    return value.reshape(()) if value.requires_grad else float(value)
