"""How the loss's input follows from what the model returned, so that a second forward can repeat it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef

from natgrad.losses.reading import loss_of

Way = Callable[[Any], Tensor]
Path = tuple[Any, ...]


class Returned:
    """What a forward returned: a tensor, or tensors in nested tuples, lists, dictionaries and dataclasses.

    It does not keep the tensors alive. It keeps their graph, and `loss`, a model's own loss, until `let_go` is called.
    """

    def __init__(self, value: Any):
        found = list(_tensors(value))
        self._tensors = [Held(path, t) for path, t in found]
        self.loss = loss_of(value)
        self._nodes = {t.grad_fn for _, t in found if t.grad_fn is not None}

    def let_go(self) -> bool:
        """Keeps nothing alive from now on. Returns whether any of the tensors is still in use."""
        self._nodes.clear()
        self.loss = None
        return any(held.in_use for held in self._tensors)

    def is_all_of(self, value: Any) -> bool:
        """Whether `value` holds what was returned: the same tensors in the same places."""
        found = list(_tensors(value))
        if len(found) != len(self._tensors) or not found:
            return False
        return all(path == held.path and t is held.ref() for (path, t), held in zip(found, self._tensors, strict=True))

    def way_to(self, output: Tensor) -> Way | None:
        """How `output` follows from what was returned: it is one of the tensors, or a view of one.

        None if it is neither, or has been written to.
        """
        for held in self._tensors:
            view = held.view(output)
            if view is not None:
                return Part(held.path, view)
        return None

    def differs(self, value: Any, by: float) -> bool:
        """Whether tensors in `value` differ from those that were returned by more than `by`, relatively."""
        own = {held.path: held.ref() for held in self._tensors}
        pairs = ((own.get(path), t) for path, t in _tensors(value))
        return any(a is not None and a.shape == t.shape and bool((a - t).norm() > by * a.norm()) for a, t in pairs)

    @property
    def logits(self) -> Tensor | None:
        """The tensor that is named `logits`, if it is still in use."""
        named = (held.ref() for held in self._tensors if [key for _, key in held.path] == ["logits"])
        return next(named, None)

    def nodes(self) -> set[Node]:
        """The nodes of the autograd graph that the tensors come from."""
        alive = (held.ref() for held in self._tensors)
        return self._nodes | {t.grad_fn for t in alive if t is not None and t.grad_fn is not None}


@dataclass(frozen=True)
class Part:
    """The way to one of the tensors that were returned (`path`), or to a view of it."""

    path: Path
    view: Way

    def __call__(self, value: Any) -> Tensor:
        return self.view(_at(value, self.path))


class Held:
    """The place of a returned tensor, and its memory. Neither is kept alive: in `model(x).flatten(0, 1)` the tensor
    that the model returned is freed at once, but its memory is not."""

    def __init__(self, path: Path, t: Tensor):
        self.path, self.ref, self._version = path, weakref.ref(t), t._version
        self._base = None if t._base is None else weakref.ref(t._base)  # also kept by a view of a view
        self._memory = _memory(t)
        self._contiguous, self._numel, self._offset = t.is_contiguous(), t.numel(), t.storage_offset()

    @property
    def in_use(self) -> bool:
        """Whether the tensor or a view of it is alive."""
        return self.ref() is not None or (self._base is not None and self._base() is not None)

    def view(self, output: Tensor) -> Way | None:
        """The function that made `output` from the tensor; None if there is none, or if the tensor has been written
        to."""
        if output._version != self._version:
            return None
        if output is self.ref():
            return lambda again: again
        if self._memory is None or _memory(output) != self._memory or not self._contiguous:
            return None
        if output.is_contiguous() and output.numel() == self._numel:
            return lambda again: again.reshape(output.shape)
        size, stride, offset = output.shape, output.stride(), output.storage_offset() - self._offset
        return lambda again: again.contiguous().as_strided(size, stride, again.storage_offset() + offset)


def _memory(t: Tensor) -> StorageWeakRef | None:
    """None for tensors that have no memory of their own."""
    try:
        return StorageWeakRef(t.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


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
