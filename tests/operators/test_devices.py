"""Tensors are made on the operator's device and in its dtype, whatever the defaults of torch are."""

from __future__ import annotations

import pytest
import torch
from defaults import strange_defaults

from curvops.errors import CurvopsError
from curvops.operators import LinearOperator
from curvops.operators.methods import SLQ, Hutchinson, Lanczos, XDiag, XTrace
from curvops.testing.zoo import Case, Parts, zoo


def _answers(A: LinearOperator, v: torch.Tensor) -> dict[str, object]:
    calls = {
        "product": lambda: A @ v,
        "dense": A.to_dense,
        "submatrix": lambda: A.submatrix(torch.arange(2, device="cpu")).to_dense(),
        "damped": lambda: A.add_diagonal(100.0).solve(v),
        "determinant": lambda: A.add_diagonal(100.0).logdet(),
        "solve": lambda: A.solve(v),
        "slogdet": lambda: A.slogdet()[1],
        "trace": A.trace,
        "diagonal": A.diagonal,
        "root": lambda: A.sqrt_matvec(v),
        "largest": lambda: A.eigsh(1).values,
        "norm": A.frobenius_norm,
        "spectral norm": A.spectral_norm,
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except CurvopsError as refusal:
            found[name] = type(refusal)
    return found


@pytest.mark.parametrize(
    "case", [c for c in zoo() if c.build()[1].shape[0] == c.build()[1].shape[1]], ids=lambda c: c.name
)
def test_defaults_of_torch_do_not_matter(case: Case, dtype: torch.dtype) -> None:
    A, M = case.build(dtype)
    again, _ = case.build(dtype)
    v = Parts(dtype, "cpu").vector(len(M))
    expected = _answers(A, v)
    with strange_defaults():
        got = _answers(again, v)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name  # type: ignore[arg-type]
            assert got[name].dtype == value.dtype  # type: ignore[attr-defined]
        else:
            assert got[name] is value, name


@pytest.mark.parametrize("method", [SLQ(), Hutchinson(), XTrace(), XDiag(), Lanczos()], ids=str)
def test_defaults_of_torch_do_not_matter_to_estimates(method: object, dtype: torch.dtype) -> None:
    m = Parts(dtype, "cpu")
    A, v = m.closure(m.pd(60), is_psd=True, lower_bound=0.45), m.vector(60)

    def answer() -> torch.Tensor:
        if isinstance(method, SLQ):
            return A.logdet(method)
        if isinstance(method, Lanczos):
            return A.inv_sqrt_matvec(v, method)
        return A.diagonal(method) if isinstance(method, XDiag) else A.trace(method)  # type: ignore[arg-type]

    expected = answer()
    with strange_defaults():
        got = answer()
    assert torch.equal(got, expected)
