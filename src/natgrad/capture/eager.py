"""What `torch.compile` must leave alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Eager:
    """Within the context, compiled modules run as if they had not been compiled: compiled code has no function modes.

    torch has one such setting for the whole process, its stance. Contexts may overlap in any order, within a thread or
    in several: the first one changes the setting, the end of the last one makes it what it was. For this the stance
    that was set is changed itself, and is not replaced: the user's own `set_stance` may have begun since, and will
    restore the stance that it found.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a context may end in a finalizer, which may run within these methods
        self._within = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._setting = torch.compiler.set_stance("force_eager")
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                vars(self._setting.stance).update(vars(self._setting.prev))


EAGER = _Eager()


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which `torch.compile` does not compile even if it compiles a caller. The compiler is imported with
    the first call."""
    apart: list[Callable[P, R]] = []

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not apart:
            apart.append(torch.compiler.disable(function))
        return apart[0](*args, **kwargs)

    return called
