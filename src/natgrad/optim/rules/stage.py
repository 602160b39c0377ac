"""What a step starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from natgrad.optim.decay import Decay
from natgrad.optim.objective import Objective
from natgrad.optim.vectors import Vector


@dataclass
class Stage:
    """The objective, its gradient per unit of the objective, its value including weight decay, and the weight decay.

    `rejected`: the number of steps from here that were rejected and tried again with more damping.
    """

    objective: Objective
    gradient: Vector
    decay: Decay
    loss: float
    rejected: int = 0


class Rejection(Exception):
    """A step that cannot be taken, and why. `by_step`: whether more damping helps; it does not, if the batch is bad."""

    def __init__(self, reason: str, by_step: bool = True):
        super().__init__(reason)
        self.by_step = by_step


@runtime_checkable
class Directions(Protocol):
    """What a step rule needs from the preconditioner."""

    nesterov: bool

    def apply(self, v: Vector) -> Vector:
        """`(F + λI)⁻¹ v`, with the current inverse."""

    def damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """What the damping adds to the quadratic model: this rank's share of `λ d_iᵀ d_j`."""


Figures = dict[str, Any]
