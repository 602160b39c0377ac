"""Functions that return the entries of a tensor in another form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.kind import View


def _transpose(input: Tensor, *_: Any, **__: Any) -> View | None:
    return View(input, transposed=True) if input.ndim == 2 else None


def _transpose_dims(input: Tensor, dim0: int, dim1: int) -> View | None:
    return View(input, transposed=True) if input.ndim == 2 and (dim0 - dim1) % 2 else None


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> View | None:
    return _split(input, -(-len(input) // chunks), dim)


def _split(tensor: Tensor, split_size_or_sections: Any, dim: int = 0, **named: Any) -> View | None:
    size = named.get("split_size", split_size_or_sections)
    n = len(tensor)
    sizes = [min(size, n - i) for i in range(0, n, size)] if isinstance(size, int) else list(size)
    return View(tensor, tuple(pairwise(accumulate(sizes, initial=0)))) if dim == 0 else None


def _getitem(input: Tensor, index: Any) -> View | None:
    if isinstance(index, slice) and index.step in (None, 1):
        start, stop, _ = index.indices(len(input))
        return View(input, ((start, stop),)) if start < stop else None
    whole = (
        i is None or i is Ellipsis or (isinstance(i, slice) and i == slice(None))
        for i in (index if isinstance(index, tuple) else (index,))
    )
    return View(input) if all(whole) else None


def _same(input: Tensor, *_: Any, **__: Any) -> View:
    return View(input)


# Functions that keep the order of the entries.
CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.contiguous, Tensor.clone, torch.clone}
# Functions that add a number to all entries, as in `x * (1 + w)`. The derivatives do not change.
OFFSETS = {
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__),
    *(torch.subtract, Tensor.subtract),
}
# Functions that multiply all entries by one number, as `2 * w`, or subtract them from one.
MULTIPLES = {
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
    *(torch.div, Tensor.div, Tensor.__truediv__, torch.divide, Tensor.divide, torch.true_divide),
    *(torch.neg, Tensor.neg, Tensor.__neg__, torch.negative, Tensor.negative, torch.rsub, Tensor.__rsub__),
}
# Functions that change every entry by itself. They may get numbers besides, and no other tensor.
ELEMENTWISE = {
    *MULTIPLES,
    Tensor.__rtruediv__,
    *(torch.exp, Tensor.exp, torch.exp2, Tensor.exp2, torch.expm1, Tensor.expm1),
    *(torch.log, Tensor.log, torch.log1p, Tensor.log1p, torch.reciprocal, Tensor.reciprocal),
    *(torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt, torch.square, Tensor.square),
    *(torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__, torch.abs, Tensor.abs),
    *(torch.tanh, Tensor.tanh, F.tanh, torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.logsigmoid, F.softplus),
    *(torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.erf, Tensor.erf),
    *(torch.relu, Tensor.relu, F.relu, F.elu, F.gelu, F.silu, F.hardtanh, F.hardsigmoid),
    *(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, torch.clamp_min, Tensor.clamp_min),
    *(torch.clamp_max, Tensor.clamp_max),
}
RESHAPES = {
    *(torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten, Tensor.unflatten),
    *(Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze),
}
# What each function does to a matrix.
VIEWS: dict[Any, Callable[..., View | None]] = {
    torch.t: _transpose,
    Tensor.t: _transpose,
    torch.transpose: _transpose_dims,
    Tensor.transpose: _transpose_dims,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
    torch.split: _split,
    Tensor.split: _split,
    Tensor.__getitem__: _getitem,
    **dict.fromkeys([*RESHAPES, *CASTS, *OFFSETS], _same),
}
# Functions that select entries or reorder them. Only parameters that are not used as matrices may have this form.
SELECTIONS = {
    *(Tensor.narrow, torch.narrow, Tensor.select, torch.select, Tensor.unbind, torch.unbind),
    *(Tensor.permute, torch.permute, Tensor.movedim, torch.movedim, Tensor.swapaxes, torch.swapaxes),
    *(Tensor.flip, torch.flip, Tensor.roll, torch.roll, Tensor.repeat, Tensor.tile, torch.tile),
}
