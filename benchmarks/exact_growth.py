"""How an exact step's cost grows with the points and with the parameters, and a picture of it.

python -m benchmarks.exact_growth [--steps 3]

Poisson's equation in two dimensions, float64, one thread. First the number of points grows, with 9,873 parameters. Then
the number of parameters grows to 1.25 million, with 290 columns. Each step of `NaturalGradient` is timed in turn with
its floor (`benchmarks/exact.py`), in seconds of the processor. Medians. The last column is the largest resident memory
of the process so far, with that of the floor.
"""

from __future__ import annotations

import argparse
import resource
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Generator

from benchmarks.exact import measure, quartiles
from benchmarks.machine import machine
from natgrad.report.figures import INK, MORE_COLOURS, new_figure, save, tidy
from natgrad.study.equations import SineProduct
from natgrad.study.pinns import LARGE, MEDIUM, SMALL, Batch, Pinn

WIDTHS = (SMALL, (48, 32), MEDIUM, (128, 128, 96), LARGE, (512, 512, 256, 256), (768, 768, 512, 512))
POINTS = (64, 128, 256, 512, 1024, 2048)
FIXED, SHARE = 250, 0.16
"""Points inside where the parameters grow; the share of points with conditions."""
Row = tuple[int, int, float, float]
"""Parameters, columns, seconds of a step, seconds of its floor."""


def points(inside: int) -> Batch:
    """Points inside and with conditions."""
    equation, g = SineProduct(2), Generator().manual_seed(0)
    x, y = equation.interior(inside, g), equation.conditions(round(SHARE * inside), g)
    return (x, y), (torch.zeros_like(x[:, :1]), equation.solution(y))


def row(widths: tuple[int, ...], inside: int, steps: int) -> Row:
    torch.manual_seed(0)
    model, batch = Pinn(SineProduct(2), widths), points(inside)
    own, least = measure(model, batch, True, steps)
    size = sum(p.numel() for p in model.parameters())
    found = size, sum(len(x) for x in batch[0]), quartiles(own)[1], quartiles(least)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{found[0]:10,}{found[1]:9,}{found[3]:11.3f}{found[2]:11.3f}{found[2] / found[3]:8.2f}{peak:9.2f}", flush=True
    )
    return found


def draw(axes: Axes, rows: Sequence[Row], across: int, label: str, title: str) -> None:
    x = [r[across] for r in rows]
    axes.loglog(x, [r[2] for r in rows], "o-", color=MORE_COLOURS[0], label="step", markersize=3)
    axes.loglog(x, [r[3] for r in rows], "o--", color="#9a9a9a", label="floor", markersize=3)
    axes.set_xlabel(label)
    axes.set_ylabel("seconds of the processor")
    axes.set_title(title, fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)


def main() -> None:
    parser = argparse.ArgumentParser(description="How an exact step's cost grows.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    print(f"{'P':>10}{'columns':>9}{'floor, s':>11}{'step, s':>11}{'ratio':>8}{'GiB':>9}")
    by_points = [row(MEDIUM, n, options.steps) for n in POINTS]
    by_size = [row(widths, FIXED, options.steps) for widths in WIDTHS]
    figure = new_figure(8.0, 3.2)
    left, right = figure.subplots(1, 2)
    draw(left, by_points, 1, "columns (points)", f"{by_points[0][0]:,} parameters")
    draw(right, by_size, 0, "parameters", f"{by_size[0][1]:,} columns")
    save(figure, options.out / "exact-growth.png")


if __name__ == "__main__":
    main()
