"""A step is taken as a whole or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

ONE_AT_A_TIME = threading.RLock()
"""Held by what changes torch's global settings: precision of products, levels of forward mode."""


COPIED = (dict, list, set, deque)


@contextlib.contextmanager
def restored_on_error(things: Iterable[Any]) -> Iterator[None]:
    """Puts the attributes of some objects back to what they were if an exception passes, Ctrl-C among them.

    Dictionaries, lists, sets and counters are copied, and dictionaries in dictionaries; what is in them is not, tensors
    among it: they must not be changed in place within.
    """
    before = [(thing, {k: _copied(v) for k, v in vars(thing).items()}) for thing in things]
    try:
        yield
    except BaseException:
        for thing, attributes in before:
            for name in vars(thing).keys() - attributes.keys():
                delattr(thing, name)
            vars(thing).update(attributes)
        raise


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, COPIED) else value


@contextlib.contextmanager
def states_restored_on_error(states: defaultdict[Any, dict[str, Any]]) -> Iterator[None]:
    """The same for the states of parameters."""
    before = {key: dict(state) for key, state in states.items()}
    try:
        yield
    except BaseException:
        states.clear()
        states.update(before)
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, Ctrl-C waits. It comes to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
