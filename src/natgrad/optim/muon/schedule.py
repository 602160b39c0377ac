"""When the averages of which matrix are updated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from natgrad.optim.preconditioner.interval import Interval

GROWTH = 2
"""The interval between updates grows by a step in so many steps. Inputs change fast at the start, and a recorded
forward may cost several others."""


class Schedule:
    """When what is known of each parameter's use was updated. It is due again after an interval. Then the next forward
    is recorded; and the forwards after it, until the parameter is used, if it had a gradient meanwhile. So one that is
    used only now and then is updated the next time, whatever its turn.
    """

    def __init__(self, every: int):
        self._interval = Interval(every, True, GROWTH)
        self.begin()

    def begin(self) -> None:
        """Nothing is known of any parameter. The next forward is recorded."""
        self._looked_at: dict[str, int] = {}  # at which step
        self._waiting: set[str] = set()
        self._fresh = True

    def is_due(self, name: str, step: int) -> bool:
        last = self._looked_at.get(name)
        return last is None or step - last >= self._interval.steps(step)

    def asks(self, names: Iterable[str], step: int) -> bool:
        """Whether the forwards of a step are recorded, for these parameters."""
        interval = self._interval.steps(step)
        waiting = (n in self._waiting and self.is_due(n, step) for n in names)
        return self._fresh or any(waiting) or any(self._looked_at.get(n) == step - interval for n in names)

    def end_step(self, step: int, used: Collection[str], recorded: bool) -> None:
        """After a step in which the gradients of `used` parameters came, and the forwards were recorded or not."""
        if recorded and used:
            self._fresh = False
            due = {n for n in used if self.is_due(n, step)}
            self._looked_at |= dict.fromkeys(due, step)
            self._waiting -= due
        self._waiting |= {n for n in used if self._looked_at.get(n) != step}

    def state(self) -> dict[str, Any]:
        return {"refreshed": dict(self._looked_at), "waiting": dict.fromkeys(sorted(self._waiting), True)}

    def load(self, saved: Mapping[str, Any]) -> None:
        self._looked_at, self._waiting = dict(saved["refreshed"]), set(saved["waiting"])
        self._fresh = not self._looked_at
