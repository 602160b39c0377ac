"""Public functions, which users may call within `torch.compile` or `torch.autocast`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

from natgrad.capture.eager import not_compiled

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = "cpu", "cuda", "mps", "xpu"
_OUTSIDE: ContextVar[dict[str, torch.dtype] | None] = ContextVar("autocast where a function was called", default=None)


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which is not compiled, and which computes in the precision of its tensors: within `torch.autocast`
    the model runs in low precision, but not the algebra of its matrices."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        lowered = {d: torch.get_autocast_dtype(d) for d in DEVICES if torch.is_autocast_enabled(d)}
        if not lowered:
            return function(*args, **kwargs)
        token = _OUTSIDE.set(lowered)
        try:
            with ExitStack() as stack:
                for device in lowered:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)
        finally:
            _OUTSIDE.reset(token)

    return not_compiled(called)


def precision_of_models(device: torch.device) -> torch.dtype | None:
    """The low precision that models run in, as where the function was called; None without autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return (_OUTSIDE.get() or {}).get(device.type)
