"""The running mean of the squared gradients, as a diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natgrad.capture.use import Use
from natgrad.optim.decay import Decay
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.rules.stage import Figures
from natgrad.optim.tracking.batch import Batch
from natgrad.optim.vectors import Vector


class Squares(Preconditioner):
    """`F = diag(v)`, `v` the running mean of the squared gradients."""

    inverted = "the mean of the squared gradients"

    def __init__(self, parameters: Parameters, keep: float):
        super().__init__(parameters)
        self.keep = keep
        self._sums: Vector = {}
        self._weight = 0.0
        self._inverse: Vector = {}

    def due(self, step: int) -> bool:
        return False

    def observe(self, batch: Batch, uses: list[Use], output: Tensor, draw: int, step: int) -> None:
        pass

    def take_in(self, objective: Objective, gradients: Vector, figures: Figures, step: int) -> set[str]:
        self._weight = self.keep * self._weight + 1
        squares = {n: (g / objective.scale).square() for n, g in gradients.items()}
        self._sums = {n: self.keep * self._sums[n] + s if n in self._sums else s for n, s in squares.items()}
        return set()

    def refresh(self, damping: float, decay: Decay, figures: Figures) -> None:
        extra = damping + decay.same(self.parameters)
        self._inverse = {n: 1 / (s / self._weight + extra) for n, s in self._sums.items()}

    def apply(self, v: Vector) -> Vector:
        return {n: d * self._inverse[n] for n, d in v.items()}

    def scale(self) -> float:
        size = sum(s.numel() for s in self._sums.values())
        return float(sum(s.sum() for s in self._sums.values())) / self._weight / size

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "weight": self._weight}

    def load(self, saved: dict[str, Any]) -> None:
        self._sums, self._weight = saved["sums"], saved["weight"]
