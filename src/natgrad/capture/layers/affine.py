"""The affine map `a = W h + b`: the torch functions that compute one, and the views of a weight that they accept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layers.inputs import Rows
from natgrad.capture.layers.kind import Call, Kind
from natgrad.linalg.layout import Layout


@dataclass(frozen=True)
class Affine(Kind):
    """`a = W h + b`, with the weight stored as `(d_out, d_in)`, or as `(d_in, d_out)` if it is `transposed`.

    The cases are exact. K-FAC treats each position of an example as a case (`sharing="expand"`), or averages them.
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
        return replace(self, transposed=self.transposed != transposed)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(Affine(), input, weight, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, **_: Any) -> Call | None:
    return Call(Affine(transposed=True), mat1, mat2, input) if beta == 1 and alpha == 1 else None


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Call | None:
    return Call(Affine(transposed=True), input, other)


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


def rows(t: Tensor) -> Float[Tensor, "n t d"]:
    """Inputs or output gradients of one use as `(example, position, features)`.

    Axis 0 is the example; all axes between it and the features are positions.
    """
    return t.unflatten(0, (1, 1, -1)) if t.ndim == 1 else t.unsqueeze(1).flatten(1, -2)
