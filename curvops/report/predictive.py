"""What posterior samples do to a network's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvops.curvature.matrixfree import Jacobian
from curvops.linalg.results import Report
from curvops.nets.data import DataSource
from curvops.nets.forward import take
from curvops.operators.methods import PerturbAndSolve
from curvops.posterior import Gaussian

MAX_INPUTS = 540


@dataclass(frozen=True)
class Spread:
    """Predictions of the linearised network under posterior samples, without observation noise.

    Attributes:
        jacobian: Of the outputs in the parameters, on the inputs predicted on.
        deviations: `(outputs, samples)`, outputs of each sample minus outputs at the mean.
        report: Which algorithm drew the samples.
        right, wrong: Mean over correctly and wrongly predicted inputs of the standard deviation of the predicted
            class's probability; None where the likelihood is not a classification, or there is no such input.
    """

    jacobian: Jacobian
    deviations: Float[Tensor, "outputs samples"]
    report: Report
    right: float | None = None
    wrong: float | None = None

    @property
    def deviation(self) -> Float[Tensor, " outputs"]:
        """Standard deviation of every output, in the outputs' unit."""
        return self.deviations.square().mean(1).sqrt()

    @property
    def inputs(self) -> int:
        """Number of inputs predicted on."""
        return len(self.jacobian.outputs)


def spread(posterior: Gaussian, model: torch.nn.Module, data: object, likelihood: str, samples: int) -> Spread:
    """Draw posterior samples by products alone, and push them through the linearised network.

    Args:
        posterior: Gaussian over the parameters, its mean at the network's own.
        model: The network.
        data: Data as for a curvature; the first `MAX_INPUTS` of its first batch are used.
        likelihood: Name of the likelihood.
        samples: Number of draws.
    """
    x, y = first_data(data)
    jacobian = Jacobian(model, (x, y))
    method = PerturbAndSolve(on_failure="warn")
    draws, report = posterior.sample(samples, method, return_report=True)
    deviations = jacobian @ (draws - posterior.mean).T
    if likelihood != "classification" or y.dim() != 1:
        return Spread(jacobian, deviations, report)
    f = jacobian.outputs
    p = (f.unsqueeze(-1) + deviations.reshape(*f.shape, samples)).softmax(1)
    predicted = f.argmax(1)
    moves = p[torch.arange(len(f)), predicted].std(1)
    hit = predicted == y.to(predicted.device)
    return Spread(jacobian, deviations, report, _mean(moves[hit]), _mean(moves[~hit]))


def first_data(data: object, most: int = MAX_INPUTS) -> tuple[object, Tensor]:
    """The first data of the first batch."""
    batch = next(iter(DataSource(data).batches()))
    size = len(batch.y)
    count = min(size, most)
    return take(batch.x, 0, count, size), batch.y[:count]


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
