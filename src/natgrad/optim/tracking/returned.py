"""From what a model returned to what the loss was given, so that a second forward can go the same way."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

Way = Callable[[Any], Tensor]
Path = tuple[Any, ...]


class Returned:
    """What a forward returned: a tensor, or tensors in nested tuples, lists, dictionaries and dataclasses.

    It does not keep the tensors alive; but their graph, until it is told to `let_go`.
    """

    def __init__(self, value: Any):
        found = list(_tensors(value))
        self._tensors = [(path, weakref.ref(t), t._version) for path, t in found]
        self._nodes = {t.grad_fn for _, t in found if t.grad_fn is not None}

    def let_go(self) -> bool:
        """Keeps nothing alive from now on. Returns whether any of the tensors is still in use."""
        self._nodes.clear()
        return any(ref() is not None for _, ref, _ in self._tensors)

    def is_all_of(self, value: Any) -> bool:
        """Whether `value` holds what was returned: the same tensors in the same places."""
        found = list(_tensors(value))
        if len(found) != len(self._tensors) or not found:
            return False
        pairs = zip(found, self._tensors, strict=True)
        return all(path == its and t is ref() for (path, t), (its, ref, _) in pairs)

    def way_to(self, output: Tensor) -> Way | None:
        """How `output` comes from what was returned: it is one of the tensors, as it is or as a view of it.

        None if it is neither, or has been written to.
        """
        for path, ref, version in self._tensors:
            t = ref()
            if t is not None and t._version == version:
                view = _view(output, t)
                if view is not None:
                    return lambda value, path=path, view=view: view(_at(value, path))  # type: ignore[misc]
        return None

    def nodes(self) -> set[Node]:
        """The nodes of the autograd graph that the tensors come from."""
        held = (ref() for _, ref, _ in self._tensors)
        return self._nodes | {t.grad_fn for t in held if t is not None and t.grad_fn is not None}


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


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
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


def _at(value: Any, path: Path) -> Tensor:
    for how, key in path:
        value = value[key] if how == "item" else getattr(value, key)
    return value
