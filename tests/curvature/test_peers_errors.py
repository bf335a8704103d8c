"""Known silent errors of BackPACK and curvlinops, each shown by their own numbers, and what happens here instead.

Those of ASDL are in `test_backend_asdl`, those of laplace-torch in `tests/interop`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import conformance
import pytest
import reference
import torch
from torch import Tensor, nn

from curvops.curvature import BackPackEF, BackPackGGN, CurvlinopsGGN, CurvlinopsHessian, GGNInterface
from curvops.errors import UnsupportedError, UnsupportedLayerError
from curvops.testing.problems import problem

NLL = reference.nll("classification")


def backpack_says(model: nn.Module, x: Tensor, y: Tensor, name: str) -> list[Any]:
    """What an extension of BackPACK leaves on every parameter, asked as its manual says."""
    import backpack
    from backpack import extensions

    model, loss = copy.deepcopy(model), nn.CrossEntropyLoss(reduction="sum")
    kind = getattr(extensions, name)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack.backpack(kind):
            backpack.extend(loss)(backpack.extend(model)(x), y).backward()
    found = [getattr(p, kind.savefield) for p in model.parameters()]
    backpack.context.CTX.remove_hooks()
    return found


def diagonal(pieces: list[Tensor]) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_factors_of_convolutions_are_inflated_by_the_positions() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.7)
        model[2].weight.copy_(rand(3, 1).expand(3, 4))
    x, y = rand(1, 1, 1, 1).expand(1, 1, 2, 2).contiguous(), torch.zeros(1, dtype=torch.long)
    exact = float(reference.ggn(model, NLL, x, y)[0, 0])  # of one datum, positions alike, one product says it all
    B, A = (factor.detach() for factor in backpack_says(model, x, y, "KFLR")[0])
    assert float(B @ A) == pytest.approx(4 * exact)
    backend = BackPackGGN(model, "classification")
    assert float(backend.kron(x, y, N=1, kfac_approx="reduce")[1].to_dense()[0, 0]) == pytest.approx(exact)
    # Positions as further data, as co.KFAC has them by default, lose what they have in common: never more.
    expanded = backend.kron(x, y, N=1)[1].to_dense()[0, 0]
    assert float(expanded) == pytest.approx(exact / 4)
    assert float(expanded) == pytest.approx(
        float(GGNInterface(model, "classification").kron(x, y, N=1)[1].to_dense()[0, 0])
    )


def test_a_module_that_runs_twice_fails_for_another_reason() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = rand(4, 4), torch.arange(4) % 3
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'output'"):
        backpack_says(model, x, y, "SumGradSquared")
    with pytest.raises(UnsupportedLayerError, match="runs 2 times"):
        BackPackEF(model, "classification").diag(x, y)[1].diagonal()
    wanted = reference.ggn(model, NLL, x, y).diagonal()
    assert reference.relative_error(GGNInterface(model, "classification").diag(x, y)[1].diagonal(), wanted) < 1e-12


def test_tied_parameters_keep_one_of_their_results() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    x, y = rand(4, 4), torch.arange(4) % 3
    wanted = reference.ggn(model, NLL, x, y).diagonal()
    assert reference.relative_error(diagonal(backpack_says(model, x, y, "DiagGGNExact")), wanted) > 0.05
    for answer in (
        lambda: BackPackGGN(model, "classification").diag(x, y),
        lambda: BackPackGGN(model, "classification").jacobians(x),
        lambda: CurvlinopsGGN(model, "classification").kron(x, y, N=4),
    ):
        with pytest.raises(UnsupportedLayerError, match="tied"):
            answer()
    assert reference.relative_error(GGNInterface(model, "classification").diag(x, y)[1].diagonal(), wanted) < 1e-12


def test_padding_modes_are_taken_for_zeros() -> None:
    conv = nn.Conv2d(1, 1, 2, padding=1, padding_mode="circular")
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = rand(4, 1, 3, 3), torch.arange(4) % 3
    wanted = reference.ggn(model, NLL, x, y).diagonal()
    assert reference.relative_error(diagonal(backpack_says(model, x, y, "DiagGGNExact"))[:4], wanted[:4]) > 0.01
    with pytest.raises(UnsupportedLayerError, match="circular"):
        BackPackGGN(model, "classification").diag(x, y)


def test_padding_same_is_refused() -> None:
    p = problem("conv2d-same")
    x, y = p.data()
    for backend, method in ((BackPackGGN, "diag"), (BackPackGGN, "kron"), (BackPackEF, "diag")):
        with pytest.raises(UnsupportedLayerError, match="padding='same'"):
            getattr(backend(p.model(), "classification"), method)(x, y, N=4)
    assert conformance.cell("CurvlinopsGGN", "kron", "conv2d-same").verdict == "right"


def test_rows_are_taken_for_data() -> None:
    class Tokens(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    model = Tokens(nn.Linear(4, 3)).double()
    x, y = rand(4, 3, 4), torch.arange(4) % 3
    wanted = reference.empirical_fisher(model, NLL, x, y).diagonal()
    assert reference.relative_error(diagonal(backpack_says(model, x, y, "SumGradSquared")), wanted) > 0.1
    with pytest.raises(UnsupportedLayerError, match="rows that are not"):
        BackPackEF(model, "classification").diag(x, y)[1].diagonal()


def curvlinops_kfac(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import curvlinops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        K = curvlinops.KFACLinearOperator(model, loss, list(model.parameters()), [(x, y)], fisher_type="type-2")
        return (K @ torch.eye(K.shape[0], dtype=x.dtype)).detach()


def test_class_weights_do_not_count_in_curvlinops_factors() -> None:
    p = problem("mlp-weighted")
    x, y = p.data()
    loss: Any = p.loss()
    theirs, plain = curvlinops_kfac(p.model(), loss, x, y), nn.CrossEntropyLoss(reduction="sum")
    assert torch.allclose(theirs, curvlinops_kfac(p.model(), plain, x, y))
    assert conformance.cell("CurvlinopsGGN", "kron", "mlp-weighted").verdict == "right"
    assert conformance.cell("BackPackGGN", "kron", "mlp-weighted").verdict == "right"
    assert conformance.cell("BackPackGGN", "diag", "mlp-weighted").verdict == "right"


def test_ignored_targets_count_in_curvlinops_factors() -> None:
    p = problem("mlp-ignored")
    x, y = p.data()
    active = y != -100
    loss = nn.CrossEntropyLoss(reduction="sum")
    theirs, wanted = curvlinops_kfac(p.model(), loss, x, y), curvlinops_kfac(p.model(), loss, x[active], y[active])
    assert reference.relative_error(theirs, wanted) > 0.1
    for backend in (CurvlinopsGGN, BackPackGGN):
        with pytest.raises(UnsupportedError, match="ignored"):
            backend(p.model(), "classification").kron(x, y, N=4)
    assert conformance.cell("GGNInterface", "kron", "mlp-ignored").verdict == "right"
    assert conformance.cell("BackPackGGN", "diag", "mlp-ignored").verdict == "right"


def test_layer_normalisation_twice_differentiated_is_wrong_in_curvlinops() -> None:
    import curvlinops

    p = problem("layernorm")
    x, y = p.data()
    model, loss = p.model(), nn.CrossEntropyLoss(reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        H = curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)
        theirs = (H @ torch.eye(H.shape[0], dtype=x.dtype)).detach()
    wanted = reference.hessian(model, reference.problem_nll(p), x, y)
    assert reference.relative_error(theirs, wanted) > 0.05
    ours = CurvlinopsHessian(model, "classification").full(x, y)[1]
    assert reference.relative_error(ours.to_dense(), wanted) < 1e-10
    assert "by curvops: curvlinops" in repr(ours)
