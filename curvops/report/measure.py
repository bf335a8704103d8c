"""The numbers of a report: every one by products with the network, each with its error."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.curvature.matrixfree import GGN, Hessian
from curvops.errors import DataError, NumericalWarning
from curvops.linalg.results import Eigenpairs, EstimateReport, SolveReport
from curvops.linalg.spectrum import Spectrum
from curvops.operators.base import LinearOperator
from curvops.operators.methods import CG, SLQ, XTrace
from curvops.posterior import Gaussian
from curvops.report.predictive import Spread, spread
from curvops.report.subject import Subject


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        delta: Prior precision δ > 0, added to the GGN.
        seed: Seed of the right-hand side, the probes and the samples.
        eigenvalues: Top eigenvalues of either curvature.
        samples: Posterior samples.
        probes: Start vectors of the spectra.
        steps: Lanczos steps per start vector.
    """

    delta: float = 1.0
    seed: int = 0
    eigenvalues: int = 10
    samples: int = 100
    probes: int = 10
    steps: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise DataError(f"delta={self.delta}: expected a positive prior precision; GGN + δI must be definite.")
        if not 0 <= self.seed < 2**31:
            raise DataError(f"seed={self.seed}: expected a whole number from 0 to 2³¹ − 1.")
        for name in ("eigenvalues", "samples", "probes", "steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: expected a whole number of at least 1.")

    def generator(self, stream: int) -> torch.Generator:
        """A generator of its own for each use of random numbers."""
        return torch.Generator().manual_seed(self.seed * 100 + stream)


@dataclass(frozen=True)
class Measurements:
    """What was measured, of which operators.

    Attributes:
        ggn, hessian: The curvatures, summed over the data, without damping.
        damped: GGN + δI.
        loss: Σ −log p, without constants.
        rows: Outputs of the network over all data, N·C.
        top_ggn, top_hessian, bottom_hessian: Eigenpairs at the ends of the spectra.
        trace: tr GGN.
        logdet: log det(GGN + δI), nats.
        rhs, solution, solve: b, x and the report of (GGN + δI) x = b.
        spread: Predictions under posterior samples.
        spectrum_ggn, spectrum_hessian: Lanczos quadratures.
        missed: What did not reach its target, in words.
        seconds: Time of all of it.
    """

    ggn: GGN
    hessian: Hessian
    damped: LinearOperator
    loss: float
    rows: int
    top_ggn: Eigenpairs
    top_hessian: Eigenpairs
    bottom_hessian: Eigenpairs
    trace: EstimateReport
    logdet: EstimateReport
    rhs: Tensor
    solution: Tensor
    solve: SolveReport
    spread: Spread
    spectrum_ggn: Spectrum
    spectrum_hessian: Spectrum
    missed: tuple[str, ...]
    seconds: float


def measure(subject: Subject, settings: Settings) -> Measurements:
    """Measure both curvatures of a network, without ever making one dense.

    Nothing of the subject is changed. A target that is missed is named in `missed`, and the best value kept.

    Cost: a few thousand products with the GGN and with the Hessian.
    """
    began = time.perf_counter()
    ggn = GGN(subject.model, subject.likelihood, subject.data)
    hessian = Hessian(subject.model, subject.likelihood, subject.data)
    damped = ggn.add_diagonal(settings.delta)
    size, objective = ggn.shape[0], ggn.objective
    k = min(settings.eigenvalues, size)
    assert objective.likelihood is not None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericalWarning)
        loss = float(objective.loss())
        rows = sum(f.numel() for _, f in objective.evaluate())
        top_ggn = ggn.eigsh(k, on_failure="warn")
        top_hessian = hessian.eigsh(k, on_failure="warn")
        bottom_hessian = hessian.eigsh(1, which="SA", on_failure="warn")
        _, trace = ggn.trace(XTrace(generator=settings.generator(0), on_failure="warn"), return_report=True)
        _, logdet = damped.logdet(SLQ(generator=settings.generator(1), on_failure="warn"), return_report=True)
        rhs = torch.randn(size, generator=settings.generator(2), dtype=torch.float64).to(ggn.device, ggn.dtype)
        solution, solve = damped.solve(rhs, CG(on_failure="warn"), return_report=True)
        posterior = Gaussian(objective.selection.vector(), damped, settings.generator(3))
        predictions = spread(posterior, subject.model, subject.inputs, objective.likelihood.name, settings.samples)
        spectra = [H.spectrum(settings.probes, settings.steps, generator=settings.generator(4)) for H in (ggn, hessian)]
    ours = [w for w in caught if issubclass(w.category, NumericalWarning)]
    for other in (w for w in caught if w not in ours):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return Measurements(
        ggn=ggn,
        hessian=hessian,
        damped=damped,
        loss=loss,
        rows=rows,
        top_ggn=top_ggn,
        top_hessian=top_hessian,
        bottom_hessian=bottom_hessian,
        trace=trace,
        logdet=logdet,
        rhs=rhs,
        solution=solution,
        solve=solve,
        spread=predictions,
        spectrum_ggn=spectra[0],
        spectrum_hessian=spectra[1],
        missed=tuple(dict.fromkeys(str(w.message) for w in ours)),
        seconds=time.perf_counter() - began,
    )
