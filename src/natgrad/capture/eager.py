"""Forwards without `torch.compile`."""

from __future__ import annotations

import threading

import torch


class _Eager:
    """Within the context, compiled modules run as if they had not been compiled: compiled code has no function modes.

    torch has one such setting for the whole process. Contexts may overlap in any order, within a thread or in several:
    the first one changes the setting, the end of the last one restores it.
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
                self._setting.__exit__(None, None, None)


EAGER = _Eager()
