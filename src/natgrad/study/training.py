"""Taking steps until a budget is spent, with moments in between during which the clock is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

B = TypeVar("B")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""The kind of seconds: wall-clock time, or processor time summed over the threads."""


@dataclass(frozen=True)
class Budget:
    """A number of steps, or of seconds of training."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.seconds:g} s"

    def share(self, step: int, seconds: float) -> float:
        """The share that is spent; 1 or more at the end."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return seconds / self.seconds

    def scaled(self, share: float) -> Budget:
        """A share of it, at least one step."""
        steps = None if self.steps is None else max(1, round(share * self.steps))
        return Budget(steps, None if self.seconds is None else share * self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps is not None else {"seconds": self.seconds}


@dataclass(frozen=True)
class Schedule:
    """Learning rates during a run: they rise linearly from zero over the share `warmup` of the budget, stay constant,
    and fall linearly to zero over the share `cooldown` at the end."""

    warmup: float = 0.0
    cooldown: float = 0.0

    def of(self, setting: Mapping[str, Any]) -> Schedule:
        """The schedule of an optimizer's setting, which may have a cooldown of its own."""
        return replace(self, cooldown=setting.get("cooldown", self.cooldown))

    def factor(self, budget: Budget, step: int, share: float) -> float:
        """The factor of the rates in the step that follows `step` others and a share of the budget."""
        ahead = (step + 1) / budget.steps if budget.steps is not None else max(share, 0.01 * self.warmup)
        rising = min(1.0, ahead / self.warmup) if self.warmup else 1.0
        return rising * (min(1.0, (1 - share) / self.cooldown) if self.cooldown else 1.0)


CONSTANT = Schedule()


@dataclass(frozen=True)
class Moment:
    """A pause between two steps. `due`: the model should be evaluated; `last`: no step follows."""

    step: int
    seconds: float
    share: float
    due: bool
    last: bool


def moments(
    take_step: Callable[[B], Any],
    batches: Iterator[B],
    budget: Budget,
    evaluations: int,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Moment]:
    """Takes steps until the budget is spent or `stopped()`; yields before the first step and after each.

    The clock, in seconds, runs only in `take_step`: neither during a moment, nor while a batch is fetched. Leaving the
    loop ends the training.
    """
    step, seconds, due = 0, 0.0, 0.0
    while True:
        share = budget.share(step, seconds)
        last = share >= 1 or stopped()
        now = last or share >= due - 1e-9
        if now:
            due = share + 1 / evaluations
        yield Moment(step, seconds, share, now, last)
        if last:
            return
        batch = next(batches)
        start = clock()
        take_step(batch)
        seconds += clock() - start
        step += 1
