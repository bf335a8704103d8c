"""laplace-torch itself, looked for when this package is imported."""

from __future__ import annotations

import importlib
import warnings

from curvops.extras import require, require_version

__all__ = ["CurvatureInterface", "EFInterface", "GGNInterface", "Kron", "KronDecomposed", "baselaplace", "laplace"]

require_version("laplace-torch", "0.3", "laplace")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations beneath laplace-torch are none of the user's business
    laplace = require("laplace", "laplace")
    _curvature = importlib.import_module("laplace.curvature.curvature")
    _matrix = importlib.import_module("laplace.utils.matrix")
    baselaplace = importlib.import_module("laplace.baselaplace")

CurvatureInterface = _curvature.CurvatureInterface
GGNInterface, EFInterface = _curvature.GGNInterface, _curvature.EFInterface
Kron, KronDecomposed = _matrix.Kron, _matrix.KronDecomposed
