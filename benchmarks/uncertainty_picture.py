"""The picture of docs/laplace.md: what each method adds to MAP's figures, with 95% intervals over the splits.

python -m benchmarks.uncertainty --results uncertainty.json
python -m benchmarks.uncertainty_picture uncertainty.json docs/images/uncertainty.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from natgrad.report.figures import INK, MORE_COLOURS, new_figure, save, tidy
from natgrad.study.statistics import mean_interval

FIGURES = {
    "NLL": "NLL (less is better)",
    "ECE": "ECE (less is better)",
    "AUROC, errors": "AUROC, errors (more is better)",
    "AUROC, unknown class": "AUROC, unknown class (more is better)",
}
METHODS = {
    "ensemble of 5": "ensemble of 5",
    "dropout": "dropout",
    "Laplace, K-FAC": "Laplace, K-FAC",
    "Laplace, EKFAC": "Laplace, EKFAC",
    "Laplace, dense": "Laplace, whole matrix",
    "Laplace, dense, last layer": "Laplace, last layer",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each figure; in it a group of points for each set."""
    sets = {n: found for n, found in results["sets"].items() if "ECE" in found["MAP"]}
    figure = new_figure(9.6, 5.2)
    panels = figure.subplots(2, 2).flatten()
    for axes, (name, title) in zip(panels, FIGURES.items(), strict=True):
        for j, found in enumerate(sets.values()):
            base = torch.tensor(found["MAP"].get(name, []))
            for i, method in enumerate(METHODS):
                values = torch.tensor(found.get(method, {}).get(name, []))
                if not len(base) or values.shape != base.shape:
                    continue
                d = values - base
                between = mean_interval(d.tolist())
                half = (between.high - between.low) / 2
                place = j + 0.11 * (i - (len(METHODS) - 1) / 2)
                label = METHODS[method] if j == 0 else None
                axes.errorbar(place, float(d.mean()), half, fmt="o", ms=4, lw=1.2, color=MORE_COLOURS[i], label=label)
        axes.axhline(0.0, color=INK, linewidth=0.9)
        axes.set_xticks(range(len(sets)), [n.replace("_", " ") for n in sets], fontsize=8)
        axes.set_xlim(-0.5, len(sets) - 0.5)
        axes.set_title(title, fontsize=9, color=INK)
        tidy(axes)
        axes.grid(False, axis="x")
    figure.supylabel("difference to MAP", fontsize=9, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.picture)


if __name__ == "__main__":
    main()
