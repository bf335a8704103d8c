"""Data sources: every form that users pass, everything that is refused, and passes that must repeat."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

from curvops.errors import DataError, NonDeterministicDataError
from curvops.nets.data import DataSource, PassRecord, batch_length
from curvops.nets.passes import PrivateRandomness

X = torch.arange(30.0).reshape(10, 3)
Y = torch.arange(10)
DATASET = TensorDataset(X, Y)
NAN = float("nan")


class Counting:
    """Re-iterable that counts how often, and how far, it was read; its batches change with `change`."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.iterations, self.reads = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.iterations += 1
        for batch in self.batches:
            self.reads += 1
            yield batch


class Encoding(UserDict):
    """A mapping of its own kind, like a tokenizer's output."""


def chunks(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(sizes), Y.split(sizes), strict=True))


FORMS = {
    "tuple": ((X, Y), 10, [0], True),
    "list of tuples": (chunks(4, 4, 2), 10, [0, 4, 8], False),
    "list of lists": ([list(b) for b in chunks(4, 6)], 10, [0, 4], False),
    "tuple of two tuples": (tuple(chunks(5, 5)), 10, [0, 5], False),
    "loader": (DataLoader(DATASET, 4), 10, [0, 4, 8], False),
    "own iterable": (Counting(chunks(3, 7)), None, [0, 3], False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_data_in_every_pass(form: str) -> None:
    data, announced, positions, single = FORMS[form]
    source = DataSource(data)
    assert source.num_data == announced
    assert source.is_single_batch is single
    for _ in range(2):
        seen = list(source.batches())
        assert [b.index for b in seen] == list(range(len(positions)))
        assert [b.position for b in seen] == positions
        assert torch.equal(torch.cat([b.x for b in seen]), X)  # type: ignore[misc]
        assert torch.equal(torch.cat([b.y for b in seen]), Y)
        assert source.num_data == 10


def test_building_reads_nothing_and_a_pass_reads_once() -> None:
    data = Counting(chunks(4, 4, 2))
    source = DataSource(data, num_data=10)
    assert (source.num_data, source.num_batches, source.tensors(), repr(source)) == (
        10, None, [], "DataSource(N=10, Counting)",
    )  # fmt: skip
    assert data.iterations == 0
    list(source.batches())
    assert (data.iterations, data.reads) == (1, 3)


def test_an_abandoned_pass_reads_no_further_and_the_next_is_whole() -> None:
    data = Counting(chunks(4, 4, 2))
    source = DataSource(data)
    for _ in source.batches():
        break
    assert data.reads == 1
    assert source.num_data is None
    assert sum(b.y.shape[0] for b in source.batches()) == 10
    assert source.num_data == 10


# ---- mappings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, Encoding, UserDict])
def test_a_mapping_is_one_batch_without_its_targets(kind: type) -> None:
    data = kind({"input_ids": X, "mask": X > 3, "flag": True, "labels": Y})
    source = DataSource(data)
    assert source.is_single_batch
    assert source.num_data == 10
    ((index, position, x, y),) = source.batches()
    assert (index, position) == (0, 0)
    assert y is Y
    assert type(x) is kind
    assert list(x) == ["input_ids", "mask", "flag"]
    assert x["input_ids"] is X
    assert list(data) == ["input_ids", "mask", "flag", "labels"]


def test_mappings_in_pairs_and_in_loaders() -> None:
    class Rows(Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"pixels": X[i], "target": Y[i]}

    keys = {"dict_key_x": "pixels", "dict_key_y": "target"}
    source = DataSource(DataLoader(Rows(), 4), **keys)
    assert source.num_data == 10
    assert torch.equal(torch.cat([b.x["pixels"] for b in source.batches()]), X)
    pair = DataSource(({"pixels": X}, Y), **keys)
    (batch,) = pair.batches()
    assert list(batch.x) == ["pixels"]
    assert batch.y is Y


def test_tensors_are_named_for_the_watch() -> None:
    def named(data: Any) -> list[tuple[str, int]]:
        return [(name, t.data_ptr()) for name, t in DataSource(data).tensors()]

    assert named((X, Y)) == [("x", X.data_ptr()), ("y", Y.data_ptr())]
    assert [n for n, _ in named({"input_ids": X, "labels": Y, "flag": 1})] == ["x['input_ids']", "y"]
    a, b = chunks(4, 6)
    assert named([a, b]) == [
        ("x of batch 0", a[0].data_ptr()), ("y of batch 0", a[1].data_ptr()),
        ("x of batch 1", b[0].data_ptr()), ("y of batch 1", b[1].data_ptr()),
    ]  # fmt: skip
    assert named(DataLoader(DATASET, 4)) == []


def test_batch_length() -> None:
    assert batch_length(X) == 10
    assert batch_length({"input_ids": X[:4], "other": X}) == 4
    with pytest.raises(DataError, match=r"\['a', 'b'\].*dict_key_x"):
        batch_length({"b": X, "a": Y})


# ---- moving ---------------------------------------------------------------------------------------------------------


def test_moving_copies_only_what_must(device: torch.device) -> None:
    source = DataSource(({"input_ids": Y, "scale": X, "flag": None}, Y))
    (same,) = source.batches(device="cpu", dtype=torch.float32)
    assert same.x["input_ids"] is Y
    assert same.x["scale"] is X
    assert same.y is Y
    (cast,) = source.batches(device=device, dtype=torch.float64)
    assert cast.x["scale"].dtype == torch.float64
    assert cast.x["input_ids"].dtype == cast.y.dtype == torch.int64
    assert cast.x["scale"].device.type == cast.y.device.type == device.type
    assert torch.equal(cast.x["scale"].cpu(), X.double())


def test_pinned_batches_of_a_loader_are_queued_and_others_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's batches are nobody else's; another iterable may refill its buffer while a copy is under way."""
    queued: list[bool] = []

    def to(tensor: Tensor, *, non_blocking: bool = False, **_: Any) -> Tensor:
        queued.append(non_blocking)
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(Tensor, "to", to)
    for data, expected in ((DataLoader(DATASET, batch_size=5), True), (Counting([(X, Y), (X, Y)]), False)):
        for device, possible in (("cuda", True), ("cpu", False)):
            queued.clear()
            assert len(list(DataSource(data).batches(device=device))) == 2
            assert queued == [expected and possible] * 4


def test_targets_are_fit_for_autograd() -> None:
    with torch.inference_mode():
        source = DataSource((X, torch.ones(10, 1)))
        (batch,) = source.batches()
    assert not batch.y.is_inference()
    y = torch.ones(10, 1, requires_grad=True)
    (batch,) = DataSource((X, y)).batches()
    assert not batch.y.requires_grad
    assert y.requires_grad


# ---- N --------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("loader", "n"),
    [
        (DataLoader(DATASET, 4, drop_last=True), 8),
        (DataLoader(DATASET, 3, sampler=SubsetRandomSampler(range(7))), 7),
        (DataLoader(DATASET, batch_sampler=[[0, 1], [2]]), None),
        (DataLoader(Stream(), 4), None),
        (DataLoader(chunks(4, 6), batch_size=None), None),
    ],
    ids=["drop_last", "sampler", "batch_sampler", "stream", "no batching"],
)
def test_num_data_is_what_the_passes_give(loader: DataLoader, n: int | None) -> None:
    source = DataSource(loader)
    assert source.num_data == n
    seen = sum(b.y.shape[0] for b in source.batches())
    assert source.num_data == seen
    assert n in (None, seen)


def test_num_data_is_held_to() -> None:
    with pytest.raises(DataError, match="num_data is 11, but the data are 10"):
        DataSource((X, Y), num_data=11)
    source = DataSource(DataLoader(DATASET, 4), num_data=12)
    with pytest.raises(DataError, match=r"10 data in 3 batches, but num_data is 12.*num_data=10"):
        list(source.batches())
    doubled = DataLoader(DATASET, 5, collate_fn=lambda rows: (torch.stack([r[0] for r in rows] * 2), torch.zeros(10)))
    with pytest.raises(DataError, match="loader announces is 10"):
        list(DataSource(doubled).batches())


def test_empty_batches_are_passed_over() -> None:
    source = DataSource([*chunks(4, 6), (X[:0], Y[:0])])
    assert [b.index for b in source.batches()] == [0, 1]
    assert source.num_data == 10
    source = DataSource(Counting([chunks(4, 6)[0], (X[:0], Y[:0]), chunks(4, 6)[1]]))
    assert [(b.index, b.position) for b in source.batches()] == [(0, 0), (2, 4)]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (iter(chunks(4, 6)), r"gone through only once.*list"),
        ((b for b in chunks(4, 6)), "generator.*only once"),
        (X, r"Tensor of shape \(10, 3\), without targets"),
        (X.numpy(), "ndarray.*from_numpy"),
        ([X, Y], r"the tuple \(x, y\)"),
        ((X, Y, Y), r"tuple of 3.*the tuple \(x, y\)"),
        (DATASET, "DataLoader"),
        ("digits", "holds no batches"),
        (None, "NoneType.*expected a tuple"),
        ([], "no data"),
        ([(X[:0], Y[:0])], "only empty ones"),
        ((X[:0], Y[:0]), "the batch is empty"),
        ((X, Y[:9]), "10 inputs and 9 targets"),
        (({"input_ids": X}, Y[:9]), "10 inputs and 9 targets"),
        ((X[0, 0], Y), "0-dim inputs"),
        ((X, Y[0]), "0-dim targets.*DataLoader"),
        ({"input_ids": X, "y": Y}, r"'labels'; its keys are \['input_ids', 'y'\].*dict_key_y"),
        ({"ids": X, "labels": Y}, r"'input_ids'; its keys are \['ids'\].*dict_key_x"),
        ({"input_ids": X, "labels": [1, 2]}, "a list of 2.* as targets"),
        ({"input_ids": X, "text": ["a", "b"], "labels": Y}, r"\['text'\] is text.*Tokenise"),
        ({"input_ids": X, "title": "a", "labels": Y}, r"\['title'\] is text"),
        ({"input_ids": X, "extra": [1, 2], "labels": Y}, r"\['extra'\] is a list"),
        ({"input_ids": X.numpy(), "labels": Y}, r"\['input_ids'\] is a ndarray.*from_numpy"),
        ([(X, Y), (X, Y, Y)], "Batch 1 is a tuple of 3"),
        ([(X, Y), (X.numpy(), Y)], "Batch 1 has a ndarray as inputs.*from_numpy"),
        ([(X, Y), (X, [1])], "Batch 1 has a list of 1"),
        ([(X, Y), 3], "Batch 1 is a int"),
    ],
)
def test_what_is_refused_when_built(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        DataSource(data)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "gave no batch"),
        ([(X[:0], Y[:0])], "all 1 batches are empty"),
        ([(X, Y), X], "Batch 1 is a Tensor"),
        ([(X, Y), (X, Y[:2])], "Batch 1 has 10 inputs and 2 targets"),
        ([(X, Y), (X, Y), (X * NAN, Y)], r"x in batch 2 contain 30 NaN or Inf of 30"),
        ([(X, Y), (X, Y / 0.0)], r"y in batch 1 contain 10 NaN"),
        ([({"input_ids": X, "w": X / 0}, Y)], r"x\['w'\] in batch 0"),
    ],
)
def test_what_is_refused_in_a_pass(batches: list[Any], words: str) -> None:
    source = DataSource(Counting(batches))
    with pytest.raises(DataError, match=words):
        list(source.batches())


def test_nan_in_one_batch_is_named() -> None:
    with pytest.raises(
        DataError, match=r"values of x in the data contain 1 NaN or Inf of 30, the first at index \(7, 1\)"
    ):
        list(DataSource((X.clone().index_put((torch.tensor(7), torch.tensor(1)), torch.tensor(NAN)), Y)).batches())
    sparse = torch.eye(10).to_sparse() * NAN
    with pytest.raises(DataError, match="values of x"):
        list(DataSource((sparse, Y)).batches())


# ---- passes that must repeat ----------------------------------------------------------------------------------------


def test_an_exhausted_iterable_is_noticed() -> None:
    class Exhausted:
        def __init__(self) -> None:
            self.left = iter(chunks(4, 6))

        def __iter__(self) -> Iterator[Any]:
            return self.left

    source = DataSource(Exhausted())
    list(source.batches())
    with pytest.raises(NonDeterministicDataError, match=r"exhausted.*list"):
        list(source.batches())


def test_a_list_that_grew_is_noticed() -> None:
    data = chunks(4, 6)
    source = DataSource(data)
    list(source.batches())
    data.append((X, Y))
    with pytest.raises(NonDeterministicDataError, match="gave 20 data in 3 batches, the first one 10"):
        list(source.batches())


def run(source: DataSource, record: PassRecord, f: Any = lambda x: x.square()) -> None:
    for index, _, x, y in source.batches():
        record.observe(index, f(x), y)
    record.finish()


def test_equal_passes_are_accepted_and_rounding_forgiven(dtype: torch.dtype) -> None:
    source, record = DataSource(DataLoader(TensorDataset(X.to(dtype), Y), 4)), PassRecord()
    assert record.batches is None
    run(source, record)
    assert record.batches == 3
    eps = torch.finfo(dtype).eps
    run(source, record, lambda x: x.square() * (1 + 8 * eps))
    run(source, record)
    with pytest.raises(NonDeterministicDataError, match=r"outputs of batch 1 .*relative change 9.9e-03.*eval mode"):
        run(source, record, lambda x: x.square() * (1.01 if x[0, 0] == X[4, 0] else 1))


def test_shuffling_is_noticed_though_sums_are_equal() -> None:
    """One batch in another order: the same sum, another order; in outputs or, where these are constant, in targets."""
    for f in (lambda x: x.square(), torch.zeros_like):
        source, record = DataSource(DataLoader(DATASET, 10, shuffle=True)), PassRecord()
        run(source, record, f)
        with pytest.raises(NonDeterministicDataError, match=r"batch 0 differ.*shuffle=False"):
            run(source, record, f)


@pytest.mark.parametrize("order", [torch.tensor([1, 0]), torch.tensor([0])], ids=["rows exchanged", "a row missing"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)], ids=["BC", "BTC"])
def test_every_batch_is_compared(order: Tensor, shape: tuple[int, ...]) -> None:
    f = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    record = PassRecord()
    record.observe(0, f)
    record.observe(1, f + 1)
    record.finish()
    record.observe(0, f)

    def rest() -> None:
        record.observe(1, f[order] + 1)
        record.finish()

    with pytest.raises(NonDeterministicDataError, match=r"[Bb]atch 1 "):
        rest()


def test_outputs_exchanged_within_a_datum_are_noticed() -> None:
    f = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    record = PassRecord()
    record.observe(0, f)
    record.finish()
    record.observe(0, f.flip(1))
    with pytest.raises(NonDeterministicDataError, match="batch 0"):
        record.finish()


def test_nan_and_zero_outputs() -> None:
    record = PassRecord()
    for _ in range(2):
        record.observe(0, torch.zeros(4, 3))
        record.finish()
    record.observe(0, torch.full((4, 3), NAN))
    with pytest.raises(NonDeterministicDataError, match="batch 0"):
        record.finish()


def test_a_record_counts_batches() -> None:
    f = torch.ones(2, 3)
    record = PassRecord()
    for i in range(3):
        record.observe(i, f)
    record.finish()
    record.observe(0, f)
    with pytest.raises(NonDeterministicDataError, match="had 1 batches, the first one 3"):
        record.finish()
    with pytest.raises(NonDeterministicDataError, match="Batch 3 appeared"):
        record.observe(3, f)
    with pytest.raises(NonDeterministicDataError, match=r"Batch 1 gave outputs of shape \(1, 3\)"):
        record.observe(1, f[:1])


def test_a_pass_cut_short_spoils_neither_itself_nor_the_next() -> None:
    f = torch.ones(2, 3)
    record = PassRecord()
    record.observe(0, f)
    record.observe(1, f)  # and here the user pressed ^C, in the very first pass
    for _ in range(2):
        for i in range(3):
            record.observe(i, f * (i + 1) if i == 2 else f)
        record.finish()
    assert record.batches == 3
    record.observe(0, f)  # and again
    for i in range(3):
        record.observe(i, f * (i + 1) if i == 2 else f)
    record.finish()
    fresh = PassRecord()
    fresh.observe(0, f)
    fresh.observe(0, 2 * f)  # what a broken first pass saw counts
    with pytest.raises(NonDeterministicDataError, match="batch 0"):
        fresh.finish()


def test_a_pass_leaves_the_global_streams_alone_and_a_random_data_set_random() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return torch.rand(3) + np.random.rand() + random.random(), Y[i]  # noqa: NPY002

    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    source = DataSource(DataLoader(Noisy(), 2, sampler=RandomSampler(range(4))))
    passes = []
    for _ in range(2):
        seen = []
        for batch in source.batches():
            assert torch.equal(torch.get_rng_state(), before[0])  # also between batches
            seen.append(batch.x)
        passes.append(torch.cat(seen))
    unfinished = source.batches()
    next(unfinished)
    with pytest.raises(RuntimeError, match="planted"):
        unfinished.throw(RuntimeError("planted"))  # type: ignore[attr-defined]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert not torch.allclose(passes[0], passes[1])


def test_private_randomness_continues_by_itself_and_puts_all_streams_back() -> None:
    def step() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    def failing() -> None:
        step()
        raise RuntimeError("planted")

    torch.manual_seed(5)
    before, private = state(), PrivateRandomness()
    first, second = private(step), private(step)
    with pytest.raises(RuntimeError, match="planted"):
        private(failing)
    assert state() == before
    assert not set(first) & set(second)
    assert (step(), step()) == (first, second)  # what the global streams would have given


def test_progress_shows_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    list(DataSource(chunks(4, 6)).batches(progress=True, description="GGN"))
    assert "GGN" in capsys.readouterr().err
    list(DataSource(chunks(4, 6)).batches())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rows", [3, 2**16])
@pytest.mark.parametrize("changed", ["outputs", "targets"])
def test_a_record_remembers_what_it_was_shown(changed, rows):
    record = PassRecord()
    f, y = torch.ones(rows, 2, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    kept = f.clone(), y.clone()
    record.observe(0, f, y)
    record.finish()
    (f if changed == "outputs" else y).add_(1)  # a buffer that is used again
    record.observe(0, *kept)
    record.finish()
    record.observe(0, f, y)
    with pytest.raises(NonDeterministicDataError, match=f"The {changed} of batch 0 differ"):
        record.finish()
