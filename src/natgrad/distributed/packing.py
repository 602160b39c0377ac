"""Nested results packed into flat buffers and unpacked again, for sending between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """A tensor without its values. For a symmetric matrix, only the upper triangle is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False

    @classmethod
    def of(cls, t: Tensor) -> Form:
        square = t.ndim == 2 and t.shape[0] == t.shape[1] > 1
        return cls(tuple(t.shape), t.dtype, square and torch.equal(t, t.mT))

    @property
    def size(self) -> int:
        """The number of entries that are sent."""
        if self.symmetric:
            d = self.shape[0]
            return d * (d + 1) // 2
        return torch.Size(self.shape).numel()


def form_of(value: Any) -> Any:
    """Nested dictionaries, lists and tuples, with forms in place of the tensors."""
    if isinstance(value, Tensor):
        return Form.of(value)
    if isinstance(value, dict):
        return {k: form_of(v) for k, v in value.items()}
    return type(value)(form_of(v) for v in value) if isinstance(value, (list, tuple)) else value


def leaves(value: Any, kind: type) -> Iterator[Any]:
    """The tensors, or forms, in the order in which they are sent."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v, kind)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v, kind)


def filled(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with tensors in place of the forms."""
    if isinstance(form, Form):
        return next(tensors)
    if isinstance(form, dict):
        return {k: filled(v, tensors) for k, v in form.items()}
    return type(form)(filled(v, tensors) for v in form) if isinstance(form, (list, tuple)) else form


def packed(tensors: Iterable[Tensor], forms: Sequence[Form]) -> dict[torch.dtype, Tensor]:
    """One flat buffer for each precision."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    for t, form in zip(tensors, forms, strict=True):
        parts.setdefault(form.dtype, []).append(triangle(t) if form.symmetric else t.flatten())
    return {dtype: torch.cat(own) for dtype, own in parts.items()}


def empty(forms: Sequence[Form], device: torch.device) -> dict[torch.dtype, Tensor]:
    """Buffers to receive the tensors in."""
    sizes: dict[torch.dtype, int] = {}
    for form in forms:
        sizes[form.dtype] = sizes.get(form.dtype, 0) + form.size
    return {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}


def unpacked(buffers: dict[torch.dtype, Tensor], forms: Sequence[Form]) -> list[Tensor]:
    """The tensors in the buffers."""
    start = dict.fromkeys(buffers, 0)
    tensors = []
    for form in forms:
        part = buffers[form.dtype].narrow(0, start[form.dtype], form.size)
        start[form.dtype] += form.size
        tensors.append(from_triangle(part, form.shape[0]) if form.symmetric else part.view(form.shape).clone())
    return tensors


def triangle(M: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row by row."""
    return M[_upper(len(M), M.device)]


def from_triangle(values: Tensor, d: int) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    upper = _upper(d, values.device)
    M = values.new_zeros(d, d)
    M[upper] = values
    M.mT[upper] = values
    return M


def _upper(d: int, device: torch.device) -> Tensor:
    return torch.ones(d, d, dtype=torch.bool, device=device).triu_()
