"""Ranks that see different data: what they send to one another."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from natgrad.distributed.assignment import assign
from natgrad.distributed.packing import Form, empty, filled, form_of, leaves, packed, unpacked
from natgrad.linalg.state import dump, restore

CPU = torch.device("cpu")


class World:
    """Some ranks of `torch.distributed`, with tensors on `device`; or a single rank, which sends nothing.

    All ranks call every method, in the same order; only the properties may be read by one rank alone. `sent` counts the
    bytes that this rank sent for each purpose.

    Raises:
        RuntimeError: by every method, if another rank has ended or does not answer; the error names the purpose. The
            waiting time is the `timeout` of `torch.distributed.init_process_group`.
    """

    def __init__(self, group: Any = None, device: torch.device = CPU):
        self.group, self.device = group, device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent: Counter[str] = Counter()

    def sum(self, values: Tensor, what: str) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            with self._waiting(what):
                dist.all_reduce(values, group=self.group)
            self.sent[what] += values.nbytes
        return values

    def begin_sum(self, values: Tensor, what: str) -> Callable[[], Tensor]:
        """The sum over the ranks, in place, asynchronously; the returned function waits for it."""
        work = dist.all_reduce(values, group=self.group, async_op=True)
        self.sent[what] += values.nbytes

        def wait() -> Tensor:
            with self._waiting(what):
                work.wait()
            return values

        return wait

    def sum_at(self, values: Sequence[Tensor], what: str) -> Tensor:
        """The sum over the ranks of their contributions to this rank: `values[r]` is for rank `r`, and is
        overwritten."""
        with self._waiting(what):
            works = [
                dist.reduce(v, group=self.group, group_dst=r, async_op=True) for r, v in enumerate(values) if v.numel()
            ]
            for work in works:
                work.wait()
        self.sent[what] += sum(v.nbytes for r, v in enumerate(values) if r != self.rank)
        return values[self.rank]

    def numbers(self, values: list[float], what: str) -> list[float]:
        """Sums of numbers, in double precision."""
        if self.size == 1:
            return values
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device), what).tolist()

    def agreed(self, values: list[float], what: str) -> list[float]:
        """The same numbers on all ranks, when each rank has computed them from the same data. Rounding may differ from
        rank to rank, but decisions must not."""
        return self.numbers([v / self.size for v in values], what)

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's picklable value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._waiting(what):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Mapping[str, Callable[[], Any]], what: str) -> dict[str, Any]:
        """The results of this rank's own pieces of work.

        Raises:
            ValueError: on all ranks, if the work of one rank raises it.
        """
        if self.size == 1:
            return {key: do() for key, do in work.items()}
        results, error = {}, None
        try:
            results = {key: do() for key, do in work.items()}
        except ValueError as e:
            error = str(e)
        found = next((e for e in self.gather(error, what) if e is not None), None)
        if found is not None:
            raise ValueError(found)
        return results

    def share(self, work: Mapping[str, Callable[[], Any]], costs: Mapping[str, float], what: str) -> dict[str, Any]:
        """The results of all pieces of work, each computed by one rank. A result is an operator, or nested
        dictionaries, lists and tuples of operators, tensors, numbers and strings.

        Raises:
            ValueError: on all ranks, if one piece of work raises it.
        """
        owners = assign({key: costs[key] for key in work}, self.size)
        results = self.together({key: do for key, do in work.items() if owners[key] == self.rank}, what)
        if self.size == 1:
            return results
        own = {key: dump(result) for key, result in results.items()}
        merged = {key: value for result in self.exchanged(own, what) for key, value in result.items()}
        return {key: restore(merged[key]) for key in work}

    def exchanged(self, value: Any, what: str) -> list[Any]:
        """Every rank's nested dictionaries, lists and tuples of tensors, numbers and strings. For symmetric matrices,
        only the triangles are sent."""
        if self.size == 1:
            return [value]
        forms = self.gather(form_of(value), what)
        flat = [list(leaves(form, Form)) for form in forms]
        buffers, works = [], []
        with self._waiting(what):
            for source, its in enumerate(flat):
                mine = source == self.rank
                buffer = packed(leaves(value, Tensor), its) if mine else empty(its, self.device)
                buffers.append(buffer)
                for part in buffer.values():
                    works.append(dist.broadcast(part, group=self.group, group_src=source, async_op=True))
                    self.sent[what] += part.nbytes if mine else 0
            for work in works:
                work.wait()
        return [
            value if r == self.rank else filled(forms[r], iter(unpacked(buffers[r], flat[r]))) for r in range(self.size)
        ]

    def handed_over(self, values: Tensor, to: Sequence[int], came: Sequence[int], what: str) -> list[Tensor]:
        """The numbers that each rank has for this rank. `values` holds `to[r]` numbers for each rank `r`, one after the
        other, and rank `r` has `came[r]` numbers for this rank."""
        received = values.new_empty(sum(came))
        with self._waiting(what):
            dist.all_to_all_single(received, values, list(came), list(to), group=self.group)
        self.sent[what] += (sum(to) - to[self.rank]) * values.element_size()
        ends = list(accumulate(came))
        return [received[end - n : end] for n, end in zip(came, ends, strict=True)]

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} did not get {what} from the others: {error}. Another rank has "
                "ended, or runs different code; look for the first error in the output of all ranks"
            ) from error
