"""Functions that hide affine maps inside of them, and what computes the same in the open."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from natgrad.capture.layers.einsum import affine_map
from natgrad.capture.layers.recurrent import UNROLLED
from natgrad.capture.layers.scale import joined, stacked


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch whose body runs where a function mode would be handed the call as a whole."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# For each fused function one that does the same by functions of torch's own, or returns NotImplemented.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    torch.einsum: affine_map,
    torch.stack: stacked,
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], joined),
    **UNROLLED,
}
