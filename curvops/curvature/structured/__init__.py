"""Curvatures with a structure: diagonals, Kronecker factors, blocks, low rank; layer by layer, at first need."""

from curvops.curvature.structured.blocks import BlockEF, BlockGGN, BlockHessian
from curvops.curvature.structured.diagonal import DiagonalEF, DiagonalGGN, DiagonalHessian
from curvops.curvature.structured.ekfac import EKFAC
from curvops.curvature.structured.kfac import KFAC
from curvops.curvature.structured.lowrank import low_rank

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockEF",
    "BlockGGN",
    "BlockHessian",
    "DiagonalEF",
    "DiagonalGGN",
    "DiagonalHessian",
    "low_rank",
]
