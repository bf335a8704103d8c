"""What an iteration of conjugate gradients costs beside its product, ours and SciPy's, on a dense matrix of P = 1,210.

`python -m tests.benchmarks.overhead` prints microseconds per iteration. The matrix is the digits GGN + I, float64; each
solver runs to 1e-6 with a product `M v` of its own library, whose time, measured alone, is taken off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse.linalg as spla
import torch
from numpy.typing import NDArray

import curvops as co
from curvops.linalg.cg import cg
from tests.benchmarks.measure import interleaved
from tests.benchmarks.models import digits

_PRODUCTS = 50
_RTOL = 1e-6


def measure(rounds: int) -> dict[str, Any]:
    """Library → iterations, products, and microseconds of CPU time per iteration: of the product, and beside it."""
    model, x, y = digits()
    M = co.GGN(model.double(), "classification", (x.double(), y)).add_diagonal(1.0).to_dense()
    b = torch.ones(len(M), 1, dtype=M.dtype)
    N, n = M.numpy(), b.numpy()[:, 0]
    X, report = cg(lambda V: M @ V, b, rtol=_RTOL)
    theirs, iterations, products = _scipy(N, n)
    for solution in (X.numpy()[:, 0], theirs):
        assert np.linalg.norm(n - N @ solution) <= 1.01 * _RTOL * np.linalg.norm(n)
    times = interleaved(
        {
            "curvops": lambda: cg(lambda V: M @ V, b, rtol=_RTOL),
            "SciPy": lambda: spla.cg(N, n, rtol=_RTOL),
            "torch product": lambda: [M @ b for _ in range(_PRODUCTS)],
            "NumPy product": lambda: [N @ n for _ in range(_PRODUCTS)],
        },
        rounds,
    )

    def row(name: str, product: str, iterations: int, products: int) -> dict[str, float]:
        one = times[product].cpu / _PRODUCTS
        beside = (times[name].cpu - products * one) / iterations
        return {"iterations": iterations, "products": products, "product": 1e6 * one, "beside": 1e6 * beside}

    return {
        "curvops": row("curvops", "torch product", report.iterations, report.matvecs),
        "SciPy": row("SciPy", "NumPy product", iterations, products),
    }


def _scipy(N: NDArray[Any], n: NDArray[Any]) -> tuple[NDArray[Any], int, int]:
    """SciPy's answer, with its iterations and products."""
    seen = {"iterations": 0, "products": 0}

    def product(v: NDArray[Any]) -> NDArray[Any]:
        seen["products"] += 1
        return N @ v

    def count(_: object) -> None:
        seen["iterations"] += 1

    x, failed = spla.cg(spla.LinearOperator(N.shape, product, dtype=N.dtype), n, rtol=_RTOL, callback=count)
    assert not failed
    return x, seen["iterations"], seen["products"]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| CG on the digits GGN + I, P = 1,210 | iterations | products | µs per product | µs per iteration beside it |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {row['iterations']} | {row['products']} | {row['product']:.0f} | {row['beside']:.0f} |"
        for name, row in result.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(measure(15)))
