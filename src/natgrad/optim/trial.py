"""Trial steps: the loss after a step is measured, and a step that raises it is shortened or undone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.rules.move import Step
from natgrad.optim.rules.stage import Stage
from natgrad.optim.vectors import Vector
from natgrad.optim.whole import uninterrupted

BACKTRACKING = (0.25, 0.0625, 0.015625)
"""The shares of a step that are tried if the whole step would raise the loss."""
HALVINGS = 10
"""How often a line search halves a step at most."""
ON_ANOTHER_BATCH = 0.5
"""The share by which a step may raise the loss of another batch. Close to convergence, a good step raises the loss of
every second batch a little. Undoing all such steps would lose half of them."""
FAR = 9.0
"""The same if the damping has reached its lower bound, where steps are not measured."""


@dataclass(frozen=True)
class Taken:
    """The step that was taken, its share of the proposed step, and the loss after it if that was measured."""

    step: Step
    share: float = 1.0
    loss_after: float | None = None


@dataclass(frozen=True)
class Risen:
    """No step was taken, because the loss would have risen to this value."""

    loss_after: float


class Trials:
    """Takes steps of some parameters.

    Args:
        parameters: those that move.
        tolerated: the share of the loss by which a step may raise it on its own batch.
    """

    def __init__(self, parameters: Parameters, tolerated: float):
        self.parameters, self.tolerated = parameters, tolerated

    def take(self, step: Step) -> Taken:
        """Takes a step without measuring it."""
        with uninterrupted():
            step.take(self.parameters.local())
        return Taken(step)

    def measure(self, step: Step, stage: Stage, *, shorten: bool, search: bool = False) -> Taken | Risen:
        """Takes a step if it does not raise the loss. Otherwise, with `shorten`, takes the first of some shorter steps
        that does not raise it. With `search`, the step is halved as long as that lowers the loss.

        A saturated output has almost no curvature, for example that of an example that is wrong with high confidence.
        If most others are right, the direction is good but the quadratic model makes the step too long. More damping
        would not help: it falls again before that example comes back.
        """
        before = self.parameters.snapshot()
        try:
            step.take(self.parameters.local())
            after = self.loss_now(stage)
            if search:
                return self._halved(step, stage, before, after)
            if after <= self._highest(stage.loss):
                return Taken(step, 1.0, after)
            self.parameters.return_to(before)
            for share in BACKTRACKING if shorten else ():
                shorter = step.shortened(share)
                shorter.take(self.parameters.local())
                its = self.loss_now(stage)
                if its <= stage.loss:
                    return Taken(shorter, share, its)
                self.parameters.return_to(before)
            return Risen(after)
        except BaseException:
            self._put_back(before)
            raise

    def _halved(self, step: Step, stage: Stage, before: Vector, after: float) -> Taken | Risen:
        """Takes the step, or a half, a quarter, ... of it: the last one before the loss rises again."""
        shorter, share, lowest = step, 1.0, after if math.isfinite(after) else math.inf
        for k in range(1, HALVINGS + 1):
            self.parameters.return_to(before)
            half = step.shortened(0.5**k)
            half.take(self.parameters.local())
            its = self.loss_now(stage)
            if its < lowest:
                shorter, share, lowest = half, 0.5**k, its
            elif lowest < math.inf:
                break
        self.parameters.return_to(before)
        if not lowest <= self._highest(stage.loss):
            return Risen(lowest)
        shorter.take(self.parameters.local())
        return Taken(shorter, share, lowest)

    def loss_after(self, step: Step, stage: Stage) -> float:
        """The loss after a step, which is then undone; infinite if the loss is not finite."""
        before = self.parameters.snapshot()
        try:
            step.take(self.parameters.local())
            after = self.loss_now(stage)
        finally:
            self._put_back(before)
        return after if math.isfinite(after) else math.inf

    def loss_now(self, stage: Stage) -> float:
        """The objective on the pending batches at the current parameters."""
        return stage.objective.evaluate() + self.penalty(stage)

    def penalty(self, stage: Stage) -> float:
        """The objective's share of weight decay."""
        decay = stage.decay
        return self.parameters.total([decay.value(self.parameters.local())])[0] if decay.eta else 0.0

    def too_far(self, loss: float, before: float | None, share: float) -> bool:
        """Whether the loss is more than this share above the loss of the step before. Then a forward pass is worth its
        cost to find out the cause: the batch, or the step."""
        return before is not None and loss > before + share * abs(before)

    def undo_last(self, objective: Objective, loss: float = math.inf, share: float = 0.0) -> bool:
        """Undoes the last step if it has raised this batch's loss, which is `loss` now, by more than this share."""
        states = {n: self.parameters.state_of(n) for n in self.parameters}
        delta = {n: s["delta"] for n, s in states.items() if "delta" in s}
        if not delta or not objective.runs_again:
            return False
        own, before = self.parameters.local(), self.parameters.snapshot()
        undone = False
        try:
            for n, d in delta.items():
                own[n].sub_(d)
            without = objective.evaluate()
            undone = math.isfinite(without) and loss > without + share * abs(without)
        finally:
            if not undone:
                self._put_back(before)
        return undone

    def _highest(self, loss: float) -> float:
        return loss + self.tolerated * abs(loss)

    def _put_back(self, before: Vector) -> None:
        with uninterrupted():
            self.parameters.return_to(before)
            self.parameters.place.settle()
