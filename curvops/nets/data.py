"""What users pass as `data`, as one thing: a source of batches that can be gone through any number of times.

A 2-**tuple** `(x: Tensor | Mapping, y: Tensor)` is one batch; a Mapping is one batch with its targets at `dict_key_y`;
anything else is a re-iterable of batches (pairs, as tuples or lists, or Mappings): a list, a DataLoader. An iterator is
refused, for it can be gone through once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from curvops.errors import DataError, NonDeterministicDataError
from curvops.nets.batches import (
    Batch,
    Inputs,
    batch_length,
    check_values,
    describe,
    is_pair,
    move,
    named_tensors,
    split,
)
from curvops.nets.passes import PassRecord, PrivateRandomness

__all__ = ["Batch", "DataSource", "Inputs", "PassRecord", "batch_length"]

_EXPECTED = "expected a tuple (x, y) of tensors, a Mapping, or a re-iterable of such batches (a list, a DataLoader)"


class DataSource:
    """The user's data, normalised. Building reads nothing from an iterable, and looks at lists without copying.

    Args:
        data: See the module's docstring.
        dict_key_x: Key of the inputs whose first dimension counts the data, where x is a Mapping.
        dict_key_y: Key of the targets, where a batch is a Mapping. The network gets the Mapping without it.
        num_data: N, where the user knows it; compared with the data seen, never used as a scale.

    Raises:
        DataError: An iterator, a bare tensor or dataset, an empty list, a malformed batch in memory, or `num_data` that
            contradicts it.
    """

    def __init__(
        self, data: Any, *, dict_key_x: str = "input_ids", dict_key_y: str = "labels", num_data: int | None = None
    ) -> None:
        self._keys = (dict_key_x, dict_key_y)
        self._single = is_pair(data) or isinstance(data, Mapping)
        self._batches: Iterable[Any] = [data] if self._single else _reiterable(data)
        self._in_memory = self._single or type(data) in (list, tuple)
        # A loader makes its batches anew; another iterable may fill one buffer again and again.
        self._fresh = isinstance(data, DataLoader)
        self._announced = num_data
        self._known = self._counted() if self._in_memory else num_data if num_data is not None else _announced(data)
        if self._in_memory and num_data is not None and num_data != self._known:
            raise DataError(f"num_data is {num_data}, but the data are {self._known}.")
        self._private = PrivateRandomness()
        self._complete = False

    @property
    def is_single_batch(self) -> bool:
        """Whether the user gave one batch rather than an iterable of batches."""
        return self._single

    @property
    def in_memory(self) -> bool:
        """Whether the batches are tensors that the user holds, rather than made anew in each pass."""
        return self._in_memory

    @property
    def num_data(self) -> int | None:
        """N if it is known without reading: from `num_data`, tensors in memory, `len(dataset)`, or an earlier pass."""
        return self._known

    @property
    def num_batches(self) -> int | None:
        """Length of the iterable, None where it has none."""
        if not isinstance(self._batches, Sized):
            return None
        try:
            return len(self._batches)
        except TypeError:  # a DataLoader has __len__, and over an IterableDataset it raises
            return None

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of everything the user handed over in memory, to be watched for changes; none of a loader."""
        if not self._in_memory:
            return []
        found = []
        for i, batch in enumerate(self._batches):
            x, y = split(batch, self._name(i), *self._keys)
            found += [(name if self._single else f"{name} of batch {i}", t) for name, t in named_tensors(x, y)]
        return found

    def batches(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        description: str = "data",
    ) -> Iterator[Batch]:
        """One pass over the data: `(index, position, x, y)` for each batch that is not empty.

        Values are checked for NaN and Inf until a pass has been completed, structure in every pass. The global random
        streams of torch (CPU), NumPy and `random` are as before at every batch and at the end.

        Args:
            device: Where the network is; tensors that are elsewhere are copied there.
            dtype: Cast floating tensors to it (None: leave them).
            progress: Show a progress bar.
            description: Its label.

        Raises:
            DataError: A malformed batch, NaN or Inf, no data at all, or another number of data than announced.
            NonDeterministicDataError: Another number of data than in the first complete pass.
        """
        step = _call if self._in_memory else self._private
        whole = self._batches
        shown = tqdm(whole, description, self.num_batches, leave=False) if progress else nullcontext(whole)
        with shown as batches:
            iterator = step(lambda: iter(batches))
            index = position = 0
            while (batch := step(lambda: next(iterator, _END))) is not _END:
                x, y = split(batch, self._name(index), *self._keys)
                if y.shape[0]:
                    if not self._complete:
                        check_values(x, y, self._name(index), self._keys[0])
                    yield Batch(index, position, *move(x, y, device, dtype, self._fresh))
                index, position = index + 1, position + y.shape[0]
        self._finish(index, position)

    def _finish(self, batches: int, seen: int) -> None:
        """Compare the number of data seen in a complete pass with what is known of it."""
        if not self._complete and seen == 0:
            what = "the iterable gave no batch" if batches == 0 else f"all {batches} batches are empty"
            raise DataError(f"There are no data: {what}. A curvature is a sum over at least one datum.")
        if self._complete and seen != self._known:
            cause = "iterable was exhausted by the first pass" if batches == 0 else "number of data changed"
            raise NonDeterministicDataError(
                f"The {cause}: a later pass gave {seen} data in {batches} batches, the first one {self._known} data. "
                "Every pass must give the same data; fix them once with data = list(loader)."
            )
        if self._known is not None and seen != self._known:
            source = "num_data" if self._announced is not None else "the length that the loader announces"
            raise DataError(
                f"The pass gave {seen} data in {batches} batches, but {source} is {self._known}. Pass num_data={seen} "
                "if that is right, and look for missing batches if not."
            )
        self._known, self._complete = seen, True

    def _counted(self) -> int:
        """N of batches in memory."""
        n = sum(split(batch, self._name(i), *self._keys)[1].shape[0] for i, batch in enumerate(self._batches))
        if n == 0:
            what = "the batch is empty" if self._single else "the list has no batch, or only empty ones"
            raise DataError(f"There are no data: {what}. A curvature is a sum over at least one datum.")
        return n

    def _name(self, index: int) -> str:
        return "The data" if self._single else f"Batch {index}"

    def __repr__(self) -> str:
        n = "?" if self._known is None else f"{self._known:,}"
        kind = "one batch" if self._single else type(self._batches).__name__
        return f"DataSource(N={n}, {kind})"


_END = object()


def _call(step: Any) -> Any:
    return step()


def _reiterable(data: Any) -> Iterable[Any]:
    """`data`, if it can be iterated over again and again."""
    if isinstance(data, Iterator):
        _refuse(data, "which can be gone through only once; a product needs several passes: data = list(…)")
    if isinstance(data, Tensor):
        _refuse(data, f"without targets; {_EXPECTED}")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        _refuse(data, "of single data; wrap it: torch.utils.data.DataLoader(dataset, batch_size=…)")
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        _refuse(data, f"which holds no batches; {_EXPECTED}")
    if isinstance(data, (list, tuple)) and any(isinstance(part, Tensor) for part in data):
        _refuse(data, "which is no sequence of batches; one batch is the tuple (x, y), a sequence of one [(x, y)]")
    if type(data).__module__ == "numpy":
        _refuse(data, f"which holds no batches; {_EXPECTED}. Use torch.from_numpy")
    return data


def _announced(data: Any) -> int | None:
    """N of a DataLoader by the length of its sampler, which reads nothing; None where the loader cannot know."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    sampler = data.batch_sampler
    if type(sampler) is not BatchSampler or not isinstance(sampler.sampler, Sized):
        return None
    n = len(sampler.sampler)
    return n - n % sampler.batch_size if sampler.drop_last else n


def _refuse(data: Any, why: str) -> NoReturn:
    raise DataError(f"The data are {describe(data)}, {why}.")
