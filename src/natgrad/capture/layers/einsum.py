"""`torch.einsum` of an input and a weight, computed as an affine map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from string import ascii_letters
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def affine_map(equation: Any, *operands: Any) -> Any:
    """`torch.einsum(equation, *operands)`, computed as a matrix product.

    The operand with the output's first index is the input `h`, and the other one is the weight `W`. Every index of `W`
    is either summed over and also in `h`, or is only in the output: `"nti,ihd->nthd"`. NotImplemented for any other
    equation.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    read = _read(equation, operands)
    if read is None:
        return NotImplemented
    of_h, of_W, out = read
    h, W = operands
    if out[0] not in of_h:
        h, W, of_h, of_W = W, h, of_W, of_h
    summed = [i for i in of_W if i in of_h]
    features = [i for i in of_W if i not in of_h]
    rest = [i for i in of_h if i not in summed]
    in_blocks = of_W in (summed + features, features + summed)  # so that a reshape makes it a matrix
    if isinstance(h, nn.Parameter) or not (summed and features and in_blocks) or sorted(rest + features) != sorted(out):
        return NotImplemented
    size = dict(zip(chain(of_h, of_W), chain(h.shape, W.shape), strict=True))
    if any(size[i] != n for i, n in zip(of_h, h.shape, strict=True)):
        return NotImplemented  # an axis of length 1 that is broadcast
    matrix = h.permute([of_h.index(i) for i in rest + summed]).reshape(*[size[i] for i in rest], _size(summed, size))
    if of_W == features + summed:
        a = F.linear(matrix, _as_matrix(W, _size(features, size), _size(summed, size)))
    else:
        a = matrix @ _as_matrix(W, _size(summed, size), _size(features, size))
    if len(features) > 1:
        a = a.unflatten(-1, [size[i] for i in features])
    order = [(rest + features).index(i) for i in out]
    return a if order == sorted(order) else a.permute(order)


def _read(equation: Any, operands: Sequence[Any]) -> tuple[list[str], list[str], list[str]] | None:
    """The indices of two operands and of the output, with the ellipsis expanded; None for any other equation."""
    if not (isinstance(equation, str) and len(operands) == 2 and all(isinstance(t, Tensor) for t in operands)):
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    free = [i for i in ascii_letters if i not in equation]
    dots = [t.ndim - len(term.replace("...", "")) for term, t in zip(terms, operands, strict=True) if "..." in term]
    if (len(dots) == 2 and 0 not in dots) or any(d < 0 or d > len(free) for d in dots):
        return None
    several = "".join(free[: max(dots, default=0)])
    written = [
        term.replace("...", several if t.ndim > len(term.replace("...", "")) else "")
        for term, t in zip(terms, operands, strict=True)
    ]
    if not arrow:
        once = sorted(i for i in left.replace("...", "").replace(",", "") if left.count(i) == 1)
        out = "..." + "".join(once)
    found = [*written, out.replace("...", several)]
    fits = all(len(term) == t.ndim for term, t in zip(written, operands, strict=True))
    if not fits or any(len(set(term)) != len(term) or not term.isalpha() for term in found):
        return None
    a, b, c = map(list, found)
    return a, b, c


def _as_matrix(W: Tensor, rows: int, columns: int) -> Tensor:
    return W if W.ndim == 2 else W.reshape(rows, columns)


def _size(indices: Sequence[str], size: dict[str, int]) -> int:
    return prod(size[i] for i in indices)
