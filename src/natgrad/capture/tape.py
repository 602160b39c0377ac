"""The calls of a forward pass, in order: what is needed to differentiate it once more without running the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LIMIT = 2**24
"""A tape with more numbers than this is given up. It keeps tensors that the backward pass would free, and saves the
time of Python, which counts for smaller models only."""


class Entry(NamedTuple):
    """One call, and what it returned: a tensor, or several."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    out: Any


class Tape(TorchFunctionMode):
    """While active, keeps every call of a torch function whose result has a gradient.

    What calls return is kept as an alias without a graph. `whole`: whether the entries are all that happened, as far as
    is known. They are not if an argument comes from a function that the tape has not seen, if a result was written to,
    or if a tensor is of another type than torch's own, or belongs to a transform of `torch.func`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.output: Tensor | None = None
        self.whole = True
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # what calls returned, with its alias, by its id
        self._versions: list[tuple[Tensor, int]] = []
        self._size = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Keeps a call, if its result has a gradient."""
        if not self.whole:
            return
        if isinstance(out, Tensor):
            if not out.requires_grad:
                return
            if id(out) in self._made and any(a is out for a in args):
                if not self._unchanged(self._made[id(out)][1]):
                    self._give_up()  # an in-place function
                return  # else the function returned its argument, as dropout does in evaluation
        elif not (isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) and t.requires_grad for t in out)):
            return
        made = self._made
        own = [made[id(a)][1] if id(a) in made else self._alias(a) for a in args]
        more = {k: self._alias(v) for k, v in kwargs.items()} if kwargs else kwargs
        its = self._new(out) if isinstance(out, Tensor) else tuple(map(self._new, out))
        self.entries.append(Entry(func, own, more, its))
        if self._size > LIMIT:
            self._give_up()

    def _new(self, t: Any) -> Any:
        """The alias of a call's result."""
        if type(t) is not Tensor or id(t) in self._made or torch._C._functorch.is_functorch_wrapped_tensor(t):
            return self._give_up()
        self._size += t.numel()
        alias = t.detach()
        self._made[id(t)] = t, alias
        self._versions.append((alias, alias._version))
        return alias

    def _alias(self, value: Any) -> Any:
        """An argument, as the tape keeps it."""
        if type(value) is nn.Parameter and value.is_leaf:
            return value
        if isinstance(value, Tensor):
            known = self._made.get(id(value))
            if known is not None:
                return known[1]
            if value.requires_grad and value.is_leaf:
                return value
            if value.requires_grad or type(value) is not Tensor or value.is_inference():
                return self._give_up()
            self._versions.append((value, value._version))
            return value
        if type(value) in (tuple, list):
            return type(value)(map(self._alias, value))
        return value

    def _unchanged(self, alias: Tensor) -> bool:
        return any(t is alias and t._version == version for t, version in self._versions)

    def _give_up(self) -> None:
        self.whole = False
        self.entries, self._made, self._versions, self.output = [], {}, [], None

    def end(self, returned: Any) -> None:
        """Ends the tape, with what the model returned."""
        known = self._made.get(id(returned))
        if known is None or type(returned) is not Tensor:
            self._give_up()
        else:
            self.output, self._made = known[1], {}

    @property
    def intact(self) -> bool:
        """Whether nothing on the tape, apart from the parameters, was written to since."""
        return self.whole and all(t._version == version for t, version in self._versions)
