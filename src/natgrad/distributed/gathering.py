"""Matrices from the data of several ranks: an error on one rank is raised on all; random numbers are shared or
separate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from natgrad.distributed.world import World

KINDS: dict[str, type[Exception]] = {k.__name__: k for k in (ValueError, TypeError, RuntimeError, NotImplementedError)}


class _Elsewhere(Exception):
    """Another rank has failed."""


@contextlib.contextmanager
def jointly(world: World, what: str) -> Iterator[Callable[[], None]]:
    """Within the context, each rank works on its own data. At the end, all ranks continue, or all raise the error of
    one.

    The context yields a function to call before ranks wait for one another.
    """

    def agree(error: Exception | None = None) -> None:
        own = None if error is None else (type(error).__name__, str(error))
        every = world.gather(own, what)
        for rank, said in enumerate(every):
            if said is not None and rank != world.rank and error is None:
                kind, message = said
                words = message if kind in KINDS else f"{kind}: {message}"
                raise KINDS.get(kind, RuntimeError)(f"on rank {rank} of {world.size}: {words}") from _Elsewhere()

    try:
        yield agree
    except Exception as error:
        if not isinstance(error.__cause__, _Elsewhere):
            agree(error)
        raise
    agree()


def in_common(world: World, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """A generator that draws the same numbers on all ranks: the given one, with the state of rank 0."""
    if world.size == 1:
        return generator
    if generator is None:
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    generator.set_state(world.gather(generator.get_state(), "the source of random numbers")[0])
    return generator


def apart(world: World, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """A generator that draws different numbers on each rank. Its seed is drawn from a generator shared by all ranks."""
    if world.size == 1 or generator is None:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed((seed + 1_000_003 * (world.rank + 1)) % 2**63)
