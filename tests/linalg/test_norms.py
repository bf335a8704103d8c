"""Norms: brackets hold over many seeds, standard errors are standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvops.errors import DataError, ShapeError
from curvops.linalg.norms import frobenius_norm, spectral_norm

P = 200
SPECTRA = {
    "flat": torch.linspace(0.99, 1, P, dtype=torch.float64),
    "indefinite": torch.linspace(-1, 0.999, P, dtype=torch.float64),
    "twins": torch.cat((torch.tensor([-5.0, 5.0]), torch.linspace(0, 4.9, P - 2))).double(),
    "power": 1e6 * torch.arange(1, P + 1, dtype=torch.float64) ** -2,
    "edge": torch.linspace(0, 1, P, dtype=torch.float64) ** 0.1,
    "rank one": torch.cat((torch.tensor([3.0]), torch.zeros(P - 1))).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rtol", [0.3, 0.01])
def test_spectral_bracket_holds_over_seeds(name: str, rtol: float, dtype: torch.dtype) -> None:
    # The Krylov space sees a matrix only through its spectrum and the start, so diagonal ones tell all.
    values = SPECTRA[name].to(dtype)[:, None]
    exact = float(values.abs().max())
    for number in range(20):
        generator = torch.Generator().manual_seed(number)
        for is_psd in (False, True) if bool((values >= 0).all()) else (False,):
            norm, report = spectral_norm(
                lambda V: values * V, P, rtol=rtol, is_psd=is_psd, generator=generator, dtype=dtype
            )
            low, high = report.bracket
            assert norm == low == report.value
            rounding = 100 * torch.finfo(dtype).eps * exact
            assert low <= exact + rounding
            assert exact <= high + rounding
            # Slightly wider than asked at most: the bound is on θ/‖A‖, the bracket relative to θ.
            assert high - low <= 1.5 * rtol * exact + rounding
            assert report.matvecs <= P


def test_spectral_norm_is_exact_where_the_space_is_exhausted() -> None:
    norm, report = spectral_norm(lambda V: 3 * V, 50)
    assert norm == pytest.approx(3.0, rel=1e-12)
    assert report.matvecs == 1
    assert report.half_width < 1e-12
    norm, _ = spectral_norm(lambda V: 0 * V, 50)
    assert norm == 0.0
    norm, report = spectral_norm(lambda V: -2 * V, 1)
    assert (norm, report.matvecs) == (pytest.approx(2.0), 1)


def test_frobenius_norm_covers_at_the_stated_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(30, P, generator=generator, dtype=torch.float64) * SPECTRA["edge"]
    exact = float(J.norm())
    inside = 0
    for number in range(200):
        value, report = frobenius_norm(lambda V: J @ V, P, probes=12, generator=torch.Generator().manual_seed(number))
        inside += abs(value - exact) <= report.half_width
        assert (report.probes, report.matvecs) == (12, 12)
    # 95 % of 200, four standard deviations down.
    assert inside >= 178


def test_frobenius_norm_meets_its_target(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(40, 2000, generator=generator, dtype=torch.float64).to(dtype)
    value, report = frobenius_norm(lambda V: J @ V, 2000, rtol=0.02, dtype=dtype)
    assert report.converged
    assert report.half_width <= 0.02 * value
    assert abs(value - float(J.norm())) < 2 * report.half_width
    again, _ = frobenius_norm(lambda V: J @ V, 2000, rtol=0.02, dtype=dtype)
    assert again == value
    _, report = frobenius_norm(lambda V: J @ V, 2000, rtol=1e-6, max_probes=20, dtype=dtype)
    assert not report.converged
    assert "max_probes" in report.reason


def test_frobenius_norm_by_unit_vectors() -> None:
    J = torch.randn(7, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, report = frobenius_norm(lambda V: J @ V, P, rtol=1e-4)
    assert value == pytest.approx(float(J.norm()), rel=1e-12)
    assert (report.half_width, report.stderr) == (0.0, 0.0)
    # Products spent before the change of mind are counted.
    assert report.matvecs > P


def test_bad_input() -> None:
    def identity(V: Tensor) -> Tensor:
        return V

    for rtol in (0.0, -1.0):
        with pytest.raises(ValueError, match="rtol"):
            spectral_norm(identity, 5, rtol=rtol)
        with pytest.raises(ValueError, match="rtol"):
            frobenius_norm(identity, 5, rtol=rtol)
    with pytest.raises(ValueError, match="probes"):
        frobenius_norm(identity, 5, probes=1)
    for norm in (spectral_norm, frobenius_norm):
        with pytest.raises(ShapeError, match="size"):
            norm(identity, 0)
        with pytest.raises(ShapeError, match="float16"):
            norm(identity, 5, dtype=torch.float16)
        with pytest.raises(DataError, match="NaN"):
            norm(lambda V: V * math.nan, 50)
