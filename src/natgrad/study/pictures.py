"""The pictures of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, MaxNLocator

from natgrad.report.figures import INK, MORE_COLOURS, PAGE, new_figure, save, tidy
from natgrad.report.words import in_picture
from natgrad.study.statistics import Paired, spread
from natgrad.study.summary import Group, TaskSummary

STYLES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))


def draw_curves(task: TaskSummary, path: Path) -> None:
    """The figure against steps and against seconds: the median over the seeds, and the range from lowest to highest."""
    columns = _columns([g.optimizer for g in task.groups])
    figure = new_figure(PAGE, 3.9 + 0.24 * math.ceil(len(task.groups) / columns))
    panels = figure.subplots(1, 2, sharey=True)
    positive, settled = True, []
    for i, g in enumerate(task.groups):
        if not g.finished:
            continue
        colour, style = MORE_COLOURS[i % len(MORE_COLOURS)], STYLES[i // len(MORE_COLOURS) % len(STYLES)]
        for axes, axis in zip(panels, ("step", "seconds"), strict=True):
            s = spread(g.finished, axis)
            if not len(s.x):
                continue
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(s.x, s.median, color=colour, linestyle=style, linewidth=1.8, label=in_picture(g.optimizer))
            axes.plot(s.x[-1:], s.median[-1:], "o", color=colour, markersize=4)
            positive = positive and bool((s.low > 0).all())
            settled += [*s.low[len(s.x) // 5 :], *s.high[len(s.x) // 5 :]]
    left, right = panels
    if positive:
        left.set_yscale("log")
        plain_log_ticks(left)
    if settled and max(settled) > min(settled):
        # The fall in the first moments would compress all that follows.
        low, high = min(settled), max(settled)
        left.set_ylim((0.92 * low, 1.1 * high) if positive else (low - 0.05 * (high - low), high + 0.05 * (high - low)))
    left.set_xlabel("steps")
    right.set_xlabel("training time (s)")
    left.set_ylabel(in_picture(task.figure))
    for axes in panels:
        axes.set_xlim(left=0)
        tidy(axes)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, ncols=min(columns, len(labels)), loc="outside lower center")
    save(figure, path)


def draw_pairs(pairs: Sequence[Paired], path: Path) -> None:
    """The ratios of last figures to the baseline's, with their confidence intervals, for each task."""
    shown = [p for p in pairs if p.ratio is not None]
    names = list(dict.fromkeys(p.task for p in shown))
    figure = new_figure(PAGE, 1.2 + 0.34 * (len(shown) + len(names)))
    axes = figure.subplots()
    labels: list[tuple[float, str]] = []
    y = 0.0
    for i, name in enumerate(names):
        for p in (p for p in shown if p.task == name):
            assert p.ratio is not None
            colour = MORE_COLOURS[i % len(MORE_COLOURS)]
            if p.ratio.tells:
                axes.plot([p.ratio.low, p.ratio.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([p.ratio.mean], [y], "o", color=colour, markersize=6)
            labels.append((y, f"{in_picture(name, 24)}: {in_picture(p.optimizer, 24)}"))
            y += 1
        y += 0.5
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    plain_log_ticks(axes, of_y=False)
    axes.set_yticks([at for at, _ in labels], [words for _, words in labels])
    axes.set_ylim(y - 0.8, -0.7)
    axes.set_xlabel(f"last figure over that of “{in_picture(shown[0].baseline)}” (log scale; below 1: better)")
    tidy(axes)
    axes.grid(False, axis="y")
    save(figure, path)


RESIDUALS = {"relative": "‖R‖ / ‖G‖", "cka": "CKA", "p_value": "p-value"}


def draw_residuals(task: TaskSummary, path: Path) -> None:
    """Relative residual, CKA and p-value of each layer during training, medians over the seeds, by optimizer."""
    kinds = [k for k in RESIDUALS if any(_series(g, layer, k) for g in task.measured for layer in _layers(task))]
    figure = new_figure(max(PAGE, 1.2 + 3.1 * len(task.measured)), 0.9 + 2.1 * len(kinds))
    grid = figure.subplots(len(kinds), len(task.measured), sharex=True, sharey="row", squeeze=False)
    for line, kind in zip(grid, kinds, strict=True):
        for axes, g in zip(line, task.measured, strict=True):
            _draw_layers(axes, task, g, kind)
        line[0].set_ylim(-0.03, 1.03 if kind != "relative" else 1.05 * max(0.1, line[0].get_ylim()[1]))
        line[0].set_ylabel(RESIDUALS[kind])
    _finish(figure, grid, task)
    save(figure, path)


def draw_conditions(task: TaskSummary, path: Path) -> None:
    """Condition numbers of `A` (dashed) and of `C` during training, by optimizer."""
    figure = new_figure(max(PAGE, 1.2 + 3.1 * len(task.measured)), 3.9)
    grid = figure.subplots(1, len(task.measured), sharey=True, squeeze=False)
    for axes, g in zip(grid[0], task.measured, strict=True):
        _draw_layers(axes, task, g, "A", (0, (4, 1.5)))
        _draw_layers(axes, task, g, "C")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
    grid[0][0].set_ylabel("condition number (log scale)")
    _finish(figure, grid, task)
    save(figure, path)


def has_conditions(task: TaskSummary) -> bool:
    """Whether there is a condition number to draw."""
    return any(_series(g, layer, k) for g in task.measured for layer in _layers(task) for k in "AC")


def _columns(labels: Sequence[str]) -> int:
    """The number of columns of a legend, so that it fits the width of the picture."""
    return 1 + sum(max(map(len, labels), default=0) <= most for most in (24, 36))


def _finish(figure: Any, grid: Any, task: TaskSummary) -> None:
    for axes, g in zip(grid[0], task.measured, strict=True):
        axes.set_title(in_picture(g.optimizer, 30), fontsize=10, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    layers = _layers(task)
    handles = [
        Line2D([], [], color=c, linewidth=2, label=in_picture(n)) for n, c in zip(layers, _colours(layers), strict=True)
    ]
    figure.legend(
        handles=handles,
        frameon=False,
        ncols=min(2 * _columns(layers), len(layers)),
        loc="outside lower center",
        title="layer",
    )


def _draw_layers(axes: Axes, task: TaskSummary, g: Group, kind: str, style: Any = "solid") -> None:
    layers = _layers(task)
    for layer, colour in zip(layers, _colours(layers), strict=True):
        series = _series(g, layer, kind)
        if series:
            steps, values = zip(*series, strict=True)
            axes.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.5)
    tidy(axes)


def _layers(task: TaskSummary) -> list[str]:
    return list(dict.fromkeys(n for g in task.measured for r in g.results for m in r["measured"] for n in m["layers"]))


def _colours(layers: Sequence[str]) -> list[Any]:
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers))))


def _series(g: Group, layer: str, kind: str) -> list[tuple[float, float]]:
    """Steps and values: medians over the seeds, for measurements that all runs have."""
    runs = [r["measured"] for r in g.results if r["measured"]]
    found = []
    for moments in zip(*runs, strict=False):
        values = [m["layers"][layer][kind] for m in moments if layer in m["layers"]]
        values = [v for v in values if v is not None]
        if values:
            found.append((float(np.median([m["step"] for m in moments])), float(np.median(values))))
    return found


def plain_log_ticks(axes: Axes, of_y: bool = True) -> None:
    """Label a logarithmic axis with plain numbers if these are short."""

    def words(value: float, _: int) -> str:
        return f"{value:g}" if 1e-3 <= value < 1e5 else f"$10^{{{round(math.log10(value))}}}$"

    def few(value: float, _: int) -> str:
        low, high = sorted(which.get_view_interval())
        digit = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        return words(value, 0) if digit in (2, 5) and high < 60 * low else ""

    which = axes.yaxis if of_y else axes.xaxis
    which.set_major_formatter(FuncFormatter(words))
    which.set_minor_formatter(FuncFormatter(few))
