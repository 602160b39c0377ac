"""A principal submatrix, from products of the whole matrix."""

from __future__ import annotations

import torch

from natgrad.linalg.arguments import check_damping, check_plain
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts, Space


@later
class Restriction(Operator):
    """The rows and columns of `whole` that belong to some of its named parameters."""

    def __init__(self, whole: Operator, names: tuple[str, ...]):
        check_operator("Restriction", "whole", whole)
        space = whole.space
        unknown = [n for n in names if n not in (space.names or ())]
        if unknown:
            raise ValueError(f"names has {unknown[0]!r}; expected names from {space.describe()}")
        shapes = dict(zip(space.names or (), space.shapes, strict=True))
        self.whole, self.names = whole, names
        self.space = Space(tuple(shapes[n] for n in names), names)
        self.dtype, self.device = whole.dtype, whole.device

    def _matmul(self, parts: Parts) -> Parts:
        whole = self.whole.space
        own = dict(zip(self.names, parts, strict=True))
        leading = parts[0].shape[: parts[0].ndim - len(self.space.shapes[0])]
        padded = tuple(
            own[n] if n in own else torch.zeros(*leading, *s, dtype=self.dtype, device=self.device)
            for n, s in zip(whole.names or (), whole.shapes, strict=True)
        )
        out = dict(zip(whole.names or (), self.whole._matmul(padded), strict=True))
        return tuple(out[n] for n in self.names)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        check_plain("a restriction", damping_style)
        return IterativeInverse(self, damping)
