"""Matrices of the data of several ranks: what one rank raises all raise, and random numbers are in common or apart."""

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
    """Within, each rank works on its own data, and at the end all go on, or all raise what one of them has raised.

    Gives a function that is called before ranks wait for one another within.
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
    """A generator that draws the same on all ranks: the one given, in the state of rank 0's."""
    if world.size == 1:
        return generator
    if generator is None:
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    generator.set_state(world.gather(generator.get_state(), "the source of random numbers")[0])
    return generator


def apart(world: World, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """A generator that draws other numbers on every rank, seeded by one that draws the same on all."""
    if world.size == 1 or generator is None:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed((seed + 1_000_003 * (world.rank + 1)) % 2**63)
