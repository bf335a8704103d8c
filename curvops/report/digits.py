"""The built-in subject of the report: a 64-16-10 tanh network on scikit-learn's digits, trained in seconds."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from curvops.errors import ConvergenceError
from curvops.extras import require
from curvops.nets.likelihoods import resolve
from curvops.report.subject import Subject

TEST_SIZE = 540
SIZES = (64, 16, 10)


def digits(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's bundled 8 x 8 digits: `((1257, 64), (1257,))` to train on and `((540, 64), (540,))` to test on.

    Pixels are scaled from 0…16 to 0…1, in float64. Nothing is downloaded, and no global random state is touched.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    state = random.getstate()
    try:
        bundle = require("sklearn.datasets", "report").load_digits()
    finally:
        random.setstate(state)  # importing scikit-learn draws from it
    x = torch.as_tensor(bundle.data, dtype=torch.float64) / 16
    y = torch.as_tensor(bundle.target, dtype=torch.long)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[TEST_SIZE:], order[:TEST_SIZE]
    return (x[train], y[train]), (x[test], y[test])


def network(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    """An untrained tanh network in float64; weights N(0, 1/fan_in), biases 0, drawn from a private generator."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float64)
        assert isinstance(linear, nn.Linear)
        nn.init.normal_(linear.weight, std=1 / math.sqrt(fan_in), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def train(
    model: nn.Module, likelihood: Any, data: tuple[Tensor, Tensor], *, delta: float = 1.0, rtol: float = 1e-6
) -> float:
    """Bring `model` to a mode of the posterior: minimise `Σ −log p(y | f(x)) + ½ δ ‖θ‖²`, in place.

    Full-batch L-BFGS with a strong Wolfe line search; the same input gives the same parameters.

    Args:
        model: The network; its parameters are overwritten.
        likelihood: Anything that `co.GGN` takes.
        data: One batch.
        delta: Prior precision δ > 0, per parameter (not divided by N).
        rtol: Gradient norm at which to stop, relative to the gradient norm at the start.

    Returns:
        Norm of the objective's gradient at the end.

    Raises:
        ConvergenceError: The gradient did not come down in 2,000 iterations.
    """
    x, y = data
    nll = resolve(likelihood).loss
    parameters = [p for p in model.parameters() if p.requires_grad]

    def objective() -> Tensor:
        return nll(model(x), y) + 0.5 * delta * sum((p * p).sum() for p in parameters)

    def gradient_norm() -> float:
        gradients = torch.autograd.grad(objective(), parameters)
        return math.sqrt(sum(float(g.square().sum()) for g in gradients))

    optimizer = torch.optim.LBFGS(
        parameters, max_iter=250, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    target = rtol * gradient_norm()
    norm = math.inf
    for _ in range(8):
        optimizer.step(closure)
        norm = gradient_norm()
        if norm <= target:
            break
    optimizer.zero_grad()
    if norm > target:
        raise ConvergenceError(
            f"L-BFGS left a gradient of norm {norm:.2e}, above the target {target:.2e}; "
            f"raise delta (now {delta:g}) or rtol (now {rtol:g}).",
            value=norm,
        )
    return norm


def digits_subject(delta: float = 1.0, seed: int = 0) -> Subject:
    """Train the 64-16-10 tanh network on the digits, and hand it over to be measured.

    Args:
        delta: Prior precision.
        seed: Seed of the split and of the initial weights.
    """
    training, test = digits(seed)
    model = network(seed)
    norm = train(model, "classification", training, delta=delta)
    with torch.no_grad():
        accuracy = float((model(test[0]).argmax(1) == test[1]).double().mean())
    return Subject(
        title="64-16-10 tanh network on scikit-learn's digits",
        model=model,
        likelihood="classification",
        data=training,
        inputs=test,
        notes=(
            f"Trained to a mode of the posterior at prior precision {delta:g}: gradient norm {norm:.1e}.",
            f"Test accuracy {accuracy:.1%} on {TEST_SIZE} digits; the predictive spread below is taken on them.",
        ),
    )
