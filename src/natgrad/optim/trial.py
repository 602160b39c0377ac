"""Steps that are tried: measured, and shortened or taken back where the loss rises."""

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
"""The shares of a step that are tried where the whole of it would raise the loss."""
ON_ANOTHER_BATCH = 0.5
"""The share of another batch's loss by which a step may raise it. A good step raises that of every second batch by a
little, where few digits are left to gain: to take all of these back would cost half of the steps."""
FAR = 9.0
"""The same where the damping has come down to its least, and steps are not measured."""


@dataclass(frozen=True)
class Taken:
    """The step that was taken, which share of the one proposed, and the loss after it, where that was measured."""

    step: Step
    share: float = 1.0
    loss_after: float | None = None


@dataclass(frozen=True)
class Risen:
    """No step was taken, as the loss would have risen to this."""

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
        """Takes a step as it is."""
        with uninterrupted():
            step.take(self.parameters.local())
        return Taken(step)

    def measure(self, step: Step, stage: Stage, shorten: bool) -> Taken | Risen:
        """Takes a step if the loss does not rise by it; else, if it may be shortened, the first of some shorter ones
        after which the loss is no higher.

        Where few outputs have any curvature left, as those of one example that is wrong with high confidence among
        many that are right, the direction is good and the length of the quadratic model is not. Damping alone falls
        again before the example comes back, and would leave it as it is for ever.
        """
        before = self.parameters.snapshot()
        try:
            step.take(self.parameters.local())
            after = self.loss_now(stage)
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

    def loss_after(self, step: Step, stage: Stage) -> float:
        """The loss that a step would lead to; infinite where it would not be finite."""
        before = self.parameters.snapshot()
        try:
            step.take(self.parameters.local())
            after = self.loss_now(stage)
        finally:
            self._put_back(before)
        return after if math.isfinite(after) else math.inf

    def loss_now(self, stage: Stage) -> float:
        """The objective on the pending batches at the parameters as they are."""
        return stage.objective.evaluate() + self.penalty(stage)

    def penalty(self, stage: Stage) -> float:
        """The objective's share of weight decay."""
        decay = stage.decay
        return self.parameters.total([decay.value(self.parameters.local())])[0] if decay.eta else 0.0

    def too_far(self, loss: float, before: float | None, share: float) -> bool:
        """Whether a loss is by more than this share above that of the step before, so that it is worth a forward to
        know why: the batch, or the step."""
        return before is not None and loss > before + share * abs(before)

    def undo_last(self, objective: Objective, loss: float = math.inf, share: float = 0.0) -> bool:
        """Takes the last step back if it has raised this batch's loss to `loss` by more than this share."""
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
