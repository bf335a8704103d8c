"""`pytest --shapes` really checks: a wrong shape inside curvops is caught, and right ones pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys
sys.path.insert(0, {tests!r})
from jaxtyping import TypeCheckError, install_import_hook
install_import_hook("curvops", "shapecheck.check")
import torch
from curvops import Dense
from curvops.linalg.dense import solve_cholesky
assert float(Dense(2 * torch.eye(3)).solve(torch.ones(3))[0]) == 0.5
try:
    solve_cholesky(torch.eye(3), torch.ones(4, 2))
except TypeCheckError as error:
    print("caught", "parameter 'B'" in str(error))
"""


def test_shapes_are_checked_on_request() -> None:
    probe = PROBE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "caught True\n", done.stderr
