"""A study's runs next to the published ones: a table, and curves on logarithmic axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from natgrad.report.figures import INK, MORE_COLOURS, new_figure, save, tidy
from natgrad.study.published import TARGETS, Curve, fastest, own, published
from natgrad.study.summary import TaskSummary, number

HEADINGS = ("run", *(f"to {target:g}" for target in TARGETS), "lowest error")
LEFT_OUT = 30.0
"""Published curves are not drawn if their lowest error exceeds the best one's by more than this factor."""


def has_published(task: TaskSummary) -> bool:
    """Whether there are published curves for this task."""
    return task.figure == "error" and bool(published(task.entry.use))


def beside_rows(task: TaskSummary) -> list[tuple[str, ...]]:
    """Times to reach an error, and the lowest error: medians over the seeds for this study's optimizers, and the best
    published values, each with its optimizer."""
    rows = []
    for g in task.groups:
        curves = [own(g.optimizer, r) for r in g.results]
        times = [_median([c.first(target) for c in curves]) for target in TARGETS]
        best = number(statistics.median(c.best for c in curves))
        rows.append((f"{g.optimizer}, {len(curves)} seed{'s' * (len(curves) > 1)}", *map(_seconds, times), best))
    theirs = published(task.entry.use)
    cells = [fastest(theirs, target) for target in TARGETS]
    lowest = min(theirs, key=lambda c: c.best)
    words = [f"{_seconds(c[0])} ({c[1]})" if c else "–" for c in cells]
    return [*rows, ("best published", *words, f"{number(lowest.best)} ({lowest.optimizer})")]


def _median(times: Sequence[float | None]) -> float | None:
    """The median over the seeds; a seed that did not reach the error counts as infinite."""
    median = statistics.median(math.inf if t is None else t for t in times)
    return median if math.isfinite(median) else None


def _seconds(time: float | None) -> str:
    return "–" if time is None else f"{time:.3g} s"


def draw_beside(task: TaskSummary, path: Path) -> None:
    """The error against time, one line for each seed; published curves are dashed and pale, labelled with their
    names."""
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    theirs = published(task.entry.use)
    lowest = min(c.best for c in theirs)
    for c in theirs:
        if c.best <= LEFT_OUT * lowest:
            _draw(axes, c, color="#9a9a9a", linestyle=(0, (4, 1.5)), linewidth=1.0)
            axes.annotate(
                c.optimizer, c.points[-1], xytext=(4, 0), textcoords="offset points", fontsize=7, color="#777777"
            )
    for g, colour in zip(task.groups, [*MORE_COLOURS] * 4, strict=False):
        for i, r in enumerate(g.results):
            label = f"{g.optimizer} (natgrad)" if i == 0 else None
            _draw(axes, own(g.optimizer, r), color=colour, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training time (s); dashed: published, on an RTX 6000 GPU")
    axes.set_ylabel("root mean square error")
    axes.set_title(task.entry.name, fontsize=10, color=INK)
    axes.legend(frameon=False, loc="lower left")
    tidy(axes)
    save(figure, path)


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    points = [(s, e) for s, e in curve.points if s > 0]
    axes.plot(*zip(*points, strict=True), **style)
