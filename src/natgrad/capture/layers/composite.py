"""Fused functions with affine maps inside, and equivalent functions whose affine maps can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.einsum import affine_map
from natgrad.capture.layers.recurrent import UNROLLED
from natgrad.capture.layers.scale import cat_of_copies, stack_of_copies


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the body of a Python function of torch, so that a function mode sees its inner calls."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`max(x, 0) + w min(x, 0)`, with one `w`, or one for each channel."""
    own = weight if weight.numel() == 1 or input.ndim < 2 else weight.view(-1, *[1] * (input.ndim - 2))
    positive = input > 0
    return torch.where(positive, input, 0.0) + torch.where(positive, 0.0, input) * own


def _difference(*operands: Any, **named: Any) -> Any:
    """`x - y` as `x + (-y)`. NotImplemented unless both are tensors."""
    x, y = operands if len(operands) == 2 else (None, None)
    return x + -y if isinstance(x, Tensor) and isinstance(y, Tensor) and not named else NotImplemented


def _quotient(*operands: Any, **named: Any) -> Any:
    """`x / y` as `x * (1 / y)`. NotImplemented unless both are tensors."""
    x, y = operands if len(operands) == 2 else (None, None)
    return x * y.reciprocal() if isinstance(x, Tensor) and isinstance(y, Tensor) and not named else NotImplemented


# For each fused function, an equivalent one made of plain torch functions. It may return NotImplemented.
FUSED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    torch.einsum: affine_map,
    torch.stack: stack_of_copies,
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], cat_of_copies),
    **UNROLLED,
}
# Also functions that have a forward mode, but that have to be products and sums to be recorded.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    **FUSED,
    **dict.fromkeys([F.prelu, torch.prelu], _prelu),
    **dict.fromkeys([torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__], _difference),
    **dict.fromkeys([torch.div, torch.divide, Tensor.div, Tensor.divide, Tensor.__truediv__], _quotient),
}
