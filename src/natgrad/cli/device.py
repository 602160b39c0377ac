"""The option `--device`: the device that a user's model and data are moved to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.errors import UserError


def check_device(given: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: if torch does not know the device, or it is not available.
    """
    try:
        device = torch.device(given)
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ", ".join(devices())
        raise UserError(
            f"--device was {given!r}, which cannot be used ({str(error).splitlines()[0].rstrip('.')}); expected one of "
            f"{there}; leave it out to compute where the model is."
        ) from error
    return device


def devices() -> list[str]:
    """The available devices."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def on_device(data: Any, device: torch.device) -> Any:
    """The data with every tensor on the device: a pair at once, batches one by one as they are read."""
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        return data  # a later check raises an error
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        return moved(data, device)
    return Moved(data, device) if isinstance(data, Sized) else MovedIterable(data, device)


class MovedIterable:
    """Batches that are moved as they are read."""

    def __init__(self, data: Iterable[Any], device: torch.device):
        # An iterator can be read only once.
        self._data, self._device = list(data) if isinstance(data, Iterator) else data, device

    def __iter__(self) -> Iterator[Any]:
        return (moved(batch, self._device) for batch in self._data)


class Moved(MovedIterable):
    """The same for data that know their number of batches."""

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on the device, also those in tuples, lists and mappings.

    >>> moved({"x": torch.ones(1), "names": ["a"]}, torch.device("meta"))
    {'x': tensor(..., device='meta', size=(1,)), 'names': ['a']}
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    if isinstance(value, Mapping):
        if hasattr(value, "to"):  # a BatchEncoding of transformers
            return value.to(device)
        return {k: moved(v, device) for k, v in value.items()}
    return value
