"""A tape gives the bits of the pass that it was taken from, on any vector; or there is none."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvops as co
from curvops.errors import StaleOperatorError
from curvops.nets.tape import Replay, record
from curvops.testing.problems import problem, problems

OFTEN = 14


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Tapes after eight runs."""
    monkeypatch.setattr("curvops.nets.tape._BEFORE", 8)


def vectors(size: int, count: int = OFTEN, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype))


def replays(operator) -> bool:
    return all(
        replayed is not None and replayed[1].replays
        for piece in (kept.piece for kept in operator._linearised.values())
        for replayed in [getattr(piece, "linearisation", piece)._replayed]
    )


@pytest.mark.parametrize("kind", [co.GGN, co.EmpiricalFisher, co.MCFisher, co.Hessian])
@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_same_bits_on_every_network(p, kind, dtype):
    model, data = p.model(dtype), p.data(dtype)
    key = next(iter(data[0])) if isinstance(data[0], Mapping) else "input_ids"
    often, fresh = (kind(model, p.loss(dtype), data, params=p.params, dict_key_x=key) for _ in range(2))
    few = vectors(often.shape[1], dtype=dtype)
    for k, v in enumerate(few):
        result = often @ v
        if k % 8 == 0:  # never twice as often as makes a tape
            fresh.release()
        assert torch.equal(result, fresh @ v), k
    assert replays(often) != replays(fresh)


@pytest.mark.parametrize("kind", [co.GGN, co.Hessian])
def test_columns_in_turn(kind, monkeypatch):
    monkeypatch.setattr("curvops.nets.kept._SMALL", 0)
    p = problem("mlp")
    operator = kind(p.model(), p.loss(), p.data())
    V = torch.stack(vectors(operator.shape[1]), 1)
    expected = operator.to_dense() @ V
    operator.release()
    for columns in (slice(None), slice(3), slice(None, None, 2)):
        for matrix in (V[:, columns], V[:, columns].contiguous()):
            before = matrix.clone()
            assert reference.relative_error(operator @ matrix, expected[:, columns]) < 1e-12
            assert torch.equal(matrix, before)
    assert replays(operator)


def network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    return model, (torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.fixture
def replayed():
    """An operator with a tape, and its dense matrix."""
    model, data = network()
    dense = co.Hessian(model, "classification", data).to_dense()
    H = co.Hessian(model, "classification", data)
    for v in vectors(len(dense)):
        H @ v
    assert replays(H)
    return model, H, dense


class TestReplayed:
    def test_any_layout_and_mode(self, replayed):
        _, H, dense = replayed
        (v,) = vectors(len(dense), 1)
        strided = torch.stack([v, v], 1)[:, 0]
        assert reference.relative_error(H @ strided, dense @ v) < 1e-12
        with torch.no_grad():
            assert reference.relative_error(H @ v, dense @ v) < 1e-12
        with torch.inference_mode():
            assert reference.relative_error(H @ v.clone(), dense @ v) < 1e-12
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reference.relative_error(H @ v, dense @ v) < 1e-12
        assert not (H @ v).requires_grad

    def test_gradient_through_the_product(self, replayed):
        _, H, dense = replayed
        (v,) = vectors(len(dense), 1)
        v.requires_grad_()
        (grad,) = torch.autograd.grad(v @ (H @ v), v)
        assert reference.relative_error(grad, 2 * dense @ v.detach()) < 1e-12

    def test_values_that_are_no_numbers(self, replayed):
        _, H, dense = replayed
        assert bool((H @ torch.full((len(dense),), float("nan"), dtype=torch.float64)).isnan().all())
        assert torch.equal(
            H @ torch.zeros(len(dense), dtype=torch.float64), torch.zeros(len(dense), dtype=torch.float64)
        )

    def test_stale_parameters(self, replayed):
        model, H, dense = replayed
        (v,) = vectors(len(dense), 1)
        model[0].weight.data += 1
        with pytest.raises(StaleOperatorError, match=r"0\.weight"):
            H @ v
        model[0].weight.data -= 1
        assert reference.relative_error(H @ v, dense @ v) < 1e-9

    def test_rewritten_parameters(self, replayed):
        model, H, dense = replayed
        (v,) = vectors(len(dense), 1)
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight.clone())
        assert reference.relative_error(H @ v, dense @ v) < 1e-12

    def test_same_operations_are_counted(self, replayed):
        model, H, dense = replayed
        (v,) = vectors(len(dense), 1)
        fresh = co.Hessian(model, "classification", network()[1])
        fresh @ v
        counts = []
        for operator in (H, fresh):
            with FlopCounterMode(display=False) as counter:
                operator @ v
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    @pytest.mark.parametrize("begun", [True, False])
    def test_threads(self, replayed, begun):
        _, H, dense = replayed
        few = vectors(len(dense), 48)
        if not begun:  # the graph is there, and the tape is still to come
            for kept in H._linearised.values():
                kept.piece._replayed = None
        results: list[Tensor | None] = [None] * len(few)

        def work(start: int) -> None:
            for k in range(start, len(few), 3):
                results[k] = H @ few[k]

        threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for v, result in zip(few, results, strict=True):
            assert reference.relative_error(result, dense @ v) < 1e-12

    def test_nothing_outlives_the_operator(self):
        model, data = network()
        G = co.GGN(model, "classification", data)
        for v in vectors(G.shape[1]):
            G @ v
        piece = next(iter(G._linearised.values())).piece.linearisation
        watched = weakref.ref(piece)
        gc.disable()
        try:
            del G, piece
            assert watched() is None
        finally:
            gc.enable()


def test_an_activation_that_someone_writes_to_is_no_constant():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 3).double(), []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.tanh(self.layer(x)))
            return self.seen[-1]

    model, (_, data) = Keeps(), network()
    G = co.GGN(model, "classification", data)
    for v in vectors(G.shape[1]):
        G @ v
    assert replays(G)
    with torch.no_grad():
        for activation in model.seen:
            activation.mul_(2)
    with pytest.raises(StaleOperatorError, match="changed in place"):
        G @ v


class Unsteady:
    """Passes that no tape may stand for, each right at every run."""

    @staticmethod
    def branches(v: Tensor, row: Tensor) -> None:
        row.copy_(2 * v if v.sum() > 0 else v)

    @staticmethod
    def selects(v: Tensor, row: Tensor) -> None:
        row.zero_()
        row[v > 0] = v[v > 0]

    @staticmethod
    def leaves(v: Tensor, row: Tensor) -> None:
        row.copy_(torch.from_numpy(np.abs(v.numpy())))

    @staticmethod
    def lists(v: Tensor, row: Tensor) -> None:
        row.copy_(torch.tensor(v.tolist(), dtype=v.dtype).relu())

    @staticmethod
    def draws(v: Tensor, row: Tensor) -> None:
        row.copy_(v + 0 * torch.randn(len(v), dtype=v.dtype, generator=torch.Generator().manual_seed(0)))

    @staticmethod
    def hands_over(v: Tensor, row: Tensor) -> None:
        row.copy_(torch.from_dlpack(torch.utils.dlpack.to_dlpack(v.clone())))

    @staticmethod
    def fills_memory(v: Tensor, row: Tensor) -> None:
        there = torch.empty_like(v)
        ctypes.memmove(there.data_ptr(), v.data_ptr(), v.nbytes)
        row.copy_(there)

    @staticmethod
    def transforms(v: Tensor, row: Tensor) -> None:
        row.copy_(torch.func.hessian(lambda u: (u**3).sum())(v.detach()) @ v)

    def __init__(self) -> None:
        self.runs, self.kept = 0, torch.zeros(5, dtype=torch.float64)

    def counts(self, v: Tensor, row: Tensor) -> None:
        self.runs += 1
        row.copy_(v * self.runs)

    def keeps(self, v: Tensor, row: Tensor) -> None:
        self.kept.copy_(v)
        row.copy_(v + self.kept)

    @staticmethod
    def overwrites(v: Tensor, row: Tensor) -> None:
        row.copy_(v)
        v.mul_(2)


@pytest.mark.parametrize("often", [False, True], ids=["others", "one vector often"])
@pytest.mark.parametrize(
    "name",
    ["branches", "selects", "leaves", "lists", "draws", "hands_over", "fills_memory", "counts", "keeps", "overwrites"],
)
def test_no_tape_of_what_may_differ(name, often):
    replay, one, other = Replay(), Unsteady(), Unsteady()
    few = vectors(5, 2 * OFTEN)
    for v in [few[0]] * OFTEN * often + few:
        row, expected = torch.empty(5, dtype=torch.float64), torch.empty(5, dtype=torch.float64)
        mine, theirs = v.clone(), v.clone()
        replay(getattr(one, name), mine, row)
        getattr(other, name)(theirs, expected)
        assert torch.equal(row, expected) or name == "counts"
        assert torch.equal(mine, theirs)
    assert replay.replays is False


def test_a_pass_with_transforms_of_its_own_goes_on():
    replay = Replay()
    for v in vectors(5, 2 * OFTEN):
        row = torch.empty(5, dtype=torch.float64)
        replay(Unsteady.transforms, v, row)
        assert reference.relative_error(row, 6 * v**2) < 1e-14


def test_explain_says_what_is_replayed_and_what_is_not():
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y.register_hook(lambda g: g * 1 if bool(g.sum() > 0) else g)
            return y

    model, data = network()
    for net, words in ((model, "1 replayed from tapes"), (Branches(*model), "1 whose calls may differ and are not")):
        G = co.GGN(net, "classification", data)
        G @ vectors(G.shape[1])[0]
        assert "tapes" not in G.explain("matvec")
        assert "differ" not in G.explain("matvec")
        for v in vectors(G.shape[1]):
            G @ v
        assert words in G.explain("matvec")


def test_a_likelihood_that_changes_later():
    model, (x, _) = network()
    likelihood = co.likelihoods.Normal(1.0)
    G = co.GGN(model, likelihood, (x, torch.zeros(6, 3, dtype=torch.float64)))
    dense = G.to_dense()
    for v in vectors(len(dense)):
        G @ v
    likelihood.sigma = 2.0
    V = torch.stack(vectors(len(dense), 3), 1)
    assert reference.relative_error(G @ V, dense @ V) < 1e-12
    assert reference.relative_error(G @ V[:, 0], dense @ V[:, 0]) < 1e-12


def test_views_lists_and_writes():
    weights = torch.linspace(1, 2, 6, dtype=torch.float64)

    def run(v: Tensor, row: Tensor) -> None:
        a, b = v.split([2, 4])
        total = torch.zeros(6, dtype=v.dtype)
        total[:2] += a * weights[:2]
        total[2:].addcmul_(b, weights.view(3, 2).reshape(-1)[2:])
        values, _ = torch.cat([total, a]).sort()
        torch.mul(values[:6], 2.0, out=row)

    v, row, again = *vectors(6, 1), *torch.empty(2, 6, dtype=torch.float64)
    tape = record(run, v, row)
    assert tape is not None
    for other in vectors(6, 5):
        run(other, row)
        tape(other, again)
        assert torch.equal(row, again)
        tape(other, other)  # over the vector itself
        assert torch.equal(row, other)


def test_a_recording_holds_nothing_that_moves():
    def run(v: Tensor, row: Tensor) -> None:
        a = v.cos()
        watched = weakref.ref(a)
        b = a * a
        del a
        assert watched() is None
        row.copy_(b)

    v, row = *vectors(6, 1), torch.empty(6, dtype=torch.float64)
    tape = record(run, v, row)
    assert tape is not None
    tape(2 * v, row)
    assert torch.equal(row, (2 * v).cos().square())


def test_an_error_while_recording_leaves_nothing_behind():
    replay, fails = Replay(), [False]

    def run(v: Tensor, row: Tensor) -> None:
        if fails[0]:
            raise KeyboardInterrupt
        row.copy_(v.cos())

    row = torch.empty(5, dtype=torch.float64)
    for k, v in enumerate(vectors(5, 2 * OFTEN)):
        fails[0] = k in (8, 10)
        if fails[0]:
            with pytest.raises(KeyboardInterrupt):
                replay(run, v, row)
            continue
        replay(run, v, row)
        assert torch.equal(row, v.cos())
    assert replay.replays
