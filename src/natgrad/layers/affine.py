"""The affine map `a = W h + b`: the calls that make one, its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class AffineCall:
    """A torch call read as `a = W h + b`. `transposed`: the weight is stored as `(d_in, d_out)`.

    A call that only transposes a weight has `view_of`; one that only adds a bias to `h` has no weight.
    """

    h: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    transposed: bool = False
    view_of: Tensor | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> AffineCall:
    return AffineCall(input, weight, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, **_: Any) -> Any:
    return AffineCall(mat1, mat2, input, transposed=True) if beta == 1 and alpha == 1 else None


def _matmul(input: Tensor, other: Tensor, **_: Any) -> AffineCall:
    return AffineCall(input, other, transposed=True)


def _transpose(input: Tensor, *_: Any, **__: Any) -> AffineCall | None:
    return AffineCall(input, view_of=input) if input.ndim == 2 else None


def _transpose_dims(input: Tensor, dim0: int, dim1: int) -> AffineCall | None:
    return AffineCall(input, view_of=input) if input.ndim == 2 and (dim0 - dim1) % 2 else None


def _add(input: Any, other: Any, *, alpha: Any = 1, **_: Any) -> AffineCall | None:
    if alpha != 1 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return None
    if isinstance(input, torch.nn.Parameter):
        input, other = other, input
    return AffineCall(input, bias=other)


# Which functions are affine maps, and how their arguments are read.
PARSERS: dict[Any, Callable[..., AffineCall | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.t: _transpose,
    Tensor.t: _transpose,
    torch.transpose: _transpose_dims,
    Tensor.transpose: _transpose_dims,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
}


def affine(h: Tensor, W: Tensor | None, b: Tensor | None, transposed: bool) -> Tensor | None:
    """`W h + b` for a weight in either layout, with either part left out."""
    if W is None:
        return b
    return F.linear(h, W.mT if transposed else W, b)


def rows(t: Tensor) -> Tensor:
    """Inputs or output gradients of one use as `(example, position, features)`.

    Axis 0 is the example; all axes between it and the features are positions.
    """
    return t.unflatten(0, (1, 1, -1)) if t.ndim == 1 else t.unsqueeze(1).flatten(1, -2)
