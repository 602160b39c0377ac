"""Statistics over seeds: spreads, paired ratios with confidence intervals, steps and time to reach an error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Result = Mapping[str, Any]
LEVEL = 0.95
FEWEST = 3
"""The minimum number of values for an interval: with two, it is 12.7 standard errors wide on each side, which is
useless."""
WIDEST = 1e4
"""An interval of a ratio is useless if the ratio of its ends is larger than this."""


def final(result: Result) -> float:
    """The last figure; infinite if the run has no finite figure or did not finish."""
    if result["status"] != "finished" or not result["curve"]:
        return math.inf
    value = result["curve"][-1][result["figure"]]
    return math.inf if value is None else float(value)


@dataclass(frozen=True)
class Interval:
    """A mean, and its 95% confidence interval from `low` to `high`; these are NaN for fewer than 3 values."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether an interval of ratios exists and is narrow enough to be useful."""
        return 0 < self.high <= WIDEST * self.low


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent values and its confidence interval by Student's t.

    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    n, mean = len(values), statistics.fmean(values)
    if n < FEWEST:
        return Interval(mean, math.nan, math.nan)
    half = student_quantile((1 + level) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def student_quantile(p: float, df: int) -> float:
    """The `p`-quantile, for `p` of at least ½, of Student's t with `df` degrees of freedom.

    >>> round(student_quantile(0.975, 4), 4)
    2.7764
    """
    low, high = 0.0, 1.0
    while student_cdf(high, df) < p:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
        if middle in (low, high) and high - low <= 4e-16 * high:
            break
    return (low + high) / 2


def student_cdf(t: float, df: int) -> float:
    """The probability of a value of at most `t ≥ 0`, for a whole number of degrees of freedom.

    With `θ = atan(t / √df)` it is `½ + ½ A(t)` with a finite sum `A` of powers of `cos θ`: Abramowitz & Stegun (1964),
    26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine if df % 2 else 1.0), 0.0
    for k in range(df % 2 + 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inner = (2 / math.pi) * (theta + sine * total) if df % 2 else sine * total
    return 0.5 + 0.5 * inner


@dataclass(frozen=True)
class Paired:
    """One optimizer against the baseline on a task, seed by seed.

    `ratio` is the geometric mean of the ratios of last figures, with its interval by Student's t on their logarithms.
    `difference` is the mean of their differences. `pairs` counts the seeds on which both finished, `lost` those on
    which one did not, and `better` those on which the figure is below the baseline's.
    """

    task: str
    optimizer: str
    baseline: str
    pairs: int
    lost: int
    better: int
    ratio: Interval | None
    difference: Interval | None


def paired(task: str, optimizer: str, baseline: str, ours: Mapping[int, float], its: Mapping[int, float]) -> Paired:
    """Compares last figures by seed. Ratios need positive figures."""
    seeds = sorted(ours.keys() & its.keys())
    good = [s for s in seeds if math.isfinite(ours[s]) and math.isfinite(its[s])]
    ratio = difference = None
    if good:
        difference = mean_interval([ours[s] - its[s] for s in good])
        if all(ours[s] > 0 and its[s] > 0 for s in good):
            logs = mean_interval([math.log(ours[s] / its[s]) for s in good])
            ratio = Interval(*(math.inf if v >= 700 else math.exp(v) for v in (logs.mean, logs.low, logs.high)))
    better = sum(ours[s] < its[s] for s in seeds)
    return Paired(task, optimizer, baseline, len(good), len(seeds) - len(good), better, ratio, difference)


def reach(result: Result, target: float) -> tuple[int, float] | None:
    """Steps and seconds until the figure stays at most `target`: from the first evaluation after which it always is."""
    reached = None
    for point in reversed(result["curve"]):
        value = point[result["figure"]]
        if value is None or not value <= target:
            break
        reached = point["step"], point["seconds"]
    return reached


@dataclass(frozen=True)
class Spread:
    """The figures of several runs along one axis: their median, lowest and highest."""

    x: NDArray[Any]
    median: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


def spread(results: Sequence[Result], axis: str) -> Spread:
    """Over `"step"` or `"seconds"`, up to the end of the shortest run. Between evaluations, curves are interpolated
    linearly, or on a logarithmic scale if all figures are positive."""
    figure = results[0]["figure"]
    curves = [[(p[axis], p[figure]) for p in r["curve"] if p[figure] is not None] for r in results]
    curves = [c for c in curves if c]
    if not curves:
        empty = np.array([])
        return Spread(empty, empty, empty, empty)
    logarithmic = all(v > 0 for c in curves for _, v in c)
    end = min(c[-1][0] for c in curves)
    x = np.array(sorted({x for c in curves for x, _ in c if x <= end}), dtype=float)
    values = []
    for c in curves:
        xs, vs = np.array(c, dtype=float).T
        values.append(np.exp(np.interp(x, xs, np.log(vs))) if logarithmic else np.interp(x, xs, vs))
    return Spread(x, np.median(values, 0), np.min(values, 0), np.max(values, 0))
