"""Curvatures known by their products: nothing of size P x P is ever formed unless asked for."""

from curvops.curvature.matrixfree.fisher import EmpiricalFisher, MCFisher
from curvops.curvature.matrixfree.ggn import GGN
from curvops.curvature.matrixfree.gram import Gram
from curvops.curvature.matrixfree.hessian import Hessian
from curvops.curvature.matrixfree.jacobian import Jacobian

__all__ = ["GGN", "EmpiricalFisher", "Gram", "Hessian", "Jacobian", "MCFisher"]
