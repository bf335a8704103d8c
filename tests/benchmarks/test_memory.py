"""The memory model against measured peaks, each case in a process of its own."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.memory import compare

UNSEEN = 2**20
"""Differences below a megabyte: interpreter and libraries, not tensors."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("case", ["mlp", "cnn70k", "dense"])
def test_estimates_are_within_thirty_per_cent_of_the_peak(case):
    for verb, (estimated, measured) in compare(case).items():
        assert abs(estimated - measured) <= max(0.3 * measured, UNSEEN), (verb, estimated, measured)
