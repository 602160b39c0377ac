"""The affine map `a = W h + b`: the calls that make one, the views of a weight that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layers.inputs import Rows
from natgrad.capture.layers.kind import Call, Kind, View
from natgrad.linalg.layout import Layout


@dataclass(frozen=True)
class Affine(Kind):
    """`a = W h + b`, the weight stored as `(d_out, d_in)`, or as `(d_in, d_out)` where it is `transposed`.

    Exact in the cases; K-FAC takes each position of an example as a case (`sharing="expand"`), or averages them.
    """

    transposed: bool = False

    name = "linear"

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return Layout("transposed" if self.transposed else "plain")

    def inputs(self, h: Tensor) -> Rows:
        return Rows(rows(h))

    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid 1 o"]:
        return g.unsqueeze(-2)

    def oriented(self, transposed: bool) -> Affine:
        return Affine(self.transposed != transposed)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(Affine(), input, weight, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, **_: Any) -> Call | None:
    return Call(Affine(transposed=True), mat1, mat2, input) if beta == 1 and alpha == 1 else None


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Call | None:
    return Call(Affine(transposed=True), input, other)


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


# Which functions are affine maps, and how their arguments are read.
PARSERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
}

# Which functions give the entries of a parameter in another form.
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
    **dict.fromkeys(
        [torch.reshape, Tensor.reshape, Tensor.view, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze],
        _same,
    ),
    **dict.fromkeys([Tensor.to, Tensor.type_as, Tensor.float, Tensor.contiguous, Tensor.flatten], _same),
}


def rows(t: Tensor) -> Float[Tensor, "n t d"]:
    """Inputs or output gradients of one use as `(example, position, features)`.

    Axis 0 is the example; all axes between it and the features are positions.
    """
    return t.unflatten(0, (1, 1, -1)) if t.ndim == 1 else t.unsqueeze(1).flatten(1, -2)
