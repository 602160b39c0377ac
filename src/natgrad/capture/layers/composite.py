"""Functions that hide affine maps inside of them, and what computes the same in the open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.recurrent import UNROLLED


@dataclass(frozen=True)
class Composite:
    """`function` does as the fused one does, by functions of torch's own.

    `positions` tells from the arguments the size of axis 0 inside of it, where that is positions and examples are on
    axis 1; None where examples are on axis 0.
    """

    function: Callable[..., Any]
    positions: Callable[..., int | None] = lambda *_, **__: None


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch whose body runs where a function mode would be handed the call as a whole."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _queries(query: Tensor, *_: Any, **__: Any) -> int:
    return len(query)


COMPOSITES: dict[Any, Composite] = {
    F.multi_head_attention_forward: Composite(_opened(F.multi_head_attention_forward), _queries),
    **{fused: Composite(unrolled) for fused, unrolled in UNROLLED.items()},
}
