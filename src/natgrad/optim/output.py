"""From what a model returned to what the loss was given, so that a second forward can go the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Way = Callable[[Any], Tensor]


class Returned:
    """What a forward returned: a tensor, or tensors in nested tuples, lists, dictionaries and dataclasses."""

    def __init__(self, value: Any):
        self.value = value
        self._versions = {id(t): t._version for _, t in _tensors(value)}

    def way_to(self, output: Tensor) -> Way | None:
        """How `output` comes from what was returned: it is one of the tensors, as it is or as a view of it.

        None if it is neither, or has been written to.
        """
        for path, t in _tensors(self.value):
            if t._version == self._versions[id(t)]:
                view = _view(output, t)
                if view is not None:
                    return lambda value, path=path, view=view: view(_at(value, path))  # type: ignore[misc]
        return None


def _view(output: Tensor, t: Tensor) -> Way | None:
    """The function that made `output` of `t`."""
    if output is t:
        return lambda again: again
    if output.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() or not t.is_contiguous():
        return None
    if output.is_contiguous() and output.numel() == t.numel():
        return lambda again: again.reshape(output.shape)
    size, stride, offset = output.shape, output.stride(), output.storage_offset() - t.storage_offset()
    return lambda again: again.contiguous().as_strided(size, stride, again.storage_offset() + offset)


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, v in value.items():
            yield from _tensors(v, (*path, ("item", key)))
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from _tensors(v, (*path, ("item", i)))
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name), (*path, ("attribute", f.name)))


def _at(value: Any, path: tuple[Any, ...]) -> Tensor:
    for how, key in path:
        value = value[key] if how == "item" else getattr(value, key)
    return value
