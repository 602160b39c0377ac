"""Weights rounded to few bits, by K-FAC's factors and to the nearest value: a picture of docs/editing.md.

python -m benchmarks.rounding --plot docs/images/rounding.png

A network 64-128-64-10 on 1,200 of scikit-learn's digits, 597 for the test, in float32. All weight matrices are rounded
to 2, 3 or 4 bits, with a grid for each row. Nothing is trained after it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.editing import LOSS, accuracy, data, train
from benchmarks.seeds import over_seeds
from natgrad.report.figures import MORE_COLOURS as COLOURS
from natgrad.report.figures import new_figure, save, tidy
from natgrad.uses.quantize import Grid

BITS = (2, 3, 4)
WAYS = {
    "nearest": "nearest value",
    "input": "inputs' errors",
    "both": "both sides' errors",
    "kfoc": "both sides, KFOC",
}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))


def to_nearest(model: nn.Module, bits: int) -> None:
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Linear):
                grid = Grid.of(m.weight, bits)
                m.weight.copy_(grid.values(grid.codes(m.weight)))


def divergence(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The mean KL divergence of the predictions, in nats."""
    with torch.no_grad():
        p, q = (m(x).log_softmax(1) for m in (model, other))
        return float((p.exp() * (p - q)).sum(1).mean())


def one_seed(seed: int) -> dict[str, tuple[float, float]]:
    """By way and bits: test accuracy, and KL divergence from the network that was not rounded."""
    training, test = data(seed)
    model = network(seed)
    train(model, training, 300)
    matrices = {s: natgrad.fisher(model, LOSS, training, s) for s in ("kfac", "kfoc")}
    found = {"not rounded": (accuracy(model, test), 0.0)}
    for bits in BITS:
        for way in WAYS:
            own = copy.deepcopy(model)
            if way == "nearest":
                to_nearest(own, bits)
            else:
                F = matrices["kfoc" if way == "kfoc" else "kfac"]
                natgrad.quantize(own, F, bits, sides="input" if way == "input" else "both")
            found[f"{way} {bits}"] = accuracy(own, test), divergence(model, own, test[0])
    return found


def main() -> None:
    table, plot = over_seeds(one_seed, __doc__)
    print("mean (least to largest)")
    for name, values in table.items():
        correct, kl = values.mT
        print(
            f"{name:14s} test accuracy, %: {correct.mean():5.1f} ({correct.min():.1f} to {correct.max():.1f})   "
            f"KL, nats: {kl.mean():.2g} ({kl.min():.2g} to {kl.max():.2g})"
        )
    if plot:
        draw(table, plot)


def draw(table: dict[str, Tensor], path: Path) -> None:
    figure = new_figure(8.4, 3.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.3})
    width = 0.8 / len(WAYS)
    for k, (axes, column) in enumerate(((left, 0), (right, 1))):
        for i, (way, label) in enumerate(WAYS.items()):
            values = [table[f"{way} {bits}"][:, column] for bits in BITS]
            places = [j + (i - (len(WAYS) - 1) / 2) * width for j in range(len(BITS))]
            axes.bar(places, [float(v.mean()) for v in values], width, color=COLOURS[i], alpha=0.8, label=label)
            for place, v in zip(places, values, strict=True):
                axes.plot([place] * len(v), v, ".", color="#333333", markersize=3)
        axes.set(xticks=range(len(BITS)), xticklabels=[f"{b} bits" for b in BITS])
        if k == 0:
            axes.axhline(float(table["not rounded"][:, 0].mean()), color="#333333", linewidth=0.8, linestyle=":")
        tidy(axes)
    left.set(ylabel="test accuracy, %", ylim=(92, 99))
    right.set(ylabel="KL from the trained network, nats", yscale="log")
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
