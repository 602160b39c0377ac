"""What each structure keeps of one matrix: the picture of docs/structures.md.

python -m benchmarks.structures --plot docs/images/structures.png

A network of 83 parameters is trained on three clouds of points; its Fisher information is then taken in every
structure. What is printed stands over the panels, too.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from torch import Tensor, nn

import natgrad
from natgrad.report.figures import INK, new_figure, save

EXAMPLES = 120
WIDTHS = (4, 6, 5, 3)
HELD = {
    "dense": lambda layers, cases: sum(o * (i + 1) for i, o in layers) ** 2,
    "block": lambda layers, cases: cases * sum(i + 2 * o for i, o in layers),
    "kfac": lambda layers, cases: sum(i * i + i + o * o for i, o in layers),
    "ekfac": lambda layers, cases: sum(i * i + i + o * o + o * (i + 1) for i, o in layers),
    "diagonal": lambda layers, cases: sum(o * (i + 1) for i, o in layers),
}
"""How many numbers a structure holds; two columns a case, as softmax of three classes has."""


def problem() -> tuple[nn.Sequential, nn.Module, tuple[Tensor, Tensor]]:
    """The network after training, its loss, and its data."""
    torch.manual_seed(0)
    y = torch.arange(EXAMPLES) % 3
    x = torch.randn(3, WIDTHS[0], dtype=torch.float64)[y] + torch.randn(EXAMPLES, WIDTHS[0], dtype=torch.float64)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(WIDTHS):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    model, loss = nn.Sequential(*layers[:-1]).double(), nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        value = loss(model(x), y)
        opt.zero_grad()
        value.backward()
        opt.step()
    return model, loss, (x, y)


def panel(axes: Axes, M: Tensor, norm: SymLogNorm, title: str, edges: list[int]) -> None:
    axes.imshow(M.numpy(), cmap="RdBu_r", norm=norm, interpolation="nearest")
    for edge in edges:
        axes.axhline(edge - 0.5, color="#999999", linewidth=0.4)
        axes.axvline(edge - 0.5, color="#999999", linewidth=0.4)
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, required=True, help="the picture's file")
    options = parser.parse_args()

    model, loss, data = problem()
    shapes = list(pairwise(WIDTHS))
    matrices = {s: natgrad.fisher(model, loss, data, s).to_dense() for s in HELD}
    whole, block = matrices["dense"], matrices["block"]
    size = len(whole)
    edges = [sum(o * (i + 1) for i, o in shapes[:n]) for n in range(1, len(shapes))]
    largest = float(whole.abs().max())
    norm = SymLogNorm(linthresh=largest / 300, vmin=-largest, vmax=largest)
    print(f"{size} parameters, {EXAMPLES} cases")
    print("structure | numbers held | from the whole matrix | from the layers' blocks")
    figure = new_figure(6.6, 10.2)
    axes = figure.subplots(3, 2).flat
    for structure, M in matrices.items():
        far, near = float((M - whole).norm() / whole.norm()), float((M - block).norm() / block.norm())
        held = HELD[structure](shapes, EXAMPLES)
        print(f"{structure} | {held:,} | {far:.2f} | {near:.2f}")
        title = f'"{structure}"\n{held:,} numbers, off by {far:.0%}'
        if structure == "dense":
            title = f'"dense": {held:,} numbers\n"implicit": none, products only'
        panel(next(axes), M, norm, title, edges)
    panel(next(axes), block - matrices["kfac"], norm, "what K-FAC leaves out\nof the blocks: the residual", edges)
    save(figure, options.plot)


if __name__ == "__main__":
    main()
