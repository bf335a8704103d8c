"""Every interface class, method, setting and network: right to an oracle, or refused with advice; and the README."""

from __future__ import annotations

import conformance
import pytest
from conformance import CLASSES, METHODS, NATIVE, NETWORKS, SETTINGS, cell, installed

from curvops.testing.problems import problems

QUICK = ("mlp-regression", "cnn")
ZOO = tuple(p.name for p in problems() if p.params is None and p.twin is None and p.name != "raw-parameters")


def classes(*quick: str) -> list[object]:
    """All classes, ASDL's among the peers; where some are named, the others are slow."""
    return [
        pytest.param(
            c, marks=pytest.mark.peers if c.startswith("Asdl") else pytest.mark.slow if quick and c not in quick else ()
        )
        for c in CLASSES
    ]


def require(
    cls: str, networks: tuple[str, ...], settings: tuple[str, ...] = ("plain",), methods: tuple[str, ...] = METHODS
) -> None:
    """No cell is wrong, and the native classes refuse nothing but a Hessian's factors."""
    assert installed(cls)
    for network in networks:
        for setting in settings:
            for method in methods:
                answer = cell(cls, method, network, setting)
                where = (cls, method, network, setting, answer.detail)
                assert answer.verdict != "wrong", where
                if cls in NATIVE and answer.verdict == "refused":
                    assert method == "kron", where
                    assert cls == "HessianInterface" or setting == "subnetwork", where


@pytest.mark.parametrize("cls", classes())
def test_methods(cls: str) -> None:
    require(cls, QUICK)


@pytest.mark.parametrize("cls", classes("EFInterface", "CurvlinopsGGN", "BackPackGGN"))
def test_settings(cls: str) -> None:
    require(cls, ("mlp",), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [c for c in CLASSES if not c.startswith("Asdl")])
def test_the_whole_zoo(cls: str) -> None:
    # Factors by their definition are written down for the layers of the table's networks alone.
    require(cls, ZOO, methods=tuple(method for method in METHODS if method != "kron"))


def test_what_is_always_right_and_what_is_refused_by_name() -> None:
    assert cell("BackPackGGN", "kron", "cnn").verdict == "right"
    assert "padding='same'" in cell("BackPackGGN", "diag", "conv2d-same").detail
    assert "tied" in cell("CurvlinopsGGN", "kron", "tied").detail
    assert "tied" in cell("BackPackEF", "jacobians", "tied").detail
    assert cell("CurvlinopsHessian", "full", "layernorm").verdict == "right"
    assert cell("HessianInterface", "kron", "mlp").verdict == "refused"


def test_a_wrong_number_and_a_refusal_without_advice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import curvops as co
    from curvops.errors import UnsupportedError

    class Wrong(co.GGNInterface):
        def _diag(self, objective):
            return 1.001 * super()._diag(objective)

        def _full(self, objective):
            raise UnsupportedError("no")

    monkeypatch.setattr(co, "GGNInterface", Wrong)
    assert cell.__wrapped__("GGNInterface", "diag", "mlp").verdict == "wrong"
    assert cell.__wrapped__("GGNInterface", "full", "mlp").detail == "no advice: no"
    assert cell.__wrapped__("GGNInterface", "gradients", "mlp").verdict == "right"


# ---------------------------------------------------------------- the README


def test_the_readme_has_a_line_for_every_class_and_one_is_asked() -> None:
    lines = conformance.in_readme().splitlines()
    for cls in CLASSES:
        assert sum(line.startswith(f"| `{cls}` |") for line in lines) == 2
    assert f"| `BackPackGGN` | {' | '.join(conformance.by_setting('BackPackGGN'))} |" in lines


@pytest.mark.slow
def test_the_readme_is_what_the_code_answers() -> None:
    ours = [cls for cls in CLASSES if not cls.startswith("Asdl")]
    assert not set(conformance.rows(ours)) - set(conformance.in_readme().splitlines())


@pytest.mark.peers
def test_the_readme_is_what_the_code_answers_with_every_library() -> None:
    assert all(installed(cls) for cls in CLASSES)
    assert conformance.text() == conformance.in_readme()


def test_networks_of_the_table_are_problems() -> None:
    assert set(NETWORKS) <= {p.name for p in problems()}
