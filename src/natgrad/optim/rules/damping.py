"""How the damping moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

CEILING = 10.0
LIMIT = 1e3
HIGHEST = 1e5


class DampingRule(ABC):
    """How an adaptive damping changes. It takes numbers and returns a number. It must not keep anything between calls,
    as a saved run contains the damping only.

    An optimizer passes it to `_assemble`. To try a rule with an existing one: `opt.recipe.damping.rule = MyRule()`.
    """

    @abstractmethod
    def adapt(self, damping: float, ratio: float, scale: float, share: float = 1.0) -> float:
        """The next damping, after a step whose loss was measured.

        Args:
            damping: `λ` of the step.
            ratio: `ρ = (change of the loss) / (change of the quadratic model)`. It is 1 if the model is right.
            scale: the mean of the curvature's diagonal.
            share: the part of the step that was taken, if a bound on its length shortened it.
        """

    @abstractmethod
    def after_rejection(self, damping: float, count: int, scale: float) -> float:
        """The damping after the `count`-th rejected step in a row, counted from 1. It should be larger than before."""


class LevenbergMarquardt(DampingRule):
    """Damping `λ` that follows how well the quadratic model predicts the loss.

    After a step with reduction ratio `ρ = (change of the loss) / (change of the model)`: `λ` is multiplied by
    `factor` where `ρ > 3/4`, divided by it where `ρ < 1/4`.

    The step size is chosen with the exact curvature, so `ρ` says little about the damping inside of the inverse
    and would let it fall for ever. It stops at `floor` times the mean of the curvature's diagonal. Upwards it stops at
    `CEILING` times that: near a minimum `ρ` is rounding, and would let it rise for ever. Rejections may raise it to
    `LIMIT` times that, from where it falls again unless `ρ < 1/4`.

    Args:
        factor: below 1.
        floor: in units of the mean of the curvature's diagonal.

    Reference: Martens & Grosse (2015), section 6.5; Moré (1978).
    """

    def __init__(self, factor: float, floor: float):
        self.factor, self.floor = factor, floor

    def adapt(self, damping: float, ratio: float, scale: float, share: float = 1.0) -> float:
        if share < 0.7:
            return min(damping / self.factor, max(damping, LIMIT * scale))
        lower = min(damping, max(damping * self.factor, self.floor * scale))
        if ratio > 0.75:
            return lower
        if ratio < 0.25:
            return min(damping / self.factor, max(damping, CEILING * scale))
        return lower if damping > CEILING * scale > 0 else damping

    def after_rejection(self, damping: float, count: int, scale: float) -> float:
        """Times four, and sixteen, and so on, up to a limit."""
        return min(damping * 4.0 ** min(count, 50), max(damping, LIMIT * scale if scale > 0 else 1e30))


class Eager(LevenbergMarquardt):
    """Damping that falls after every step that the quadratic model predicted half well, down to rounding.

    `λ` is multiplied by `factor` where `ρ > 1/2`, and divided by it where the loss rose. A step that is rejected is
    tried again with twice the damping, then four times that, and so on.

    Where the step is that of the damped matrix itself, `λ` alone bounds it. The rule of thumb with 3/4 and 1/4 can then
    leave it in between for ever: in a curved valley `ρ` stays at 0.6, and the steps stay small. Upwards it may come to
    `HIGHEST` times the mean eigenvalue: the first eigenvalue can be nearly the whole trace.
    """

    def adapt(self, damping: float, ratio: float, scale: float, share: float = 1.0) -> float:
        if share < 0.7:
            return self._raised(damping, 1 / self.factor, scale)
        if ratio > 0.5:
            return min(damping, max(damping * self.factor, self.floor * scale))
        return self._raised(damping, 1 / self.factor, scale) if ratio <= 0 else damping

    def after_rejection(self, damping: float, count: int, scale: float) -> float:
        return self._raised(damping, 2.0 ** min(count, 100), scale)

    def _raised(self, damping: float, factor: float, scale: float) -> float:
        return min(damping * factor, max(damping, HIGHEST * scale if scale > 0 else 1e30))


class DampingControl:
    """The damping of a run: a number, or None until it is calibrated.

    `given`: whether it is the user's own, and stays. `adaptive`: whether it follows how well steps are predicted. It
    does not once it has come down to `least`, unless a rejection raises it.
    """

    def __init__(self, value: float | None, rule: DampingRule, least: float = 0.0):
        self.value, self.rule, self.least, self.given = value, rule, least, value is not None

    @property
    def adaptive(self) -> bool:
        return not self.given and (self.value is None or self.value > self.least)

    def calibrated(self, value: float) -> None:
        """The first damping of a run."""
        self.value = max(value, self.least)

    def adapt(self, ratio: float, scale: float, share: float) -> None:
        """After a step that was measured, `share` of which was taken to keep a bound on its length."""
        if self.adaptive and self.value is not None:
            self.value = max(self.rule.adapt(self.value, ratio, scale, share), self.least)

    def raise_(self, count: int, scale: float) -> None:
        """After a rejection, the `count`-th in a row."""
        if not self.given and self.value is not None:
            self.value = self.rule.after_rejection(self.value, count, scale)


def calibrate(scale: float, loss_after: Callable[[float], float]) -> float:
    """The damping after whose step the loss on the first batch is lowest.

    Tries `scale · 10³, 10², ... 10⁻⁶` from the safe end, and stops once two in a row were no better.

    Args:
        scale: a typical curvature: `tr F` over the number of parameters.
        loss_after: the loss after the step that this damping proposes; infinite where there is none.
    """
    best, best_loss, worse = scale * 1e3, float("inf"), 0
    for damping in _grid(scale):
        loss = loss_after(damping)
        if loss < best_loss:
            best, best_loss, worse = damping, loss, 0
        else:
            worse += 1
        if worse == 2:
            break
    return best


def _grid(scale: float) -> Iterator[float]:
    return (scale * 10.0**k for k in range(3, -7, -1))


def weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """Of pairs of a value and its weight, the least value that has half of the weight at or below it; 0 of none.

    Example:
        >>> weighted_median([(5.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
        2.0
        >>> weighted_median([(1e9, 4.0), (2.0, 5.0)])
        2.0
    """
    ordered = sorted(values)
    half = sum(weight for _, weight in ordered) / 2
    below = accumulate(weight for _, weight in ordered)
    return next((value for (value, _), sofar in zip(ordered, below, strict=True) if sofar >= half), 0.0)
