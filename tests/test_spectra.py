"""One run, many answers: spectra, traces by block, norms, eigenpairs and gradients through the public verbs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import curvops as co
from curvops.errors import NotPositiveDefiniteError, ShapeError, UnsupportedError
from curvops.testing import problems


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def ggn() -> co.GGN:
    p = problems.problem("mlp")
    return co.GGN(p.model(), p.likelihood, p.data())


@pytest.fixture(scope="module")
def values(ggn: co.GGN) -> Tensor:
    return torch.linalg.eigvalsh(ggn.to_dense()).clamp(min=0)


# ---------------------------------------------------------------- spectrum


def test_a_spectrum_answers_every_question_without_a_further_product(ggn: co.GGN, values: Tensor) -> None:
    before = ggn.matvec_count
    spectrum = ggn.spectrum(probes=40, steps=12)
    spent = ggn.matvec_count - before
    assert spent == spectrum.matvecs <= 480
    for delta in (0.01, 0.1, 1.0, 10.0):
        logdet, dimension = spectrum.logdet(delta), spectrum.effective_dimension(delta)
        assert abs(logdet.value - float((values + delta).log().sum())) <= 1.5 * logdet.half_width
        assert abs(dimension.value - float((values / (values + delta)).sum())) <= 1.5 * dimension.half_width
    trace = spectrum.trace_of(lambda x: x)
    assert abs(trace.value - float(values.sum())) <= 1.5 * trace.half_width
    count = spectrum.count((0.5, math.inf))
    assert (
        count.bracket[0] - 1.5 * count.half_width
        <= float((values >= 0.5).sum())
        <= count.value + 1.5 * count.half_width
    )
    density = spectrum.density(torch.linspace(-5, 20, 500, dtype=torch.float64))
    assert float(torch.trapezoid(density.value, dx=25 / 499)) == pytest.approx(len(values), rel=0.05)
    assert ggn.matvec_count - before == spent


def test_a_spectrum_without_a_bound_refuses_logarithms() -> None:
    p = problems.problem("mlp")
    spectrum = co.Hessian(p.model(), p.likelihood, p.data()).spectrum(5, 10)
    assert spectrum.trace_of(torch.abs).value > 0
    with pytest.raises(NotPositiveDefiniteError, match="lower bound"):
        spectrum.logdet(1.0)


def test_a_spectrum_is_repeatable_and_takes_a_generator(ggn: co.GGN) -> None:
    assert torch.equal(ggn.spectrum(2, 5).nodes, ggn.spectrum(2, 5).nodes)
    other = ggn.spectrum(2, 5, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.nodes, ggn.spectrum(2, 5).nodes)


# ---------------------------------------------------------------- traces


def test_block_traces_are_those_of_the_parameters(ggn: co.GGN) -> None:
    d = ggn.to_dense().diagonal()
    names = [name for name, _ in problems.problem("mlp").model().named_parameters()]
    exact = ggn.block_traces()
    assert list(exact) == names
    assert sum(float(t) for t in exact.values()) == pytest.approx(float(d.sum()))
    for name, part in (ggn.layout or {}).items():
        assert float(exact[name]) == pytest.approx(float(d[part].sum()))
    before = ggn.matvec_count
    estimate, report = ggn.block_traces(method=co.Hutchinson(probes=60), return_report=True)
    assert ggn.matvec_count - before == report.matvecs == 60  # one run for all blocks
    for i, name in enumerate(names):
        assert abs(float(estimate[name]) - float(exact[name])) <= 2 * float(report.half_width[i])
    assert "block_traces" in ggn.explain("block_traces")


def test_block_traces_take_the_blocks_they_are_given(ggn: co.GGN) -> None:
    d = ggn.to_dense().diagonal()
    found = ggn.add_diagonal(2.0).block_traces({"head": slice(0, 3), "picked": torch.tensor([5, 1])})
    assert float(found["head"]) == pytest.approx(float(d[:3].sum()) + 6)
    assert float(found["picked"]) == pytest.approx(float(d[[5, 1]].sum()) + 4)
    with pytest.raises(ShapeError, match="no named parameters"):
        co.Identity(4).block_traces()
    with pytest.raises(ShapeError, match="block 'x'"):
        co.Identity(4).block_traces({"x": torch.tensor([4])})
    with pytest.raises(UnsupportedError, match="expected Hutchinson"):
        ggn.block_traces(method=co.SLQ())


@pytest.mark.parametrize(
    "method", [co.Hutchinson(), co.XTrace(), co.Hutchinson(rtol=0.05), co.XTrace(probes=8)], ids=str
)
def test_estimated_traces_stay_within_their_half_width(ggn: co.GGN, values: Tensor, method: object) -> None:
    value, report = ggn.trace(method, return_report=True)
    assert abs(float(value) - float(values.sum())) <= 1.5 * report.half_width + 1e-9


@pytest.mark.parametrize("method", [co.Hutchinson(), co.XDiag()], ids=str)
def test_estimated_diagonals_meet_their_target(ggn: co.GGN, method: object) -> None:
    exact = ggn.to_dense().diagonal()
    value, report = ggn.diagonal(method, return_report=True)
    assert report.converged
    assert float((value - exact).norm() / exact.norm()) <= 0.075  # 5 % in at least 95 % of runs


# ---------------------------------------------------------------- norms


def test_spectral_norms_are_bracketed_for_every_shape(ggn: co.GGN) -> None:
    p = problems.problem("mlp")
    J = co.Jacobian(p.model(), p.data())
    H = co.Hessian(p.model(), p.likelihood, p.data())
    for A in (ggn, J, H, ggn.add_diagonal(0.5)):
        exact = float(torch.linalg.matrix_norm(A.to_dense(), 2))
        value, report = A.spectral_norm(return_report=True)
        low, high = report.bracket
        assert low * (1 - 1e-12) <= exact <= high * (1 + 1e-12)
        assert float(value) == report.value
        assert report.value == pytest.approx(exact, rel=2e-3)


def test_frobenius_norms_exact_and_estimated(ggn: co.GGN) -> None:
    exact = float(ggn.to_dense().norm())
    assert float(ggn.frobenius_norm()) == pytest.approx(exact, rel=1e-12)
    value, report = ggn.frobenius_norm(co.Hutchinson(probes=30), return_report=True)
    assert abs(float(value) - exact) <= 1.5 * report.half_width


# ---------------------------------------------------------------- eigenpairs


def test_eigenvectors_take_the_shapes_of_the_parameters(ggn: co.GGN) -> None:
    model = problems.problem("mlp").model()
    pairs = ggn.eigsh(3)
    trees = co.unflatten(pairs.vectors, model)
    for name, parameter in model.named_parameters():
        assert trees[name].shape == (*parameter.shape, 3)
    first = co.unflatten(pairs.vectors[:, -1], model)
    assert torch.equal(co.flatten(first), pairs.vectors[:, -1])


@pytest.mark.parametrize(("which", "sigma"), [("LA", None), ("SA", None), ("LM", None), ("BE", None), (None, 1.0)])
def test_eigenpairs_of_networks_carry_residuals(which: str | None, sigma: float | None) -> None:
    p = problems.problem("mlp")
    H = co.Hessian(p.model(), p.likelihood, p.data())
    M = H.to_dense()
    pairs, report = H.eigsh(4, which, sigma, return_report=True)
    exact = torch.linalg.eigvalsh(M)
    order = {
        "LA": exact.argsort(descending=True),
        "SA": exact.argsort(),
        "LM": exact.abs().argsort(descending=True),
        "BE": torch.tensor([0, 1, len(exact) - 2, len(exact) - 1]),
        None: (exact - 1.0).abs().argsort(),
    }[which]
    torch.testing.assert_close(pairs.values, exact[order[:4].sort().values], rtol=1e-9, atol=1e-10)
    residuals = (M @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert float(residuals.max()) <= 1e-9
    assert float((residuals - pairs.residuals).abs().max()) <= 1e-9
    assert report.matvecs > 0


def test_a_clustered_end_falls_back_on_a_dense_copy() -> None:
    """The kernel of a low-rank curvature has no few smallest eigenvalues for ARPACK: P products answer exactly."""
    U = normal(200, 8)
    G = co.Closure(lambda V: U @ (U.T @ V), (200, 200), batched=True, is_psd=True)
    tiny = torch.linspace(0, 1e-7, 200, dtype=torch.float64)
    A = G + co.Closure(lambda V: tiny[:, None] * V, (200, 200), batched=True, is_psd=True)
    pairs, report = A.eigsh(4, "SA", return_report=True)
    exact = torch.linalg.eigvalsh(U @ U.T + torch.diag(tiny))[:4]
    torch.testing.assert_close(pairs.values, exact, rtol=1e-6, atol=1e-11)
    assert report.matvecs <= 20 * 200


def test_progress_is_shown_when_asked(ggn: co.GGN, capsys: pytest.CaptureFixture[str]) -> None:
    ggn.eigsh(2, progress=True)
    assert "eigsh" in capsys.readouterr().err
    ggn.spectrum(2, 5, progress=True)
    assert "Lanczos" in capsys.readouterr().err
    ggn.eigsh(2)
    ggn.spectrum(2, 5)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", [None, co.Cholesky(), co.FunctionSpace(), co.Eigh()], ids=str)
def test_exact_logdets_are_differentiable_in_damping_and_factor(ggn: co.GGN, method: object) -> None:
    delta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, f: (f * ggn).add_diagonal(d).logdet(method), (delta, c))
    D = torch.linspace(0.5, 2.0, ggn.shape[0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: ggn.add_diagonal(d).logdet(method), (D,))


def test_stochastic_gradients_come_with_their_own_error(ggn: co.GGN) -> None:
    """In δ, in a factor and in every entry of a vector D; the block solve waits for the backward pass."""
    M = ggn.to_dense()
    size = len(M)
    D = torch.linspace(0.5, 2.0, size, dtype=torch.float64).requires_grad_()
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    A = (c * ggn).add_diagonal(D)
    value, report = A.logdet(co.SLQ(probes=200, steps=12), return_report=True)
    forward = A.matvec_count
    assert forward <= 200 * 13
    value.backward()
    assert A.matvec_count > forward
    inverse = torch.linalg.inv(2 * M + torch.diag(D.detach()))
    assert report.gradient_stderr is not None
    error_d, error_c = report.gradient_stderr(D, c)
    assert D.grad is not None
    assert c.grad is not None
    z = (D.grad - inverse.diagonal()) / (error_d + 1e-6)
    assert float(z.abs().max()) < 4.5
    assert 0.3 < float(z.square().mean()) < 2.5
    assert abs(float(c.grad - (inverse * M).sum())) <= 3 * float(error_c)
    with torch.no_grad():
        _, plain = A.logdet(co.SLQ(probes=10, steps=5), return_report=True)
    assert plain.gradient_stderr is None


def test_nothing_is_multiplied_for_gradients_that_nobody_asked(ggn: co.GGN) -> None:
    A = ggn.add_diagonal(0.5)
    _, report = A.logdet(co.SLQ(probes=10, steps=5), return_report=True)
    assert A.matvec_count == report.matvecs == 50
