"""Damping rules: how the damping changes from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

CEILING = 10.0
"""The reduction ratio alone does not raise the damping above this many times the typical curvature."""
LIMIT = 1e3
"""Rejections do not raise it above this many times the typical curvature."""
HIGHEST = 1e5
"""The bound of `Eager` for both."""


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

    After a step with reduction ratio `ρ = (change of the loss) / (change of the model)`, `λ` is multiplied by `factor`
    if `ρ > 3/4`, and divided by it if `ρ < 1/4`.

    The exact curvature gives the step size, so `ρ` says little about the damping of the inverse, and would let it fall
    without bound. Its lower bound is `floor` times the mean of the curvature's diagonal. Near a minimum, `ρ` is
    rounding, and would let the damping rise without bound. Its upper bound is `CEILING` times that mean. Rejections may
    raise it to `LIMIT` times that mean, from where it falls again unless `ρ < 1/4`.

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
        """Four times the damping, then 16 times, 64 times, ..., up to a limit."""
        return min(damping * 4.0 ** min(count, 50), max(damping, LIMIT * scale if scale > 0 else 1e30))


class Eager(LevenbergMarquardt):
    """Damping that falls faster than with `LevenbergMarquardt`, down to rounding: after every step with `ρ > 1/2`.

    `λ` is multiplied by `factor` if `ρ > 1/2`, and divided by it if the loss rose. A rejected step is tried again with
    twice the damping, then four times that, and so on.

    If the step is computed with the damped matrix itself, only `λ` bounds its length. In a curved valley, `ρ` may stay
    at 0.6. Then the rule with 3/4 and 1/4 would never change `λ`, and the steps would stay small. The upper bound is
    `HIGHEST` times the mean eigenvalue, because the first eigenvalue can be nearly the whole trace.
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

    `given`: whether the user gave it, so that it does not change. `adaptive`: whether it follows how well steps are
    predicted. Once it has reached the lower bound `least`, it stays there unless a rejection raises it.
    """

    def __init__(self, value: float | None, rule: DampingRule, least: float = 0.0):
        self.value, self.rule, self.least, self.given = value, rule, least, value is not None

    @property
    def adaptive(self) -> bool:
        return not self.given and (self.value is None or self.value > self.least)

    def calibrated(self, value: float) -> None:
        """Sets the first damping of a run."""
        self.value = max(value, self.least)

    def adapt(self, ratio: float, scale: float, share: float) -> None:
        """Called after a step that was measured. `share` is the part of it that was within the bound on its length."""
        if self.adaptive and self.value is not None:
            self.value = max(self.rule.adapt(self.value, ratio, scale, share), self.least)

    def raise_(self, count: int, scale: float) -> None:
        """Called after the `count`-th rejection in a row."""
        if not self.given and self.value is not None:
            self.value = self.rule.after_rejection(self.value, count, scale)


def calibrate(scale: float, loss_after: Callable[[float], float]) -> float:
    """The damping whose step gives the lowest loss on the first batch.

    It tries `scale · 10³, 10², ... 10⁻⁶`, starting with the largest, and stops after two in a row without improvement.

    Args:
        scale: a typical curvature: `tr F` over the number of parameters.
        loss_after: gives the loss after the step with some damping; infinite if there is no such step.
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
    """The weighted median of pairs `(value, weight)`: the smallest value such that the values up to it have half of the
    total weight; 0 if there are no pairs.

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
