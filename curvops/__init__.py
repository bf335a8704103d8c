"""curvops: every curvature of a neural network as one lazy linear operator.

import curvops as co
H = co.GGN(model, "classification", data)       # P x P, nothing computed yet
(H.add_diagonal(1.0)).solve(v)                  # certified by the true residual
(H.add_diagonal(1.0)).logdet()                  # with an error bar where it is estimated
"""

from curvops import errors
from curvops.curvature import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    AsdlInterface,
    BackPackEF,
    BackPackGGN,
    BackPackInterface,
    CurvatureInterface,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    CurvlinopsInterface,
    EFInterface,
    FeatureExtractor,
    GGNInterface,
    HessianInterface,
    from_curvlinops,
)
from curvops.curvature.matrixfree import GGN, EmpiricalFisher, Gram, Hessian, Jacobian, MCFisher
from curvops.curvature.structured import (
    EKFAC,
    KFAC,
    BlockEF,
    BlockGGN,
    BlockHessian,
    DiagonalEF,
    DiagonalGGN,
    DiagonalHessian,
    low_rank,
)
from curvops.interop import from_linear_operator
from curvops.linalg.results import Eigenpairs, EstimateReport, Report, SolveReport
from curvops.linalg.spectrum import Spectrum
from curvops.nets import likelihoods
from curvops.nets.parameters import flatten, unflatten
from curvops.operators import (
    BlockDiagonal,
    Closure,
    Dense,
    Diagonal,
    Eigen,
    Identity,
    Kronecker,
    LinearOperator,
    LowRank,
    Permuted,
)
from curvops.operators.methods import (
    CG,
    LU,
    MINRES,
    SLQ,
    Cholesky,
    Eigh,
    FunctionSpace,
    Hutchinson,
    Lanczos,
    Nystrom,
    PerturbAndSolve,
    XDiag,
    XTrace,
)
from curvops.posterior import Gaussian

__version__ = "0.1.0"

__all__ = [
    "CG",
    "EKFAC",
    "GGN",
    "KFAC",
    "LU",
    "MINRES",
    "SLQ",
    "AsdlEF",
    "AsdlGGN",
    "AsdlHessian",
    "AsdlInterface",
    "BackPackEF",
    "BackPackGGN",
    "BackPackInterface",
    "BlockDiagonal",
    "BlockEF",
    "BlockGGN",
    "BlockHessian",
    "Cholesky",
    "Closure",
    "CurvatureInterface",
    "CurvlinopsEF",
    "CurvlinopsGGN",
    "CurvlinopsHessian",
    "CurvlinopsInterface",
    "Dense",
    "Diagonal",
    "DiagonalEF",
    "DiagonalGGN",
    "DiagonalHessian",
    "EFInterface",
    "Eigen",
    "Eigenpairs",
    "Eigh",
    "EmpiricalFisher",
    "EstimateReport",
    "FeatureExtractor",
    "FunctionSpace",
    "GGNInterface",
    "Gaussian",
    "Gram",
    "Hessian",
    "HessianInterface",
    "Hutchinson",
    "Identity",
    "Jacobian",
    "Kronecker",
    "Lanczos",
    "LinearOperator",
    "LowRank",
    "MCFisher",
    "Nystrom",
    "Permuted",
    "PerturbAndSolve",
    "Report",
    "SolveReport",
    "Spectrum",
    "XDiag",
    "XTrace",
    "errors",
    "flatten",
    "from_curvlinops",
    "from_linear_operator",
    "likelihoods",
    "low_rank",
    "unflatten",
]
