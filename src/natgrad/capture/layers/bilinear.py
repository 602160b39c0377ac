"""Bilinear maps: a linear map of the products of two inputs' entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.affine import Affine
from natgrad.capture.layers.kind import Call


@dataclass(frozen=True)
class Bilinear(Affine):
    """`a_o = uᵀ W_o v + b_o`, which is `W h + b` with `h = u ⊗ v`, row by row, and `W` as `(d_out, d_u d_v)`.

    The cases are exact. K-FAC's input factor is that of the products `h`, of width `d_u d_v`.
    """

    name = "bilinear"


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    # A copy: autograd does not notice if an input that only the weight's gradient needs is overwritten.
    with torch.no_grad():
        h = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    return Call(Bilinear(), h, weight, bias, others=(input1, input2))


PARSERS: dict[Any, Callable[..., Call]] = {F.bilinear: _bilinear}
