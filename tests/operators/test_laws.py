"""Every law on every operator of the zoo, in both precisions."""

from __future__ import annotations

import pytest
import torch

from curvops.errors import ShapeError
from curvops.operators import Closure, Dense, Identity
from curvops.operators.formula import Formula
from curvops.testing.laws import LAWS, LawBroken, check_operator
from curvops.testing.zoo import Case, zoo


@pytest.mark.parametrize("case", zoo(), ids=lambda case: case.name)
def test_every_law(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    operator, matrix = case.build(dtype, device)
    assert len(check_operator(operator, dense=matrix)) == len(LAWS)


def test_a_broken_operator_is_caught_by_name() -> None:
    M = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    for broken, law in [
        (Closure(lambda v: M @ v, (2, 2), is_symmetric=True), "transpose is adjoint"),
        (Closure(lambda v: M @ v + 1.0, (2, 2), rmatvec=lambda v: M.T @ v), "products are linear"),
        (Closure(lambda v: M @ v, (2, 2), rmatvec=lambda v: M @ v), "transpose is adjoint"),
        (Closure(lambda v: (M + M.T) @ v, (2, 2), is_psd=True, lower_bound=4.5), "facts are true"),
        (Miscounting(M), "products are counted"),
        (Talkative(M), "words compute nothing"),
    ]:
        with pytest.raises(LawBroken, match=f"law broken: {law}: .*\n.*operator: "):
            check_operator(broken)
    with pytest.raises(LawBroken, match="off by"):
        check_operator(Dense(M), dense=M + 1e-6)
    assert check_operator(Dense(M), dense=M)


def test_a_changed_network_is_caught() -> None:
    network = torch.nn.Linear(2, 1).double()

    def nudge(v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            network.bias += 1.0
        return v

    with pytest.raises(LawBroken, match=r"changed \['bias'\] of the network"):
        check_operator(Closure(nudge, (2, 2), is_symmetric=True), user=network)


def test_sizes_and_oracles_are_checked() -> None:
    with pytest.raises(ShapeError, match="dense has shape"):
        check_operator(Dense(torch.eye(2)), dense=torch.eye(3))
    with pytest.raises(ShapeError, match="1 to 512"):
        check_operator(Identity(1000))


class Miscounting(Dense):
    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        self._count += 1
        return self._matmat(V)


class Talkative(Dense):
    def _formula(self) -> Formula:
        return Formula("leaf", f"Talkative(norm {float(self._apply(torch.eye(2, dtype=self.dtype)).norm()):.2f})")
