"""The ranks that hold the same model and see different data."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from natgrad.distributed.assignment import assign
from natgrad.distributed.packing import Form, empty, filled, form_of, leaves, packed, unpacked
from natgrad.linalg.state import dump, restore


class World:
    """Some ranks of `torch.distributed`, or one that is alone: then nothing is sent.

    Every method but the properties is called by all ranks, in the same order. `sent` counts the bytes that this rank
    has given to each purpose.

    Raises:
        RuntimeError: by every method, if another rank has ended or was waited for in vain, with the purpose's name.
            How long is waited is the `timeout` of `torch.distributed.init_process_group`.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent: Counter[str] = Counter()

    def sum(self, values: Tensor, what: str) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            with self._waiting(what):
                dist.all_reduce(values, group=self._group)
            self.sent[what] += values.nbytes
        return values

    def numbers(self, values: list[float], device: torch.device, what: str) -> list[float]:
        """Sums of numbers, in double precision."""
        if self.size == 1:
            return values
        return self.sum(torch.tensor(values, dtype=torch.float64, device=device), what).tolist()

    def agreed(self, values: list[float], device: torch.device, what: str) -> list[float]:
        """The same numbers on all ranks, where each has computed them from what all have: rounding may differ from rank
        to rank, and decisions may not."""
        return self.numbers([v / self.size for v in values], device, what)

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's picklable value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._waiting(what):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def give(self, value: Any, source: int, device: torch.device, what: str) -> Any:
        """`source`'s nested dictionaries, lists and tuples of tensors, on all ranks."""
        return self._give([value if self.rank == source else None], [source], device, what)[0]

    def share(
        self,
        work: Mapping[str, Callable[[], Any]],
        costs: Mapping[str, float],
        device: torch.device,
        what: str,
    ) -> dict[str, Any]:
        """The results of all pieces of work, each of which one rank does. A result is an operator, or nested
        dictionaries, lists and tuples of operators, tensors, numbers and strings.

        Raises:
            ValueError: on all ranks, if one piece of work does.
        """
        if self.size == 1:
            return {key: do() for key, do in work.items()}
        owners = assign({key: costs[key] for key in work}, self.size)
        own, error = {}, None
        try:
            own = {key: dump(do()) for key, do in work.items() if owners[key] == self.rank}
        except ValueError as e:
            error = str(e)
        found = next((e for e in self.gather(error, what) if e is not None), None)
        if found is not None:
            raise ValueError(found)
        results = self._give(
            [own if r == self.rank else None for r in range(self.size)], range(self.size), device, what
        )
        merged = {key: value for result in results for key, value in result.items()}
        return {key: restore(merged[key]) for key in work}

    def _give(self, values: list[Any], sources: Any, device: torch.device, what: str) -> list[Any]:
        """Values of some ranks, one each, on all ranks."""
        if self.size == 1:
            return values
        mine = {source: form_of(v) for source, v in zip(sources, values, strict=True) if source == self.rank}
        forms = [own.get(source) for source, own in zip(sources, self._forms_of(mine, sources, what), strict=True)]
        works, buffers = [], []
        with self._waiting(what):
            for value, source, form in zip(values, sources, forms, strict=True):
                flat = list(leaves(form, Form))
                buffer = packed(leaves(value, Tensor), flat) if source == self.rank else empty(flat, device)
                buffers.append(buffer)
                for part in buffer.values():
                    works.append(dist.broadcast(part, group=self._group, group_src=source, async_op=True))
                    self.sent[what] += part.nbytes if source == self.rank else 0
            for work in works:
                work.wait()
        given = []
        for value, source, form, buffer in zip(values, sources, forms, buffers, strict=True):
            flat = list(leaves(form, Form))
            given.append(value if source == self.rank else filled(form, iter(unpacked(buffer, flat))))
        return given

    def _forms_of(self, mine: dict[int, Any], sources: Any, what: str) -> list[dict[int, Any]]:
        every = self.gather(mine, what)
        return [every[source] for source in sources]

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} did not get {what} from the others: {error}. One of them has ended "
                "or takes another way; look at the first error of all ranks' output"
            ) from error


def unwrapped(model: nn.Module) -> tuple[nn.Module, World]:
    """The module within `DistributedDataParallel`, and the ranks it is on; any other module, alone.

    Raises:
        NotImplementedError: if parameters are sharded.
    """
    sharded = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise NotImplementedError(
            f"parameter {sharded!r} is sharded over ranks (a DTensor, as of fully_shard); expected whole parameters, "
            "and torch.nn.parallel.DistributedDataParallel for several ranks"
        )
    if isinstance(model, DistributedDataParallel):
        return model.module, World(model.process_group)
    return model, World()
