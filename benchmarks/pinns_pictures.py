"""The pictures of docs/pinns.md: runs of `natgrad study pinns` beside the published curves; solutions and their errors.

python -m benchmarks.pinns_pictures docs/curves/pinns.json      # or natgrad-study/pinns

Solutions are those after some hundred steps, trained here. Both pictures go to docs/images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from torch import nn

import natgrad
from benchmarks.pinns import Run, runs_of
from natgrad.report.figures import INK, MORE_COLOURS, new_figure, save, tidy
from natgrad.study.pinns import SETTINGS, batches, objective, pinn
from natgrad.study.published import own, published

ACROSS, SHOWN = 4, 3
"""Problems in a row of the picture, and how many of the published optimizers each has."""
APART = 4.0
"""Two published runs are named only if their lowest errors differ by this factor."""
SOLVED = {"poisson2d-257": 200, "heat1d-257": 200}
"""Steps for the solutions."""
GRID = 150


def draw_curves(found: dict[str, list[Run]], path: Path) -> None:
    """Error against seconds, a panel for each problem: every seed a line, the best published runs dashed."""
    names = [n for n in SETTINGS if n in found]
    rows = -(-len(names) // ACROSS)
    figure = new_figure(3.0 * ACROSS, 2.4 * rows)
    panels = figure.subplots(rows, ACROSS, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, found[name])
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("seconds; dashed: the best published runs, on a GPU", fontsize=9, color=INK)
    figure.supylabel("root mean square error", fontsize=9, color=INK)
    save(figure, path)


def _panel(axes: Axes, name: str, runs: Sequence[Run]) -> None:
    named = 0.0
    for curve in sorted(published(name), key=lambda c: c.best)[:SHOWN]:
        points = [(s, e) for s, e in curve.points if s > 0]
        axes.plot(*zip(*points, strict=True), color="#9a9a9a", linestyle=(0, (4, 1.5)), linewidth=0.9)
        if curve.best > APART * named:
            named = curve.best
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 5.5}
            axes.annotate(curve.optimizer, points[-1], xytext=(-2, 3), **style)
    for run in runs:
        points = [(s, e) for s, e in own(run["optimizer"], run).points if s > 0]
        axes.plot(*zip(*points, strict=True), color=MORE_COLOURS[0], linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(name, fontsize=8, color=INK)
    axes.tick_params(labelsize=6)
    tidy(axes)


def draw_solutions(path: Path) -> None:
    """The network and its error after some hundred steps, for problems with two coordinates."""
    figure = new_figure(7.2, 3.1 * len(SOLVED))
    for row, (name, steps) in zip(figure.subplots(len(SOLVED), 2, squeeze=False), SOLVED.items(), strict=True):
        task, equation = pinn(name), SETTINGS[name].equation(SETTINGS[name].d)
        model = task.make_model(0)
        opt = natgrad.NaturalGradient(model, nn.MSELoss())
        points = batches(SETTINGS[name], 0)
        for _ in range(steps):
            loss = objective(opt.loss, model, *next(points))
            opt.zero_grad()
            loss.backward()
            opt.step()
        side = torch.linspace(0, 1, GRID, dtype=torch.float64)
        x = torch.cartesian_prod(side, side)
        with torch.no_grad():
            u = model(x)
        error = u - equation.solution(x)
        labels = ("t", "x") if equation.has_time else ("x₁", "x₂")
        largest = float(error.abs().max())
        pictures = ((u, "viridis", None, f"{name}: u after {steps} steps"), (error, "RdBu", largest, "u − u*"))
        for axes, (values, colours, bound, title) in zip(row, pictures, strict=True):
            image = axes.imshow(
                values.view(GRID, GRID).mT,
                origin="lower",
                extent=(0, 1, 0, 1),
                cmap=matplotlib.colormaps[colours],
                vmin=None if bound is None else -bound,
                vmax=bound,
            )
            axes.set_title(title, fontsize=9, color=INK)
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
            figure.colorbar(image, ax=axes, shrink=0.85)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--skip-solutions", action="store_true")
    options = parser.parse_args()
    draw_curves(runs_of(options.sources, "NaturalGradient"), options.out / "pinns-curves.png")
    if not options.skip_solutions:
        torch.set_num_threads(1)
        draw_solutions(options.out / "pinns-solutions.png")


if __name__ == "__main__":
    main()
