"""Functions and classes that operator methods need from files that import `operator`. Looking them up by name avoids an
import circle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., Any])

LATER: dict[str, Callable[..., Any]] = {}
"""By name. `natgrad.linalg` imports all of these files, so the registry is complete after the import."""


def later(make: Made) -> Made:
    """A decorator that registers a class or function, which takes an operator, under its own name."""
    LATER[make.__name__] = make
    return make
