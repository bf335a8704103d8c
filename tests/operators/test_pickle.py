"""Operators of tensors survive pickle and torch.save; those that hold a function refuse in a sentence."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

from curvops.errors import UnsupportedError
from curvops.operators import BlockDiagonal, Deferred, Dense, Diagonal, Kronecker, LinearOperator, LowRank
from curvops.testing.zoo import Parts

m = Parts(torch.float64, "cpu")


def test_facts_travel_and_kept_content_does_not() -> None:
    A = Dense(m.pd(5), is_psd=True)
    A.memory_budget = 10**6
    A.logdet()
    A @ m.vector(5)
    twin: LinearOperator = pickle.loads(pickle.dumps(A))
    assert twin.is_psd
    assert twin.lower_bound == 0.0
    assert twin.memory_budget == 10**6
    assert twin.matvec_count == 0
    assert not twin._cache
    assert A._cache
    assert torch.equal(twin.logdet(), A.logdet())


def test_layout_and_notes_travel() -> None:
    A = BlockDiagonal(m.pd(2), LowRank(m.general(3, 1), captured=0.9), layout={"w": slice(0, 2), "b": slice(2, 5)})
    twin = pickle.loads(pickle.dumps(A.add_diagonal({"w": 0.5, "b": 1.0})))
    assert repr(twin) == repr(A.add_diagonal({"w": 0.5, "b": 1.0}))
    assert torch.equal(
        twin.add_diagonal({"w": 1.0, "b": 1.0}).to_dense(), A.to_dense() + torch.diag(torch.tensor([1.5, 1.5, 2, 2, 2]))
    )


def test_a_deferred_operator_is_saved_as_what_it_is_made_of() -> None:
    D = Deferred(lambda: Kronecker(m.pd(3), m.pd(2)), Kronecker, (6, 6), torch.float64, "cpu", is_psd=True)
    buffer = io.BytesIO()
    torch.save(2.0 * D.add_diagonal(0.5), buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert repr(twin) == "2.0·Kronecker(3×2) + 1.0·I"
    assert torch.allclose(twin.to_dense(), 2 * torch.kron(m.pd(3), m.pd(2)) + m.eye(6))


class FromNetwork(BlockDiagonal):
    """Blocks computed at first need, beside something that cannot be pickled."""

    def __init__(self) -> None:
        self.source = threading.Lock()
        block = Deferred(lambda: Dense(m.pd(2)), Dense, (2, 2), torch.float64, "cpu", is_psd=True)
        super().__init__(block, m.pd(3), layout={"w": slice(0, 2), "b": slice(2, 5)})
        self.memory_budget = 10**6


def test_blocks_of_a_network_travel_without_it() -> None:
    A = FromNetwork()
    for twin in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        assert type(twin) is BlockDiagonal
        assert twin.memory_budget == 10**6
        assert torch.equal(twin.add_diagonal({"w": 0.0, "b": 0.0}).to_dense(), torch.block_diag(m.pd(2), m.pd(3)))


def test_names_travel_with_what_was_deferred() -> None:
    D = Deferred(lambda: Diagonal(m.positive(4)), Diagonal, (4, 4), torch.float64, "cpu",
                 layout={"w": slice(0, 3), "b": slice(3, 4)})  # fmt: skip
    twin = pickle.loads(pickle.dumps(D))
    expected = m.positive(4) + torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert torch.equal(twin.add_diagonal({"w": 1.0, "b": 2.0}).diagonal(), expected)


def test_deepcopy_is_private() -> None:
    A = Dense(m.pd(4).clone())
    twin = copy.deepcopy(A)
    A.M.zero_()
    assert torch.equal(twin.to_dense(), m.pd(4))


def test_a_function_cannot_be_pickled() -> None:
    A = m.closure(m.pd(4), is_psd=True).add_diagonal(0.5)
    with pytest.raises(UnsupportedError, match=r"Closure\(4\) holds a function and cannot be pickled"):
        pickle.dumps(A)
