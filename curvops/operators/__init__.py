"""The algebra: lazy linear operators that know their structure."""

from curvops.operators.base import LinearOperator
from curvops.operators.blockdiagonal import BlockDiagonal
from curvops.operators.closure import Closure
from curvops.operators.composites import Product, Scaled, Sum, Transpose
from curvops.operators.deferred import Deferred
from curvops.operators.dense import Dense
from curvops.operators.diagonal import Diagonal, Identity, Zero
from curvops.operators.eigen import Eigen
from curvops.operators.inverse import Inverse
from curvops.operators.kronecker import Kronecker
from curvops.operators.lowrank import LowRank
from curvops.operators.permuted import Permuted
from curvops.operators.submatrix import Submatrix

__all__ = [
    "BlockDiagonal",
    "Closure",
    "Deferred",
    "Dense",
    "Diagonal",
    "Eigen",
    "Identity",
    "Inverse",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "Permuted",
    "Product",
    "Scaled",
    "Submatrix",
    "Sum",
    "Transpose",
    "Zero",
]
