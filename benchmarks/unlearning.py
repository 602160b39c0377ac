"""Unlearning one class by a few uphill Gauss-Newton steps, beside gradient ascent: a picture of docs/editing.md.

python -m benchmarks.unlearning --plot docs/images/unlearning.png

A network 64-48-10 on 1,200 of scikit-learn's digits, 597 for the test, in float32. The model is to forget the digit 3.
Each way takes steps of growing length; what counts is how well the other digits are still told when the 3 are not.
`retrained` has never seen a 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.editing import LOSS, Data, accuracy, data, network, train
from benchmarks.seeds import over_seeds
from natgrad.report.figures import MORE_COLOURS as COLOURS
from natgrad.report.figures import new_figure, save, tidy

DIGIT, STEPS = 3, 4
INCREASES = (0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02)
DISTANCES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6)


def apart(d: Data) -> tuple[Data, Data]:
    own = d[1] == DIGIT
    return (d[0][own], d[1][own]), (d[0][~own], d[1][~own])


def ascended(model: nn.Module, forget: Data, distance: float) -> None:
    """Gradient ascent in `STEPS` steps of the same length, `distance` together."""
    for _ in range(STEPS):
        gradient = torch.autograd.grad(LOSS(model(forget[0]), forget[1]), list(model.parameters()))
        size = torch.stack([g.norm() for g in gradient]).norm()
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient, strict=True):
                p += distance / STEPS * g / size


def one_seed(seed: int) -> dict[str, tuple[float, float]]:
    """By way and length: the test accuracy on the digit to forget, and on the others."""
    training, test = data(seed)
    (forget, retain), (gone, kept) = apart(training), apart(test)
    model, without = network(seed), network(seed)
    train(model, training, 300)
    train(without, retain, 300)
    ways: dict[str, Callable[[nn.Module], object]] = {"trained": lambda m: None}
    for distance in DISTANCES:
        ways[f"ascent {distance}"] = lambda m, s=distance: ascended(m, forget, s)
    for structure in ("diagonal", "kfac"):
        F = natgrad.fisher(model, LOSS, retain, structure)
        for rise in INCREASES:
            ways[f"{structure} {rise}"] = lambda m, F=F, r=rise: natgrad.unlearn(
                m, LOSS, forget, F, steps=STEPS, increase=r
            )
    found = {"retrained": (accuracy(without, gone), accuracy(without, kept))}
    for name, way in ways.items():
        own = copy.deepcopy(model)
        way(own)
        found[name] = accuracy(own, gone), accuracy(own, kept)
    return found


def main() -> None:
    table, plot = over_seeds(one_seed, __doc__)
    print("mean (least to largest) of the test accuracy, %")
    for name, values in table.items():
        cells = [f"{v.mean():5.1f} ({v.min():.1f} to {v.max():.1f})" for v in values.mT]
        print(f"{name:16s} the {DIGIT}: {cells[0]:24s} the others: {cells[1]}")
    if plot:
        draw(table, plot)


def draw(table: dict[str, Tensor], path: Path) -> None:
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    labels = {"ascent": "gradient ascent", "diagonal": "unlearn, diagonal", "kfac": "unlearn, K-FAC"}
    for i, (way, label) in enumerate(labels.items()):
        own = [table["trained"].mean(0), *(v.mean(0) for n, v in table.items() if n.startswith(way))]
        gone, kept = zip(*((float(a), float(b)) for a, b in own), strict=True)
        axes.plot(gone, kept, "o-", color=COLOURS[i], markersize=4, label=label)
    gone, kept = (float(v) for v in table["retrained"].mean(0))
    axes.plot([gone], [kept], "*", color="#333333", markersize=11, label="trained without")
    axes.set(xlabel=f"accuracy on the digit {DIGIT}, %", ylabel="on the others, %", ylim=(85, 99))
    axes.set(title="one digit forgotten")
    axes.invert_xaxis()
    axes.legend(frameon=False)
    axes.title.set_fontsize(10)
    tidy(axes)
    save(figure, path)


if __name__ == "__main__":
    main()
