"""The table of errors, layer by layer: run `python tests/curvature/layer_table.py`, or pytest with -s on this file.

Each row is a network of `curvops.testing.problems`; each entry the relative error of the products of a matrix-free
operator with all unit vectors, against loops over data, outputs and parameters in plain autograd (`reference.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference
from curvature_subjects import built, oracle

from curvops.operators import LinearOperator
from curvops.testing.problems import problems

KINDS = ("GGN", "Hessian", "EF", "Jacobian")


def products(A: LinearOperator) -> Tensor:
    """The matrix by products with unit vectors, in float64."""
    return (A @ torch.eye(A.shape[1], dtype=A.dtype)).double()


def rows() -> list[tuple[str, list[float]]]:
    """Name, then float64 errors of every kind, then float32 errors of every kind."""
    return [
        (
            p.name,
            [
                reference.relative_error(products(built(kind, p, dtype)), oracle(kind, p.name))
                for dtype in (torch.float64, torch.float32)
                for kind in KINDS
            ],
        )
        for p in problems()
    ]


def text(table: list[tuple[str, list[float]]]) -> str:
    """The table as Markdown."""
    heads = [f"{kind} {bits}" for bits in ("f64", "f32") for kind in KINDS]
    lines = [f"| {'network':25s} | {' | '.join(f'{h:12s}' for h in heads)} |"]
    lines.append(f"|{'-' * 27}|{'|'.join(['-' * 14] * len(heads))}|")
    lines += [f"| {name:25s} | {' | '.join(f'{e:<12.1e}' for e in errors)} |" for name, errors in table]
    worst = [max(column) for column in zip(*(errors for _, errors in table), strict=True)]
    return "\n".join([*lines, f"| {'worst':25s} | {' | '.join(f'{e:<12.1e}' for e in worst)} |"])


@pytest.mark.slow
def test_layer_table():
    table = rows()
    print("\n" + text(table))
    half = len(KINDS)
    assert max(max(errors[:half]) for _, errors in table) <= 1e-12
    assert max(max(errors[half:]) for _, errors in table) <= 5e-6


if __name__ == "__main__":
    print(text(rows()))
