"""A step changes everything or nothing: an error or Ctrl-C within it restores what was before."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

ONE_AT_A_TIME = threading.RLock()
"""The lock of code that changes torch's global settings: precision of products, levels of forward mode."""
COPIED = (dict, list, set, deque)


@contextlib.contextmanager
def restored_on_error(things: Iterable[Any]) -> Iterator[None]:
    """Within the context, an exception (also Ctrl-C) restores the attributes of some objects.

    Dictionaries, lists, sets and queues are copied, but not what they contain: within the context, tensors must be
    replaced and not changed in place.
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
    """Within the context, Ctrl-C waits until the end. Only the main thread receives it."""
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
