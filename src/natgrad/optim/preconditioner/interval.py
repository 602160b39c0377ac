"""Refresh intervals."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH = 10


@dataclass(frozen=True)
class Interval:
    """A number of steps, `most`. A `growing` interval starts with one step, and becomes one step longer every `growth`
    steps, because the curvature changes fast at first and slowly later.
    """

    most: int
    growing: bool
    growth: int = GROWTH

    def steps(self, now: int) -> int:
        """The interval at step `now`."""
        return min(self.most, 1 + now // self.growth) if self.growing else self.most
