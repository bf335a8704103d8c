"""The report: its numbers, its verdict, its files; and what it refuses."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import reference as oracle
import torch
from untouched import untouched

from curvops.curvature.matrixfree import GGN, Jacobian
from curvops.errors import ConvergenceError, DataError, MissingExtraError
from curvops.report import checks, digits, subject
from curvops.report import reference as dense
from curvops.report.measure import Measurements, Settings, measure
from curvops.report.subject import Subject
from curvops.report.write import report
from curvops.testing import problem

SETTINGS = Settings(eigenvalues=3, samples=50, probes=10, steps=20)


def small(dtype: torch.dtype = torch.float64, likelihood: str = "classification") -> Subject:
    """A 4-5-3 network on 40 random inputs."""
    generator = torch.Generator().manual_seed(3)
    model = digits.network(1, (4, 5, 3)).to(dtype)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (40,), generator=generator)
    if likelihood != "classification":
        y = torch.nn.functional.one_hot(y, 3).to(dtype)
    return Subject("a small network", model, likelihood, (x, y), (x, y), ("Not trained.",))


@pytest.fixture(scope="module")
def measured() -> Measurements:
    return measure(small(), SETTINGS)


def test_digits_are_split_as_announced_without_touching_global_randomness() -> None:
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    (x, y), (x_test, y_test) = digits.digits(seed=4)
    model = digits.network(seed=4)
    assert (x.shape, y.shape, x_test.shape, y_test.shape) == ((1257, 64), (1257,), (540, 64), (540,))
    assert float(x.max()) == 1.0
    assert sum(p.numel() for p in model.parameters()) == 1210
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()
    again = digits.network(seed=4).state_dict()
    assert all(torch.equal(p, again[name]) for name, p in model.state_dict().items())
    assert not torch.equal(digits.network(seed=5)[0].weight, model[0].weight)


def test_training_ends_at_a_mode_of_the_posterior() -> None:
    s = small()
    norm = digits.train(s.model, "classification", s.data, delta=0.5)
    x, y = s.data
    f = s.model(x)
    objective = torch.nn.functional.cross_entropy(f, y, reduction="sum")
    objective = objective + 0.25 * sum(p.square().sum() for p in s.model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(s.model.parameters()))])
    assert float(gradient.norm()) == pytest.approx(norm, rel=1e-6, abs=1e-12)
    assert norm < 1e-4
    assert all(p.grad is None for p in s.model.parameters())


def test_training_that_does_not_arrive_says_so() -> None:
    s = small()
    with pytest.raises(ConvergenceError, match="raise delta"):
        digits.train(s.model, "classification", s.data, rtol=1e-18)


@pytest.mark.parametrize(
    "name", ["mlp", "mlp-weighted", "mlp-regression", "mlp-binary", "tokens-ignored-weighted", "frozen"]
)
def test_dense_references_against_the_oracles(name: str) -> None:
    p = problem(name)
    model, (x, y), loss = p.model(), p.data(), oracle.problem_nll(p)
    objective = GGN(model, p.loss(), (x, y)).objective
    torch.testing.assert_close(dense.dense_ggn(objective), oracle.ggn(model, loss, x, y), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        dense.dense_hessian(objective), oracle.hessian(model, loss, x, y), rtol=1e-10, atol=1e-12
    )
    J = oracle.jacobian(model, x)
    J = J.reshape(-1, J.shape[-1])
    torch.testing.assert_close(dense.dense_jacobian_gram(objective), J.T @ J, rtol=1e-10, atol=1e-12)


def test_measurements_leave_the_subject_as_it_was() -> None:
    s = small()
    with untouched(s.model):
        measure(s, SETTINGS)


def test_every_check_passes_on_an_honest_run(measured: Measurements) -> None:
    verdict = checks.check(measured, SETTINGS)
    assert verdict.skipped is None
    assert len(verdict.checks) == 9
    assert verdict.passed, [c for c in verdict.checks if not c.passed]
    assert measured.missed == ()


@pytest.mark.parametrize(
    ("field", "failing"),
    [
        ("trace", "trace of the GGN"),
        ("logdet", "log det(GGN + δI)"),
        ("top_ggn", "top 3 eigenvalues of the GGN"),
        ("bottom_hessian", "smallest eigenvalue of the Hessian"),
        ("solution", "residual of the solve"),
        ("spread", "total predictive variance of the samples"),
    ],
)
def test_a_wrong_number_fails_its_check_and_no_other(measured: Measurements, field: str, failing: str) -> None:
    value = getattr(measured, field)
    if field in ("trace", "logdet"):
        wrong = dataclasses.replace(value, value=value.value + 3 * value.half_width + 1)
    elif field in ("top_ggn", "bottom_hessian"):
        wrong = dataclasses.replace(value, values=value.values + 1e-6)
    elif field == "solution":
        wrong = value * (1 + 1e-4)
    else:
        wrong = dataclasses.replace(value, deviations=2 * value.deviations)
    verdict = checks.check(dataclasses.replace(measured, **{field: wrong}), SETTINGS)
    assert [c.name for c in verdict.checks if not c.passed] == [failing]


def test_a_wrong_product_fails(measured: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "dense_hessian", lambda objective: dense.dense_hessian(objective) * (1 + 1e-9))
    failed = [c.name for c in checks.check(measured, SETTINGS).checks if not c.passed]
    assert "Hessian times random vectors" in failed
    assert "GGN times random vectors" not in failed


def test_a_nan_is_no_pass() -> None:
    assert not checks.Check("x", float("nan"), 1.0, "").passed


@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_report_writes_summary_and_picture(tmp_path: Path, likelihood: str) -> None:
    text, verdict = report(small(likelihood=likelihood), SETTINGS, tmp_path / "made" / "here")
    assert verdict.passed, text
    written = (tmp_path / "made" / "here" / "summary.txt").read_text(encoding="utf-8")
    assert written == text
    assert (tmp_path / "made" / "here" / "spectrum.png").read_bytes()[:4] == b"\x89PNG"
    for part in ("P = 43", "N = 40", "loss = ", "tr GGN", "log det(GGN + δI)", "residual", "samples", "Self-check"):
        assert part in text
    assert "PASS: every number" in text
    assert "{{" not in text
    assert "None" not in text


def test_report_in_float32(tmp_path: Path) -> None:
    text, verdict = report(small(torch.float32), Settings(delta=1.0, eigenvalues=3, samples=20, steps=10), tmp_path)
    assert "float32" in text
    assert verdict.passed, text


def test_a_large_subject_is_not_made_dense(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dense, "MAX_PARAMETERS", 10)
    verdict = checks.check(measured, SETTINGS)
    assert verdict.passed
    assert verdict.checks == ()
    assert verdict.skipped is not None
    assert "P = 43" in verdict.skipped
    text, _ = report(small(), SETTINGS, tmp_path)
    assert "SKIPPED: not compared with dense matrices: P = 43" in text


def test_the_predictive_inputs_are_the_first_ones() -> None:
    from curvops.report.predictive import first_data

    x, y = small().data
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    first, targets = first_data(batches, 7)
    assert torch.equal(first, x[:7])  # type: ignore[arg-type]
    assert torch.equal(targets, y[:7])


def test_spread_is_the_deviation_of_the_linearised_outputs(measured: Measurements) -> None:
    s = small()
    variance = (
        (Jacobian(s.model, s.data).to_dense() @ torch.linalg.inv(measured.damped.to_dense()))
        .mul(Jacobian(s.model, s.data).to_dense())
        .sum(1)
    )
    ratio = measured.spread.deviation.square() / variance
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.4)
    assert measured.spread.right is not None
    assert 0 < measured.spread.right < 0.5


@pytest.mark.parametrize(
    ("field", "value"), [("delta", 0.0), ("delta", float("nan")), ("seed", -1), ("samples", 0), ("eigenvalues", 0)]
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(DataError, match=field):
        Settings(**{field: value})  # type: ignore[arg-type]


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_code.py").write_text(
        "import torch\n"
        "def network():\n"
        "    return torch.nn.Linear(3, 2).double().eval()\n"
        "def batches():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    x = torch.randn(12, 3, generator=g, dtype=torch.float64)\n"
        "    return [(x[:8], torch.zeros(8, dtype=torch.long)), (x[8:], torch.ones(4, dtype=torch.long))]\n"
        "constant = 3\n"
    )
    (tmp_path / "users_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_code"  # type: ignore[misc]
    sys.modules.pop("users_code", None)


def test_users_network_and_batches(users_module: str, tmp_path: Path) -> None:
    s = subject.users_subject(f"{users_module}:network", f"{users_module}:batches", "classification")
    text, verdict = report(s, SETTINGS, tmp_path)
    assert verdict.passed, text
    assert "users_code:network on users_code:batches" in text


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("users_code", "expected module:factory"),
        ("users_code:", "expected module:factory"),
        ("no_such_module_at_all:network", "no module 'no_such_module_at_all'"),
        ("users_code:net", "has no 'net'; it has batches, constant, network, torch"),
        ("users_code:constant", "is a int; expected a function"),
        ("users_code:batches", "returned a list; expected a torch.nn.Module"),
    ],
)
def test_a_bad_factory_is_named(users_module: str, spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        subject.users_subject(spec, f"{users_module}:batches", "classification")


def test_a_failure_inside_the_users_module_is_not_hidden(users_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        subject.load("users_broken:network", "a network")


def test_a_file_in_the_way_and_a_missing_extra_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="choose another --out"):
        report(small(), SETTINGS, tmp_path / "taken")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'curvops\[report\]'"):
        report(small(), SETTINGS, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
