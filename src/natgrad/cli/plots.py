"""The demo's pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from natgrad.cli.conditioning import LayerConditioning
from natgrad.cli.training import Run
from natgrad.report.figures import COLOURS, PAGE, name_bars, new_figure, save, tidy
from natgrad.study.images import SIDE

# Line styles, in addition to the colours.
STYLES = ((0, (5, 1.5)), (0, (1.5, 1)), "solid")


def plot_error(runs: Sequence[Run], path: Path) -> None:
    """Plot the squared error against the processor time and against the steps."""
    save(error_figure(runs), path)


def error_figure(runs: Sequence[Run]) -> Figure:
    """Two panels of one size, one below the other, and the legend above them."""
    figure = new_figure(PAGE, 7.4)
    by_time, by_step = figure.subplots(2, 1, sharey=True)
    for run, colour, style in zip(runs, COLOURS, STYLES, strict=False):
        if not run.curve:
            continue
        errors = [point.squared_error for point in run.curve]
        times = [point.seconds for point in run.curve]
        # A logarithmic axis has no place for step 0.
        steps = [point.step or np.nan for point in run.curve]
        for axes, x in ((by_time, times), (by_step, steps)):
            axes.plot(x, errors, color=colour, linestyle=style, linewidth=2, label=run.optimizer)
            axes.plot(x[-1:], errors[-1:], "o", color=colour, markersize=5)
    by_time.set_yscale("log")
    # The fall in the first moments would compress all that follows.
    settled = [point.squared_error for run in runs for point in run.curve[2:]]
    if settled:
        by_time.set_ylim(bottom=0.92 * min(settled), top=1.1 * max(settled))
    by_time.set_xlim(left=0)
    by_time.set_xlabel("processor time (s)")
    by_step.set_xscale("log")
    by_step.set_xlabel("steps (log scale)")
    for axes in (by_time, by_step):
        tidy(axes)
        axes.set_ylabel("squared error per image\n(sum over pixels)")
    handles, labels = by_time.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, ncols=3, loc="outside upper center")
    _plain_log_ticks(by_time)
    return figure


def plot_reconstructions(
    runs: Sequence[Run], images: Float[Tensor, "images pixels"], path: Path, count: int = 10
) -> None:
    """Show the first images, and below them each optimizer's reconstructions."""
    originals = images[:count]
    rows = [("original", originals)]
    for run in runs:
        if run.model is not None and run.final is not None:
            with torch.no_grad():
                made = run.model(originals).sigmoid()
            error = float(((made - originals) ** 2).sum(1).mean())
            label = run.optimizer.replace(", ", ",\n")
            rows.append((f"{label}\nerror {error:.2f}", made))
    figure = new_figure(0.85 * originals.shape[0] + 1.2, 0.9 * len(rows) + 0.1)
    grid = figure.subplots(len(rows), len(originals), squeeze=False)
    for (label, pictures), line in zip(rows, grid, strict=True):
        for picture, axes in zip(pictures, line, strict=True):
            axes.imshow(picture.reshape(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("#cccccc")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
    save(figure, path)


def plot_conditioning(layers: Sequence[LayerConditioning], path: Path) -> None:
    """Compare, layer by layer, the condition numbers of the second moment and of the covariance."""
    figure = new_figure(PAGE, 4.6)
    axes = figure.subplots()
    places = np.arange(len(layers))
    width = 0.38
    for side, colour in ((-1, COLOURS[1]), (1, COLOURS[2])):
        values = [layer.second_moment if side < 0 else layer.covariance for layer in layers]
        floored = [layer.floored_second_moment if side < 0 else layer.floored_covariance for layer in layers]
        bars = axes.bar(places + side * width / 2, values, width * 0.94, color=colour)
        for bar, at_floor in zip(bars, floored, strict=True):
            if at_floor:
                bar.set(hatch="////", edgecolor="white", linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    name_bars(axes, [layer.layer for layer in layers])
    axes.set_xlabel("affine layer (inputs→outputs)")
    axes.set_ylabel("condition number (log scale)")
    handles = [
        Patch(color=COLOURS[1], label="second moment of [h; 1]"),
        Patch(color=COLOURS[2], label="covariance of h"),
    ]
    if any(layer.floored_second_moment or layer.floored_covariance for layer in layers):
        handles.append(Patch(facecolor="#aaaaaa", edgecolor="white", hatch="////", label="lower bound (floored)"))
    figure.legend(handles=handles, frameon=False, ncols=3, loc="outside upper left")
    save(figure, path)


def _plain_log_ticks(axes: Axes) -> None:
    """Label 1, 2, 5, 10, ..., or more labels on a short axis, as plain numbers."""
    low, high = axes.get_ylim()
    if not (0 < low < high < float("inf")):
        return
    ticks = [
        digit * 10.0**power
        for power in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        for digit in ((1, 2, 5) if high > 6 * low else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8))
    ]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
