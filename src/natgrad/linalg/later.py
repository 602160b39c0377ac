"""What an operator's methods make by way of files that import `operator`: found here by name, without a circle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., Any])

LATER: dict[str, Callable[..., Any]] = {}
"""By name. `natgrad.linalg` imports all of the files, so that nothing is missing once it is imported."""


def later(make: Made) -> Made:
    """A decorator: enters a class or function, which takes an operator, under its own name."""
    LATER[make.__name__] = make
    return make
