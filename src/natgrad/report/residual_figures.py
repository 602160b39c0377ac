"""Pictures of a residual report: a panel for each subject, a bar for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from natgrad.report.figures import COLOURS, INK, PAGE, name_bars, new_figure, save
from natgrad.report.layer_residual import LayerResidual

Report = Mapping[str, LayerResidual]
Panel = Callable[[Report, Axes], None]


def draw(report: Report, panels: Collection[Panel], path: str | PathLike[str]) -> None:
    """Draws the panels one below the other."""
    figure = new_figure(max(PAGE, 1.5 + 0.45 * len(report)), 3.4 * len(panels))
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        panel(report, axes)
    save(figure, path)


def relative_residuals(report: Report, axes: Axes) -> None:
    """`‖R‖/‖G‖` of each layer, with its value."""
    bars = axes.bar(range(len(report)), [r.relative for r in report.values()], 0.6, color=COLOURS[1])
    axes.bar_label(bars, fmt="{:.2g}", padding=2, color=INK)
    name_bars(axes, list(report))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative residual ‖R‖ / ‖G‖")


def relative_spreads(report: Report, axes: Axes) -> None:
    """How much inputs and output curvature vary from case to case, each against its mean."""
    report = {name: r for name, r in report.items() if not math.isnan(r.input_spread)}
    if not report:
        _say(axes, "no layer here has spreads")
        return
    _, handles = _pairs(
        axes,
        list(report),
        [r.input_spread / r.input_norm if r.input_norm else math.nan for r in report.values()],
        [r.output_spread / r.output_norm if r.output_norm else math.nan for r in report.values()],
        ("inputs: spread of x xᵀ / ‖A‖", "output curvature: spread of Σ g gᵀ / ‖B‖"),
    )
    _legend(axes, handles)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative spread")


def condition_numbers(report: Report, axes: Axes) -> None:
    """Condition numbers of `A` and `C`; the bars of singular matrices reach the top, hatched."""
    report = {name: r for name, r in report.items() if r.condition != (None, None)}
    if not report:
        _say(axes, "no layer here has condition numbers")
        return
    A = [math.nan if r.condition.A is None else r.condition.A for r in report.values()]
    C = [math.nan if r.condition.C is None else r.condition.C for r in report.values()]
    top = 10.0 ** math.ceil(math.log10(max(filter(math.isfinite, A + C), default=1.0)) + 1)
    left, right = ([min(value, top) for value in values] for values in (A, C))
    bars, handles = _pairs(axes, list(report), left, right, ("A, second moment of x", "C, covariance of h"))
    for bar, value in zip(bars, A + C, strict=True):
        if math.isinf(value):
            bar.set(hatch="////", edgecolor="white", linewidth=0)
    if math.inf in A + C:
        handles.append(Patch(facecolor="#aaaaaa", edgecolor="white", hatch="////", label="singular"))
    _legend(axes, handles)
    axes.set_yscale("log")
    axes.set_ylim(1, top)
    axes.set_ylabel("condition number (log scale)")


PANELS: dict[str, Panel] = {
    "residuals": relative_residuals,
    "spreads": relative_spreads,
    "conditioning": condition_numbers,
}


def _pairs(
    axes: Axes, names: Sequence[str], left: Sequence[float], right: Sequence[float], labels: tuple[str, str]
) -> tuple[list[Rectangle], list[Patch]]:
    """Two bars for each name; the bars, all left ones first, and what a legend says of them."""
    places, width = np.arange(len(names)), 0.38
    bars = [
        *axes.bar(places - width / 2, left, width * 0.94, color=COLOURS[1]),
        *axes.bar(places + width / 2, right, width * 0.94, color=COLOURS[2]),
    ]
    name_bars(axes, names)
    return bars, [Patch(color=colour, label=label) for colour, label in zip(COLOURS[1:], labels, strict=True)]


def _say(axes: Axes, words: str) -> None:
    """In place of bars."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", color=INK, transform=axes.transAxes)


def _legend(axes: Axes, handles: Sequence[Patch]) -> None:
    """Above the axes, where it covers no bar."""
    axes.legend(handles=handles, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
