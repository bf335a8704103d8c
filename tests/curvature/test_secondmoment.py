"""Second moments: few vectors kept, many summed in panels and mirrored; and KFAC with factors of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from curvops.curvature.structured import EKFAC, KFAC, secondmoment
from curvops.curvature.structured.secondmoment import FEW, PANEL, SymmetricSum, Thin, added, matrix_of
from curvops.errors import DataError
from curvops.operators.base import LinearOperator
from curvops.operators.lowrank import LowRank

WIDTHS = [5, *(k * PANEL for k in (1, 2, 3, 8, 16)), 2 * PANEL - 1, 2 * PANEL + 1, 5 * PANEL + 7, 8 * PANEL + 1]


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("goes", [(1, 1, 1), (40, 1, 3000), (3000, 40)])
def test_sums_are_those_of_the_definition_and_go_on(d, goes):
    total, expected, seen = SymmetricSum(), torch.zeros(d, d, dtype=torch.float64), 0
    for i, n in enumerate(goes):
        V = vectors(n, d) if i % 2 else vectors(d, n).T
        total.add(V)
        seen, expected = seen + n, expected + V.T @ V
        assert isinstance(total.value(), Thin) == (seen <= FEW * d)
        torch.testing.assert_close(matrix_of(total.value())[0], expected, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("goes", [(1, 1), (1, 700), (700, 1)])
def test_stacks_sum_as_their_vectors(d, goes):
    total, expected, seen = SymmetricSum(), torch.zeros(d, d, dtype=torch.float64), 0
    for n in goes:
        X = vectors(3, d, n)
        total.add_stacked(X)
        seen, expected = seen + 3 * n, expected + (X @ X.mT).sum(0)
        assert isinstance(total.value(), Thin) == (seen <= FEW * d)
        torch.testing.assert_close(matrix_of(total.value())[0], expected, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("n", [3, 40])
def test_what_was_summed_elsewhere_joins_vectors(n):
    V, S = vectors(n, 8), vectors(1, 8, 8)
    total = SymmetricSum()
    total.add(V)
    total.add_sum(S)
    torch.testing.assert_close(matrix_of(total.value()), S + (V.T @ V), rtol=1e-13, atol=1e-12)


def test_vectors_are_kept_as_they_were():
    V = vectors(3, 8)
    expected, total = V.T @ V, SymmetricSum()
    total.add(V)
    V.zero_()
    torch.testing.assert_close(matrix_of(total.value())[0], expected)


def test_arithmetic_of_vectors():
    one, two, many = Thin(vectors(3, 8)), Thin(vectors(2, 8)), Thin(vectors(4, 8))
    matrix = vectors(1, 8, 8)
    for other, kept in ((two, True), (many, False), (matrix, False)):
        for total in (added(one, other), added(other, one)):
            assert isinstance(total, Thin) == kept
            torch.testing.assert_close(matrix_of(total), matrix_of(one) + matrix_of(other), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(matrix_of(one * 3.0), 3.0 * matrix_of(one))
    torch.testing.assert_close(matrix_of(one / 3.0), matrix_of(one) / 3.0)


def network() -> nn.Module:
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20, bias=False), nn.Tanh(), nn.Linear(20, 3))
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model


def batch(n: int) -> tuple[Tensor, Tensor]:
    return vectors(n, 40), torch.arange(n) % 3


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fisher": "mc"},
    {"fisher": "empirical", "weight_and_bias": "joint"},
    {"approx": "reduce"},
]


def thin_factors(K: KFAC) -> list[int]:
    """Widths of its factors that are kept as vectors."""
    found: list[LinearOperator] = [block.content() for block in K.blocks]
    for operator in found:
        found.extend(operator._children())
    return sorted(len(operator.U) for operator in found if isinstance(operator, LowRank))


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_every_verb_is_that_of_the_factors_multiplied_out(options, monkeypatch, device):
    model = network().to(device)
    x, y = (t.to(device) for t in batch(12))
    thin, merged = (KFAC(model, "classification", data, **options) for data in ((x, y), (x[:5], y[:5])))
    merged = merged.merge(KFAC(model, "classification", (x[5:], y[5:]), **options))
    thin.to_dense(), merged.to_dense()
    assert len(thin_factors(thin)) >= 2
    if options.get("fisher") != "mc":  # whose draws follow the place in the data set
        assert thin_factors(merged) == thin_factors(thin)
        assert reference.relative_error(merged.to_dense(), thin.to_dense()) < 1e-12
    monkeypatch.setattr(secondmoment, "FEW", 0.0)
    whole = KFAC(model, "classification", (x, y), **options)
    v = vectors(whole.shape[0]).to(device)
    assert reference.relative_error(thin.to_dense(), whole.to_dense()) < 1e-12
    assert not thin_factors(whole)
    for one, two in ((thin, whole), (thin.fraction(48, 12, 2.0), whole.fraction(48, 12, 2.0))):
        for verb in (
            lambda K: K @ v,
            lambda K: K.diagonal(),
            lambda K: K.trace(),
            lambda K: K.add_diagonal(0.5).solve(v),
            lambda K: K.add_diagonal(0.5).logdet(),
            lambda K: K.add_diagonal(0.5).diagonal(),
            lambda K: K.add_diagonal(0.5).inv_sqrt_matvec(v),
            lambda K: K.add_diagonal(0.5).inverse().diagonal(),
            lambda K: (2.0 * K).add_diagonal(0.5).sqrt_matvec(v),
            lambda K: K.eigsh(4).values,
        ):
            assert reference.relative_error(verb(one), verb(two)) < 1e-10


@pytest.mark.parametrize("options", OPTIONS[:3], ids=repr)
def test_eigenvalues_are_corrected_in_the_same_basis(options, monkeypatch):
    # Gradients have no part where a factor is zero, so that it does not matter which vectors span that.
    model, data = network(), batch(12)
    thin = EKFAC(model, "classification", data, **options).to_dense()
    monkeypatch.setattr(secondmoment, "FEW", 0.0)
    assert reference.relative_error(thin, EKFAC(model, "classification", data, **options).to_dense()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_solves_in_the_range_keep_their_digits(dtype, share, monkeypatch):
    # Where the vectors' span is most of a right-hand side, the plain formula of a thin basis is off by λ/δ units.
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / 16
    x, y = torch.randn(64, 256, generator=g, dtype=torch.float64).to(dtype), torch.arange(64) % 10
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    b = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))])
    residuals = []
    for few in (FEW, 0.0):
        monkeypatch.setattr(secondmoment, "FEW", few)
        K = KFAC(model, "classification", (x, y))
        damped = K.add_diagonal(share * float(K.eigsh(1).values[-1]))
        residuals.append(float(damped.solve(b, return_report=True)[1].residual))
    assert residuals[0] < 4 * residuals[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("options", [{}, {"weight_and_bias": "joint"}])
def test_variances_of_unit_vectors_in_the_range(dtype, delta, options, monkeypatch):
    # Inputs that are always zero but for some entries: the other unit vectors lie in the vectors' span.
    x = torch.zeros(30, 60, dtype=dtype)
    x[:, :20] = vectors(30, 20).to(dtype)
    variances = []
    for kind in (KFAC, EKFAC):
        for few in (FEW, 0.0):
            monkeypatch.setattr(secondmoment, "FEW", few)
            K = kind(nn.Linear(60, 3, dtype=dtype), "regression", (x, vectors(30, 3).to(dtype)), **options)
            variances.append(K.add_diagonal(delta).inverse().diagonal())
    for thin, whole in (variances[:2], variances[2:]):
        assert ((thin - whole).abs() / whole).max() < 100 * torch.finfo(dtype).eps


def test_few_vectors_are_decomposed_once(monkeypatch):
    K = KFAC(network(), "classification", batch(12), fisher="mc")
    K.to_dense()
    sizes: list[int] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda U: sizes.append(len(U)) or qr(U))
    v = vectors(K.shape[0])
    for delta in (0.5, 1.0):
        damped = K.add_diagonal(delta)
        damped.logdet(), damped.solve(v), damped.inv_sqrt_matvec(v), damped.diagonal()
    assert sorted(sizes) == thin_factors(K) != []


def test_few_vectors_are_decomposed_to_the_digits_of_their_dtype():
    U = (vectors(300, 200) * torch.logspace(0, -2, 200, dtype=torch.float64)).float()
    exact = torch.linalg.eigvalsh(U.double().T @ U.double())
    found = LowRank(U)._spectral().values.double()
    assert ((found - exact).abs() / exact).max() < 1e-6


def test_few_vectors_too_large_for_their_dtype_are_refused():
    model = nn.Linear(6, 8, bias=False)
    K = KFAC(model, "regression", (torch.full((2, 6), 1e20), torch.zeros(2, 8)))
    E = EKFAC(model, "regression", (torch.full((2, 6), 1e20), torch.zeros(2, 8)))
    for one in (K, E):
        with pytest.raises(DataError, match=r"diagonal of Σ v vᵀ over \(2, 6\) vectors holds NaN or infinity"):
            one.trace()
    with pytest.raises(DataError, match=r"the eigenvalues of .* in torch\.float32, holds NaN or infinity"):
        LowRank(torch.full((6, 2), 1e20)).sqrt_matvec(torch.ones(6))


@pytest.mark.parametrize("numbers", [(24, 12, -1.0), (-24, 12, 1.0), (24, 0, 1.0), (24, 12, torch.nan)])
def test_fractions_that_are_none_are_refused(numbers):
    with pytest.raises(ValueError, match=r"fraction\(.*expected numbers of data above 0"):
        KFAC(network(), "classification", batch(12)).fraction(*numbers)


def test_inputs_written_to_afterwards_are_no_part_of_it():
    (x, y), model = batch(12), network()
    K = KFAC(model, "classification", (x, y))
    K.statistics()
    expected = KFAC(model, "classification", (x.clone(), y)).to_dense()
    held = [pair.A.V for unit in K.statistics() for one in unit for pair in one.pairs.values()
            if isinstance(pair.A, Thin)]  # fmt: skip
    assert held
    assert all(V.data_ptr() != x.data_ptr() for V in held)
    assert reference.relative_error(K.to_dense(), expected) < 1e-14


class Roots(nn.Module):
    """Whose derivative is NaN where its argument is not positive."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * (x > 0)).sqrt()


@pytest.mark.parametrize("n", [3, 40])
def test_derivatives_that_are_no_numbers_are_refused(n):
    model = nn.Sequential(nn.Linear(40, 30), Roots(), nn.Linear(30, 3)).double()
    x, y = batch(n)
    with pytest.raises(DataError, match="holds NaN or infinity"):
        KFAC(model, "classification", (x, y)).to_dense()
