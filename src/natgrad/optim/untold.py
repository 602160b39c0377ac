"""Checks that the gradients come from the losses that the optimizer knows, and from nothing else."""

from __future__ import annotations

import math

from torch import Tensor

from natgrad.checks.warning import warn
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.vectors import Vector

LOOKS = (0, 9, 99)
"""The steps that are checked. A term may start later in a run, after a warm-up."""
FULL, LOWERED = 0.02, 0.2
"""The share of the gradients from elsewhere above which there is a warning: in full precision, and in low precision."""


class Untold:
    """Computes the gradient of the known losses once more, at a few steps of a run.

    A term that the user added without `opt.plus` changes the gradients, but not the quadratic model and not the losses
    that a step measures.
    """

    def __init__(self, optimizer: str, parameters: Parameters):
        self._optimizer, self._parameters = optimizer, parameters
        self.told = False

    def look(self, objective: Objective, gradients: Vector, step: int) -> None:
        """Warns, once, if another term is in the gradients.

        Args:
            objective: the known losses.
            gradients: those that arrived, by parameter name.
            step: the number of steps before this one.
        """
        if self.told or step not in LOOKS or not (self._here() and objective.repeatable):
            return
        known = objective.gradient(list(gradients))
        share = 0.0 if known is None else off(known, gradients)
        if share > (LOWERED if objective.lowered else FULL):
            self.told = True
            warn(
                f"the gradients are not those of the losses that {self._optimizer} was told of: {share:.0%} of them "
                "come from elsewhere. A term that is added to the loss is unknown to the quadratic model, and to the "
                "losses that a step measures: write loss + opt.plus(lambda: term), with a function that computes the "
                "term. Gradients that are changed by hand after backward, as by clipping each entry, are seen so too"
            )

    def _here(self) -> bool:
        """Whether the gradients are this process's own."""
        place = self._parameters.place
        return place.world.size == 1 and place.shards is None


def off(known: Vector, gradients: Vector) -> float:
    """`‖g - c k‖ / ‖g‖`, with the factor `c` of each parameter that fits best: a user may scale each."""
    rest = total = 0.0
    for n, g in gradients.items():
        square = rest_of = float(_square(g))
        k = known.get(n)
        if k is not None:
            inner, own = float((k.double() * g.double()).sum()), float(_square(k))
            if own > 0 and inner > 0:
                rest_of = float(_square(g.double() - inner / own * k.double()))
        rest, total = rest + rest_of, total + square
    return math.sqrt(rest / total) if total > 0 and math.isfinite(total) else 0.0


def _square(t: Tensor) -> Tensor:
    return t.double().square().sum()
