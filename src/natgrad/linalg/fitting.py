"""Checks that the tensors of an operator match one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from natgrad.checks.values import described


def check_tensors(kind: str, tensors: Mapping[str, tuple[Any, Sequence[int]]]) -> None:
    """Raises unless each is a Tensor of the given shape, and all have one floating dtype and one device.

    >>> import torch
    >>> check_tensors("a pair", {"scale": (torch.ones(2), (2,)), "shift": (torch.ones(3), (2,))})
    Traceback (most recent call last):
    ValueError: of a pair, shift has shape (3,); expected (2,)
    """
    first: Tensor | None = None
    for name, (t, shape) in tensors.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            came = f"has dtype {t.dtype}" if isinstance(t, Tensor) else f"is {described(t)}"
            raise TypeError(f"of {kind}, {name} {came}; expected a Tensor of a floating dtype")
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"of {kind}, {name} has shape {tuple(t.shape)}; expected {tuple(shape)}")
        first = t if first is None else first
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"of {kind}, {name} is {t.dtype} on {t.device}; expected {first.dtype} on {first.device}, as "
                f"{next(iter(tensors))} is"
            )


def check_axes(kind: str, name: str, t: Any, axes: Sequence[int]) -> None:
    """Raises unless it is a Tensor with one of these numbers of axes."""
    if not isinstance(t, Tensor):
        raise TypeError(f"of {kind}, {name} is {described(t)}; expected a Tensor")
    if t.ndim not in axes:
        raise ValueError(f"of {kind}, {name} has shape {tuple(t.shape)}; expected {' or '.join(map(str, axes))} axes")
