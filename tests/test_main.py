"""The command line: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import curvops
from curvops.__main__ import main

USERS_CODE = """
import torch
def network():
    return torch.nn.Linear(3, 2).double().eval()
def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    return x, torch.arange(12) % 2
def wrong_data():
    return torch.zeros(3)
"""


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_main.py").write_text(USERS_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_main", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN = ["report", "--model", "users_main:network", "--data", "users_main:data", "--likelihood", "classification"]


def test_info_names_versions_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"curvops {curvops.__version__}" in said
    for extra in ("plot", "report", "asdl", "laplace", "hf", "peers", "notebooks"):
        assert f"\n  {extra} " in said


def test_info_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvops.extras.version_of", lambda distribution: None)
    assert main(["info"]) == 0
    assert "  hf         pip install 'curvops[hf]'" in capsys.readouterr().out


def test_report_on_the_users_network(capsys: pytest.CaptureFixture[str], users_folder: Path) -> None:
    assert main([*OWN, "--samples", "20", "--eigenvalues", "2"]) == 0
    said = capsys.readouterr().out
    assert "P = 8 parameters, N = 12 data" in said
    assert "PASS: every number" in said
    assert (users_folder / "curvops-report" / "summary.txt").read_text(encoding="utf-8") in said
    assert (users_folder / "curvops-report" / "spectrum.png").exists()


def test_a_failed_check_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from curvops.report import checks, reference

    monkeypatch.setattr(checks, "dense_ggn", lambda objective: 2 * reference.dense_ggn(objective))
    assert main([*OWN, "--samples", "20", "--eigenvalues", "2"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["raport"],
        ["report", "--likelihood", "poisson"],
        ["report", "--delta", "one"],
        ["report", "--model", "users_main:network"],
        OWN[:-2],
    ],
)
def test_bad_arguments_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m curvops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "--delta", "-1"], "DataError: delta=-1.0: expected a positive prior precision"),
        (["report", "--samples", "0"], "DataError: samples=0"),
        (["report", "--out", "users_main.py"], "choose another --out"),
        ([*OWN[:2], "users_main:missing", *OWN[3:]], "has no 'missing'"),
        ([*OWN[:4], "users_main:wrong_data", *OWN[5:]], "DataError"),
    ],
)
def test_errors_are_a_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_missing_extra_is_exit_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(OWN) == 2
    assert "pip install 'curvops[report]'" in capsys.readouterr().err
