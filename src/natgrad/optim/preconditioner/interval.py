"""How often something is due."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH = 10


@dataclass(frozen=True)
class Interval:
    """So many steps at the most; at the start fewer, if it is `growing`: one, and one more with every `growth` steps.

    Early on the curvature changes from step to step, and later not from ten to ten.
    """

    most: int
    growing: bool
    growth: int = GROWTH

    def steps(self, now: int) -> int:
        """How many at step `now`."""
        return min(self.most, 1 + now // self.growth) if self.growing else self.most
