"""How often something is due."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH = 10


@dataclass(frozen=True)
class Interval:
    """So many steps at the most; at the start fewer, if it is `growing`: one, and one more with every ten steps.

    Early on the curvature changes from step to step, and later not from ten to ten.
    """

    most: int
    growing: bool

    def steps(self, now: int) -> int:
        """How many at step `now`."""
        return min(self.most, 1 + now // GROWTH) if self.growing else self.most
