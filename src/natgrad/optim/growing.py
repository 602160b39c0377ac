"""Batches that grow: small while gradients are large, and large when gradients are mostly noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from natgrad.checks.values import check_count, check_generator


class GrowingBatches(Sampler[list[int]]):
    """Batches of indices for `torch.utils.data.DataLoader(dataset, batch_sampler=...)`. Each batch is a little larger
    than the last. Each pass over the data is in random order.

    The `k`-th batch has `first · (last / first)^(k / steps)` indices, and after `steps` batches the size is `last`: an
    exponential schedule like that of Martens & Grosse (2015), section 13. One iteration is one pass over the data, and
    the size continues to grow from pass to pass. If the last indices of a pass do not fill a batch, they are left out
    of this pass, so that all batches of a size have equal weight.

    Args:
        data: the data set, or anything with a length.
        first: the size of the first batch.
        last: the size that batches grow to.
        steps: the number of batches until this size is reached.
        generator: the source of the random order. Default: one seeded from torch's generator.

    Raises:
        ValueError: if a number is not a positive integer, or if `first`, `last` and the data's length are not in
            ascending order.
        TypeError: if the data has no length.

    Example:
        >>> import torch, natgrad
        >>> batches = natgrad.GrowingBatches(range(1000), first=10, last=160, steps=4)
        >>> [len(batch) for batch in batches]
        [10, 20, 40, 80, 160, 160, 160, 160, 160]
        >>> [len(batch) for batch in batches]  # the next pass
        [160, 160, 160, 160, 160, 160]
    """

    def __init__(
        self, data: Sized, first: int, last: int, steps: int, generator: torch.Generator | None = None
    ) -> None:
        if not isinstance(data, Sized):
            raise TypeError(f"data is a {type(data).__name__}, which has no length; expected a data set, or range(n)")
        for name, value in (("first", first), ("last", last), ("steps", steps)):
            check_count(name, value)
        if not first <= last <= len(data):
            raise ValueError(
                f"first={first}, last={last} and {len(data)} examples are not in ascending order; expected batches "
                "that grow, and no larger than the data"
            )
        check_generator(generator, torch.device("cpu"))
        self.data, self.first, self.last, self.steps = data, first, last, steps
        self.generator = torch.Generator().manual_seed(torch.initial_seed()) if generator is None else generator
        self._taken = 0

    def size(self, k: int) -> int:
        """The size of the `k`-th batch, counted from 0."""
        share = min(1.0, k / self.steps)
        return round(math.exp((1 - share) * math.log(self.first) + share * math.log(self.last)))

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.data), generator=self.generator).tolist()
        start = 0
        while start + self.size(self._taken) <= len(order):
            batch = order[start : start + self.size(self._taken)]
            start += len(batch)
            self._taken += 1
            yield batch

    def __len__(self) -> int:
        """The number of batches in the next pass."""
        count, left = 0, len(self.data)
        while (left := left - self.size(self._taken + count)) >= 0:
            count += 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """How many batches were taken, and the generator's state: between two passes, training resumes from these."""
        return {"taken": self._taken, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batches that were taken when `state_dict` was called."""
        self._taken = state["taken"]
        self.generator.set_state(state["generator"])
