"""Curvatures: model x operator. Here the interfaces of `laplace.curvature`; those over a data set are in `curvops`."""

from curvops.curvature.backends.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface
from curvops.curvature.backends.backpack import BackPackEF, BackPackGGN, BackPackInterface
from curvops.curvature.backends.curvlinops import (
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    CurvlinopsInterface,
    from_curvlinops,
)
from curvops.curvature.ef import EFInterface
from curvops.curvature.features import FeatureExtractor, FeatureReduction
from curvops.curvature.ggn import GGNInterface
from curvops.curvature.hessian import HessianInterface
from curvops.curvature.interface import CurvatureInterface

__all__ = [
    "AsdlEF",
    "AsdlGGN",
    "AsdlHessian",
    "AsdlInterface",
    "BackPackEF",
    "BackPackGGN",
    "BackPackInterface",
    "CurvatureInterface",
    "CurvlinopsEF",
    "CurvlinopsGGN",
    "CurvlinopsHessian",
    "CurvlinopsInterface",
    "EFInterface",
    "FeatureExtractor",
    "FeatureReduction",
    "GGNInterface",
    "HessianInterface",
    "from_curvlinops",
]
