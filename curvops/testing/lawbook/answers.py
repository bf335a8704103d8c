"""Laws of the answers: solves, determinants, traces, diagonals, functions, eigenvalues, norms, and their reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvops.errors import ConvergenceError, CurvopsError, NotPositiveDefiniteError, UnsupportedError
from curvops.linalg.results import EstimateReport, Report, SolveReport
from curvops.operators.methods import SOLVE_RTOL
from curvops.testing.lawbook.subject import RTOL, Subject


def solve_inverts(s: Subject) -> None:
    """`A solve(b) = b` to the promised residual, which the report states truly, for a vector and for columns."""
    if not s.is_square or s.condition == torch.inf or s.condition * s.eps > 1e-4:
        return
    for b in (s.vector(s.M.shape[0], 11), s.columns(s.M.shape[0], 3, 12)):
        x, report = s.A.solve(b, return_report=True)
        _check_solve_report(s, report)
        s.require(x.shape == b.shape, f"solve: shape {tuple(x.shape)} for b of shape {tuple(b.shape)}")
        s.require(x.dtype == s.A.dtype, f"solve: dtype {x.dtype}")
        expected = torch.linalg.solve(s.M, b.cpu().double())
        scale = float(torch.linalg.matrix_norm(torch.linalg.inv(s.M), 2)) * float(b.norm())
        s.close(x, expected, scale, "solve(b)", s.solve_slack())
        true = _residual(s, x, b)
        per_product = s.eps if s.rtol <= RTOL[s.A.dtype] else s.rtol
        slack = 4 * per_product * (s.norm * float(x.norm()) / float(b.norm()) + 1) * len(s.M) ** 0.5
        s.require(true <= SOLVE_RTOL[s.A.dtype] + slack, f"solve: the true residual is {true:.3g}")
        s.require(
            abs(true - report.worst_residual) <= 0.1 * true + slack,
            f"solve: the report states a residual of {report.worst_residual:.3g}, the true one is {true:.3g}",
        )
    x = s.A.solve(torch.zeros_like(b))
    s.require(not bool(x.any()), "solve(0) is 0")


def singular_systems_give_the_shortest_solution(s: Subject) -> None:
    """For a singular PSD operator: the minimum-norm solution where there is one, an error where there is none."""
    if not s.is_square or not s.A.is_symmetric or not _is_psd(s) or not s.is_singular:
        return
    b = s.A @ s.vector(s.M.shape[1], 13)
    values, vectors = torch.linalg.eigh(s.M)
    kept = values > s.rounding
    smallest = float(values[kept].min()) if bool(kept.any()) else 1.0
    pinv = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    tolerance = max(1e3 * s.rtol, 4 * SOLVE_RTOL[s.A.dtype] / s.rtol * s.rtol)
    s.close(s.A.solve(b), pinv @ b.cpu().double(), float(b.norm()) / smallest, "solve in the range", tolerance / s.rtol)
    outside = vectors[:, ~kept][:, 0].to(s.A.device, s.A.dtype)
    try:
        s.A.solve(b + outside)
    except (NotPositiveDefiniteError, ConvergenceError):
        return
    s.fail("solve with a right-hand side outside the range was answered; expected an error")


def bad_right_hand_sides_are_refused(s: Subject) -> None:
    """NaN and Inf are refused before any work."""
    if not s.is_square:
        return
    from curvops.errors import DataError

    for bad in (torch.nan, torch.inf):
        b = s.vector(s.M.shape[0])
        b[0] = bad
        before = s.A.matvec_count
        s.refuses(lambda b=b: s.A.solve(b), DataError, f"solve with {bad} on the right")
        s.require(s.A.matvec_count == before, f"solve with {bad} on the right made products before refusing")


def determinants(s: Subject) -> None:
    """`logdet` and `slogdet` against the dense matrix; `logdet` of what is not positive definite is refused."""
    if not s.is_square:
        return
    if s.A.is_symmetric:
        low = float(s.eigenvalues[0])
        if low > s.rounding:
            value, report = s.A.logdet(return_report=True)
            _check_estimate(s, value, report, torch.logdet(s.M), s.condition + len(s.M), "logdet")
        elif low < -s.rounding or s.is_singular:
            s.refuses(s.A.logdet, NotPositiveDefiniteError, "logdet of a matrix that is not positive definite")
    else:
        s.refuses(s.A.logdet, NotPositiveDefiniteError, "logdet of an operator not known to be symmetric")
    if s.condition < torch.inf:
        sign, logabs = s.A.slogdet()
        expected_sign, expected = torch.linalg.slogdet(s.M)
        s.close(sign, expected_sign, 1.0, "slogdet's sign")
        s.close(logabs, expected, s.condition + len(s.M), "slogdet", 10)


def trace_and_diagonal(s: Subject) -> None:
    """`trace`, `diagonal` and their reports."""
    if not s.is_square:
        return
    size = len(s.M)
    value, report = s.A.trace(return_report=True)
    _check_estimate(s, value, report, s.M.trace(), s.norm * size, "trace")
    value, report = s.A.diagonal(return_report=True)
    _check_estimate(s, value, report, s.M.diagonal(), s.norm * size**0.5, "diagonal")


def roots(s: Subject) -> None:
    """`A^½ A^½ v = A v`, `A^½ A^-½ v = v`; refused where eigenvalues are negative, or zero for A^-½."""
    if not s.is_square or not s.A.is_symmetric:
        return
    v = s.vector(len(s.M), 14)
    low = float(s.eigenvalues[0])
    if low < -s.rounding:
        s.refuses(lambda: s.A.sqrt_matvec(v), NotPositiveDefiniteError, "sqrt_matvec of an indefinite operator")
        s.refuses(lambda: s.A.inv_sqrt_matvec(v), NotPositiveDefiniteError, "inv_sqrt_matvec of an indefinite operator")
        return
    slack = _function_slack(s)
    root, report = s.A.sqrt_matvec(v, return_report=True)
    _check_report(s, report, "sqrt_matvec")
    s.close(s.A.sqrt_matvec(root), s.M @ v.cpu().double(), s.norm * float(v.norm()), "sqrt twice", slack)
    expected = v.cpu().double() @ _function(s, lambda x: x.clamp_min(0) ** 0.5, v)
    # The root of an eigenvalue that is only rounding is of the size of the root of rounding.
    rounding = 10 * len(s.M) * (s.eps**0.5 if s.condition == torch.inf else s.eps) / s.rtol
    s.close(v @ root, expected, s.norm**0.5 * float(v @ v), "vᵀ A^½ v", slack + rounding)
    if low > s.rounding:
        inverse, report = s.A.inv_sqrt_matvec(s.columns(len(s.M), 2, 15), return_report=True)
        _check_report(s, report, "inv_sqrt_matvec")
        expected = _function(s, lambda x: x**-0.5, s.columns(len(s.M), 2, 15))
        s.close(inverse, expected, low**-0.5 * len(s.M) ** 0.5, "A^-½ V", slack * s.condition)
    elif s.is_singular:
        s.refuses(lambda: s.A.inv_sqrt_matvec(v), NotPositiveDefiniteError, "inv_sqrt_matvec of a singular operator")


def functions(s: Subject) -> None:
    """`f(A) v` for a smooth f, on a vector and on columns; refused where the operator is not symmetric."""
    if not s.is_square:
        return
    scale = s.norm

    def f(x: Tensor) -> Tensor:
        return torch.exp(-x / scale)

    if not s.A.is_symmetric:
        s.refuses(lambda: s.A.function(f, s.vector(len(s.M))), UnsupportedError, "f(A) v of an operator not symmetric")
        return
    for v in (s.vector(len(s.M), 16), s.columns(len(s.M), 2, 17)):
        value, report = s.A.function(f, v, return_report=True)
        _check_report(s, report, "function")
        s.close(value, _function(s, f, v), 3.0 * float(v.norm()), "exp(-A/‖A‖) v", _function_slack(s))


def quadratic_forms(s: Subject) -> None:
    """`vᵀAv`, one number per column."""
    if not s.is_square:
        s.refuses_shape(
            lambda: s.A.quadratic_form(s.vector(s.M.shape[1])), [repr(s.A)], "quadratic_form of a rectangle"
        )
        return
    V = s.columns(len(s.M), 3, 18)
    W = V.cpu().double()
    scale = s.norm * float(V.norm()) ** 2
    s.close(s.A.quadratic_form(V), (W * (s.M @ W)).sum(0), scale, "quadratic_form(V)")
    s.close(s.A.quadratic_form(V[:, 0]), W[:, 0] @ s.M @ W[:, 0], scale, "quadratic_form(v)")


def eigenpairs(s: Subject) -> None:
    """`eigsh` at both ends, ascending, orthonormal, with true residuals."""
    if not s.is_square or not s.A.is_symmetric:
        return
    k = min(2, len(s.M))
    slack = 100
    for which, expected in (("LA", s.eigenvalues[-k:]), ("SA", s.eigenvalues[:k])):
        pairs, report = s.A.eigsh(k, which=which, return_report=True)
        _check_report(s, report, "eigsh")
        s.close(pairs.values, expected, s.norm, f"eigsh(which={which!r})", slack)
        Q = pairs.vectors
        s.close(Q.T @ Q, torch.eye(k), 1.0, "orthonormal eigenvectors", 100)
        true = (s.M @ Q.cpu().double() - Q.cpu().double() * pairs.values.cpu().double()).norm(dim=0)
        s.close(pairs.residuals, true, s.norm, "residuals of eigsh", slack)


def norms(s: Subject) -> None:
    """`frobenius_norm` and `spectral_norm`, with brackets that hold."""
    if not s.has_transpose():
        return
    value, report = s.A.frobenius_norm(return_report=True)
    _check_estimate(s, value, report, s.M.norm(), s.norm * min(s.M.shape) ** 0.5, "frobenius_norm")
    value, report = s.A.spectral_norm(return_report=True)
    true = torch.linalg.matrix_norm(s.M, 2)
    _check_report(s, report, "spectral_norm")
    s.require(
        abs(float(value) - float(true)) <= (2e-3 + s.rtol) * float(true),
        f"spectral_norm: {float(value):.6g}, true {float(true):.6g}",
    )


def answers_are_announced(s: Subject) -> None:
    """`explain` names the algorithm that the report then names, or says that the verb refuses."""
    v, b = s.vector(s.M.shape[0], 19), s.A @ s.vector(s.M.shape[1], 20)
    verbs: dict[str, Any] = {
        "solve": lambda: s.A.solve(b, return_report=True),
        "logdet": lambda: s.A.logdet(return_report=True),
        "trace": lambda: s.A.trace(return_report=True),
        "diagonal": lambda: s.A.diagonal(return_report=True),
        "sqrt_matvec": lambda: s.A.sqrt_matvec(v, return_report=True),
        "inv_sqrt_matvec": lambda: s.A.inv_sqrt_matvec(v, return_report=True),
    }
    if not s.is_square:
        return
    for name, call in verbs.items():
        said = s.A.explain(name)
        s.require(said.startswith(f"{name}: "), f"explain({name!r}) is {said!r}")
        try:
            _, report = call()
        except CurvopsError:
            continue
        s.require("refused" not in said, f"explain({name!r}) says it refuses, and {report.algorithm} answered")
        announced = said.removeprefix(f"{name}: ")
        s.require(
            announced.startswith(report.algorithm) or report.algorithm.startswith(announced.split(" (")[0]),
            f"explain({name!r}) announced {announced!r}, and {report.algorithm!r} answered",
        )


def _function(s: Subject, f: Any, V: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((s.M + s.M.T) / 2)
    coefficients = vectors.T @ V.cpu().double()
    return vectors @ (f(values) * coefficients if V.dim() == 1 else f(values)[:, None] * coefficients)


def _function_slack(s: Subject) -> float:
    # An inverse or a Lanczos run inside brings the default tolerance of solves.
    exact = s.A._exact("function") is not None or s.A._holds_tensors()
    return 20.0 if exact else 4 * SOLVE_RTOL[s.A.dtype] / s.rtol + 20.0


def _residual(s: Subject, x: Tensor, b: Tensor) -> float:
    X, B = x.cpu().double().reshape(len(b), -1), b.cpu().double().reshape(len(b), -1)
    return float(((B - s.M @ X).norm(dim=0) / B.norm(dim=0)).max())


def _is_psd(s: Subject) -> bool:
    return float(s.eigenvalues[0]) >= -s.rounding


def _check_report(s: Subject, report: Report, what: str) -> None:
    s.require(isinstance(report, Report), f"{what}: return_report=True gave {type(report).__name__}")
    s.require(bool(report.algorithm), f"{what}: the report names no algorithm")
    s.require(report.converged, f"{what}: the report says not converged, and nothing was raised")
    s.require(report.matvecs >= 0 and report.seconds >= 0, f"{what}: the report counts {report.matvecs} products")


def _check_solve_report(s: Subject, report: SolveReport) -> None:
    _check_report(s, report, "solve")
    s.require(isinstance(report, SolveReport), f"solve: the report is a {type(report).__name__}")


def _check_estimate(
    s: Subject, value: Tensor, report: EstimateReport, expected: Tensor, scale: float, what: str, slack: float = 1.0
) -> None:
    """Exact within rounding, or within thrice the half-width that the report claims."""
    _check_report(s, report, what)
    s.require(isinstance(report, EstimateReport), f"{what}: the report is a {type(report).__name__}")
    stated = torch.as_tensor(report.value, dtype=torch.float64).cpu()
    s.close(stated, value, 1.0 + float(torch.as_tensor(value).detach().norm()), f"{what}: the report's value")
    width = float(torch.as_tensor(report.half_width, dtype=torch.float64).norm())
    s.close(value, expected, scale, what, 10 * slack + 3 * width / (s.rtol * scale))


LAWS = (
    solve_inverts,
    singular_systems_give_the_shortest_solution,
    bad_right_hand_sides_are_refused,
    determinants,
    trace_and_diagonal,
    roots,
    functions,
    quadratic_forms,
    eigenpairs,
    norms,
    answers_are_announced,
)
