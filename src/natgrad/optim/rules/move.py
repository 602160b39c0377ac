"""A step: its direction, and the factor of the direction for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from natgrad.optim.vectors import Vector


@dataclass(frozen=True)
class Part:
    """Some parameters, the factor of their direction, and the factor that shrinks them before. `length`: a factor that
    the direction has already, if the next step is to know it."""

    names: Sequence[str]
    factor: float
    shrink: float = 1.0
    length: float | None = None


@dataclass(frozen=True)
class Step:
    """`θ ← shrink θ + factor Δ`, part by part."""

    direction: Vector
    parts: Sequence[Part]

    def take(self, parameters: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            own = [parameters[n] for n in part.names]
            if part.shrink != 1:
                torch._foreach_mul_(own, part.shrink)
            torch._foreach_add_(own, [self.direction[n] for n in part.names], alpha=part.factor)

    def shortened(self, share: float) -> Step:
        """The step, shortened to a share of its length."""
        parts = [replace(part, factor=share * part.factor, shrink=1 - share * (1 - part.shrink)) for part in self.parts]
        return Step(self.direction, parts)

    @cached_property
    def delta(self) -> Vector:
        """What is added to the parameters, without the effect of shrinking."""
        delta: Vector = {}
        for part in self.parts:
            own = [self.direction[n] for n in part.names]
            if part.factor != 1:
                own = list(torch._foreach_mul(own, part.factor))
            delta |= dict(zip(part.names, own, strict=True))
        return delta
