"""Taking steps until a budget is spent, with moments in between at which no time runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

B = TypeVar("B")


@dataclass(frozen=True)
class Budget:
    """So many steps, or so many seconds of training."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.seconds:g} s"

    def share(self, step: int, seconds: float) -> float:
        """How much of it is spent, 1 or more at the end."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps is not None else {"seconds": self.seconds}


@dataclass(frozen=True)
class Moment:
    """Between two steps. `due`: the model is to be evaluated; `last`: no step follows."""

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
    """Takes steps until the budget is spent or `stopped()`; yields before the first and after each.

    The clock, in seconds, runs in `take_step` only: neither in what is done at a moment, nor while a batch is fetched.
    Leaving the loop ends the training.
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
