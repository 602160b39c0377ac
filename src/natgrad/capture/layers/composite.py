"""Fused functions with affine maps inside, and equivalent functions whose affine maps can be recorded."""

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
    """Runs the body of a Python function of torch, so that a function mode sees its inner calls."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# For each fused function, an equivalent one made of plain torch functions. It may return NotImplemented.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    torch.einsum: affine_map,
    torch.stack: stacked,
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], joined),
    **UNROLLED,
}
