"""Figures drawn without a display, in one style."""

import warnings
from collections.abc import Sequence
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from natgrad.report.words import in_picture

# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#767676", "#0072B2", "#D55E00")
MORE_COLOURS = (*COLOURS[1:], "#009E73", "#CC79A7", "#E69F00", "#56B4E9", COLOURS[0])
INK = "#333333"
DOTS_PER_INCH = 160
PAGE = 9.6
"""Inches: the width of a picture that fills the page of a report."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of its own, not pyplot's: nothing global is touched and no window system is looked for."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Pale lines behind the data, and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """One place for each name along the horizontal axis."""
    axes.set_xticks(range(len(names)), [in_picture(name) for name in names], rotation=40, ha="right")
    axes.set_xlim(-0.6, len(names) - 0.4)
    tidy(axes)
    axes.grid(False, axis="x")


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Writes it to a file. Letters that the font lacks are shown as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=DOTS_PER_INCH)
