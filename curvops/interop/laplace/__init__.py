"""laplace-torch on curvops: backends for `laplace.Laplace`, and conversions of what it fitted.

Importing this package imports laplace-torch (>= 0.3), which `pip install 'curvops[laplace]'` brings. Everything of
laplace-torch works as before, with curvatures by one of these classes:

    NativeGGN       NativeEF       NativeHessian         PyTorch autograd alone
    CurvlinopsGGN   CurvlinopsEF   CurvlinopsHessian     the names of `laplace.curvature`, by the same libraries
    BackPackGGN     BackPackEF
    AsdlGGN         AsdlEF         AsdlHessian

Example:
    >>> import torch, laplace
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from curvops.interop.laplace import NativeGGN, from_laplace
    >>> x = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]
    >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=20)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1)).double()

    >>> la = laplace.Laplace(model, "regression", "all", "kron", backend=NativeGGN)
    >>> la.fit(loader)
    >>> la.optimize_prior_precision()
    >>> mean, variance = la(x)
    >>> mean.shape, variance.shape
    (torch.Size([60, 1]), torch.Size([60, 1, 1]))

    What was fitted, as operators: its precision has every verb, and the evidence its gradients.

    >>> fitted = from_laplace(la)
    >>> fitted.curvature
    BlockDiagonal(4: Kronecker(10×1), Dense(10), Kronecker(1×10), Dense(1))
    >>> bool(torch.isclose(fitted.log_evidence(), la.log_marginal_likelihood()))
    True
    >>> fitted.posterior.sample(5).shape
    torch.Size([5, 31])

    A loss with class weights, ignored targets or label smoothing goes to the backend, and counts in every structure:

    >>> weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]), reduction="sum")
    >>> classifier = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 2))
    >>> la = laplace.Laplace(
    ...     classifier, "classification", "all", "kron", backend=NativeGGN, backend_kwargs={"lossfunc": weighted})
    >>> la.fit(DataLoader(TensorDataset(x.float(), (x[:, 0] > 1).long()), batch_size=20))
"""

from curvops.interop.laplace.backends import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    BackPackEF,
    BackPackGGN,
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
    "AsdlEF",
    "AsdlGGN",
    "AsdlHessian",
    "BackPackEF",
    "BackPackGGN",
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
