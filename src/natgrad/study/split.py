"""Splits a user's data into batches for training and held-out batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from natgrad.checks.errors import UserError
from natgrad.study.tasks import indices

EVERY = 10
"""One example or batch in this many is held out."""
FEW = 2000
"""The number of examples for a figure."""


@dataclass(frozen=True)
class Split:
    """`training(seed)` gives endless batches. `sample` are some of them, always the same. `held_out` are others that no
    step uses; none if the data can be read in only one order."""

    training: Callable[[int], Iterator[Any]]
    sample: Sequence[Any]
    held_out: Sequence[Any]


def split(data: Any, size: int) -> Split:
    """Holds out every tenth example of one `(input, target)` pair or of a `DataLoader`'s data set, or every tenth batch
    of a list. From a pair, batches of `size` are drawn.

    Raises:
        UserError: if the data are none of these and can be read only once, or if they are empty.
    """
    if _is_pair(data):
        return _pair(data, size)
    if isinstance(data, DataLoader) and _can_be_divided(data):
        return _loader(data)
    if isinstance(data, Sequence):
        return _list(data)
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        what = f"a {type(data).__name__}" + (", which can be read only once" if isinstance(data, Iterator) else "")
        raise UserError(
            f"the data are {what}; expected one (input, target) pair of tensors, a list of batches, or a DataLoader."
        )
    return Split(lambda seed: _endless(data), _some(data, "the data"), ())


def _can_be_divided(data: DataLoader[Any]) -> bool:
    """Whether its examples can be drawn in another way with the same meaning: not if a sampler of the user weights
    them."""
    plain = isinstance(data.sampler, (RandomSampler, SequentialSampler))
    return plain and isinstance(data.dataset, Sized) and data.batch_size is not None


def _pair(data: Sequence[Tensor], size: int) -> Split:
    x, y = data
    if len(x) != len(y):
        raise UserError(f"the data are {len(x)} inputs and {len(y)} targets; expected the same number of each.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, own = order[: len(x) // EVERY], order[len(x) // EVERY :]
    if not len(own):
        raise UserError("the data are empty; expected some examples.")

    def training(seed: int) -> Iterator[Any]:
        return ((x[own[i]], y[own[i]]) for i in indices(len(own), size, seed))

    def parts(which: Tensor) -> list[Any]:
        return [(x[i], y[i]) for i in which[:FEW].split(size)] if len(which) else []

    return Split(training, parts(own), parts(held))


def _loader(data: DataLoader[Any]) -> Split:
    count = len(data.dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held, own = order[: count // EVERY], order[count // EVERY :]
    shuffled = isinstance(data.sampler, RandomSampler)

    def loader(which: list[int], shuffle: bool, seed: int = 0) -> DataLoader[Any]:
        return DataLoader(
            Subset(data.dataset, which),
            batch_size=data.batch_size,
            shuffle=shuffle,
            collate_fn=data.collate_fn,
            drop_last=data.drop_last and shuffle,
            generator=torch.Generator().manual_seed(seed),
        )

    few = max(1, FEW // (data.batch_size or 1))
    sample = _some(islice(iter(loader(sorted(own), False)), few), "the data set")
    held_out = list(islice(iter(loader(sorted(held), False)), few)) if held else []
    return Split(lambda seed: _endless(loader(own if shuffled else sorted(own), shuffled, seed)), sample, held_out)


def _list(data: Sequence[Any]) -> Split:
    if not data:
        raise UserError("the data are an empty list; expected at least one batch.")
    every = EVERY if len(data) >= EVERY else len(data)
    held = [b for i, b in enumerate(data) if i % every == every - 1] if len(data) > 1 else []
    own = [b for i, b in enumerate(data) if i % every != every - 1] if len(data) > 1 else list(data)
    few = max(1, FEW // max(1, _count(data[0])))
    return Split(lambda seed: _shuffled(own, seed), own[:few], held[:few])


def _shuffled(batches: Sequence[Any], seed: int) -> Iterator[Any]:
    return (batches[int(i)] for i in indices(len(batches), 1, seed))


NOTHING_LEFT = (
    "the data has no complete batch to train on, or it can be read only once, as a generator can; use more data or a "
    "smaller batch_size, and a list, a DataLoader, or an object whose __iter__ begins anew."
)


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for batch in data:
            count += 1
            yield batch
        if count == 0:
            raise UserError(NOTHING_LEFT)


def _some(data: Iterable[Any], what: str) -> list[Any]:
    """The first batches."""
    found: list[Any] = []
    for batch in data:
        found.append(batch)
        if sum(map(_count, found)) >= FEW:
            break
    if not found:
        raise UserError(f"{what} has no batch; expected at least one.")
    return found


def _count(batch: Any) -> int:
    """The number of examples in a batch, according to its first tensor."""
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(t) for t in parts if isinstance(t, Tensor) and t.ndim), 1)


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
