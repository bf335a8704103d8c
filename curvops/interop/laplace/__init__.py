"""laplace-torch on curvops: backends for `laplace.Laplace`, and conversions of what it fitted.

Importing this package imports laplace-torch (>= 0.3), which `pip install 'curvops[laplace]'` brings.
"""

from typing import Any

from curvops.interop.laplace import backends
from curvops.interop.laplace.backends import (
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    LaplaceBackend,
    NativeEF,
    NativeGGN,
    NativeHessian,
    backend,
)
from curvops.interop.laplace.convert import Fitted, from_laplace
from curvops.interop.laplace.kron import from_laplace_kron, to_laplace_kron
from curvops.interop.laplace.matrixfree import MatrixFreeLaplace

__all__ = [
    "CurvlinopsEF",
    "CurvlinopsGGN",
    "CurvlinopsHessian",
    "Fitted",
    "LaplaceBackend",
    "MatrixFreeLaplace",
    "NativeEF",
    "NativeGGN",
    "NativeHessian",
    "backend",
    "from_laplace",
    "from_laplace_kron",
    "to_laplace_kron",
]


def __getattr__(name: str) -> Any:
    """The classes of other libraries' backends, made when they are asked for."""
    return getattr(backends, name)
