"""Editing a trained network by its curvature: the picture and the figures of docs/editing.md.

python -m benchmarks.editing --plot docs/images/editing.png

A small network on scikit-learn's digits, 1,200 for training and 597 for the test, in float32. Three questions: what is
left of it after pruning without further training; what becomes of two networks, one fine-tuned on the digits 0 to 4 and
one on 5 to 9, when they are merged; and what is left of the digits 0 to 4 after training on 5 to 9.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad
from benchmarks.seeds import over_seeds
from natgrad.report.figures import MORE_COLOURS as COLOURS
from natgrad.report.figures import new_figure, save, tidy

LOSS = nn.CrossEntropyLoss()
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
Data = tuple[Tensor, Tensor]


def data(seed: int) -> tuple[Data, Data]:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return (x[order[:1200]], y[order[:1200]]), (x[order[1200:]], y[order[1200:]])


def train(model: nn.Module, d: Data, steps: int, lr: float = 3e-3, penalty: Callable[[], Tensor] | None = None) -> None:
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        opt.zero_grad()
        loss = LOSS(model(d[0]), d[1])
        (loss if penalty is None else loss + penalty()).backward()
        opt.step()


def projected(model: nn.Module, d: Data, F: natgrad.linalg.Operator, keep: float, steps: int, lr: float) -> None:
    """Gradient descent along the directions of low curvature."""
    for _ in range(steps):
        gradient = torch.autograd.grad(LOSS(model(d[0]), d[1]), list(model.parameters()))
        step = F.project(dict(zip(F.space.names or (), gradient, strict=True)), keep)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p -= lr * step[n]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))


def accuracy(model: nn.Module, d: Data) -> float:
    with torch.no_grad():
        return 100 * float((model(d[0]).argmax(1) == d[1]).float().mean())


def some(d: Data, low: bool) -> Data:
    own = (d[1] < 5) == low
    return d[0][own], d[1][own]


def pruned(model: nn.Module, d: Data, how: str, sparsity: float) -> nn.Module:
    model = copy.deepcopy(model)
    if how == "magnitude":
        weights = [p for p in model.parameters() if p.ndim > 1]
        every = torch.cat([w.detach().abs().flatten() for w in weights]).sort().values
        with torch.no_grad():
            for w in weights:
                w[w.abs() <= every[round(sparsity * len(every)) - 1]] = 0
    else:
        natgrad.prune(model, natgrad.fisher(model, LOSS, d, how), sparsity)
    return model


def one_seed(seed: int) -> dict[str, float]:
    training, test = data(seed)
    model = network(seed)
    train(model, training, 300)
    found = {"trained": accuracy(model, test)}
    for how in ("magnitude", "diagonal", "kfac"):
        for sparsity in SPARSITIES:
            found[f"prune {how} {sparsity}"] = accuracy(pruned(model, training, how, sparsity), test)
    start = network(seed)
    train(start, training, 20)
    found["start"] = accuracy(start, test)
    halves = []
    for low in (True, False):
        own = copy.deepcopy(start)
        train(own, some(training, low), 200)
        halves.append(own)
        found[f"half {'low' if low else 'high'}"] = accuracy(own, test)
    for how in ("diagonal", "kfac"):
        F = [natgrad.fisher(m, LOSS, some(training, low), how) for m, low in zip(halves, (True, False), strict=True)]
        found[f"merge {how}"] = accuracy(natgrad.merge(halves, F, damping=1e-5), test)
        if how == "kfac":
            found["merge mean"] = accuracy(natgrad.merge(halves, F, damping=1e6), test)
    first = network(seed)
    train(first, some(training, True), 300)
    ways: dict[str, Callable[[nn.Module], None]] = {"plain": lambda m: train(m, some(training, False), 100)}
    matrices = {how: natgrad.fisher(first, LOSS, some(training, True), how) for how in ("diagonal", "kfac")}
    for how, F in matrices.items():
        for strength in (10.0, 30.0, 100.0, 300.0, 1000.0):
            ways[f"ewc {how} {strength:g}"] = lambda m, F=F, s=strength: train(
                m, some(training, False), 100, penalty=natgrad.ewc(m, F, s)
            )
    for keep in (0.3, 0.5, 0.7, 0.9):
        ways[f"project {keep}"] = lambda m, keep=keep: projected(
            m, some(training, False), matrices["kfac"], keep, 100, 1.0
        )
    for name, way in ways.items():
        own = copy.deepcopy(first)
        way(own)
        found[f"{name} | old"], found[f"{name} | new"] = (accuracy(own, some(test, low)) for low in (True, False))
    return found


def main() -> None:
    table, plot = over_seeds(one_seed, __doc__)
    for name, values in table.items():
        print(f"{name:28s} {values.mean():5.1f}  ({values.min():.1f} to {values.max():.1f})")
    if plot:
        draw(table, plot)


def draw(table: dict[str, Tensor], path: Path) -> None:
    figure = new_figure(10.5, 3.4)
    left, middle, right = figure.subplots(1, 3, gridspec_kw={"wspace": 0.35})
    for i, how in enumerate(("magnitude", "diagonal", "kfac")):
        values = torch.stack([table[f"prune {how} {s}"] for s in SPARSITIES])
        share = [100 * s for s in SPARSITIES]
        left.plot(share, values.mean(1), color=COLOURS[i], marker="o", markersize=3, label=how)
        left.fill_between(share, values.min(1).values, values.max(1).values, color=COLOURS[i], alpha=0.15, linewidth=0)
    left.set(xlabel="weights set to zero, %", ylabel="test accuracy, %", title="pruned, no further training")
    left.legend(frameon=False)
    names = ["half low", "half high", "merge mean", "merge diagonal", "merge kfac"]
    labels = ["0-4", "5-9", "mean", "diagonal", "kfac"]
    values = [table[n] for n in names]
    middle.bar(range(5), [float(v.mean()) for v in values], color=[COLOURS[k] for k in (3, 3, 0, 1, 2)], alpha=0.8)
    for k, v in enumerate(values):
        middle.plot([k] * len(v), v, ".", color="#333333", markersize=3)
    middle.set(xticks=range(5), xticklabels=labels, ylabel="test accuracy, %", title="two networks merged")
    groups = {"plain": 3, "ewc diagonal": 1, "ewc kfac": 2, "project": 0}
    for group, colour in groups.items():
        own = [n[: -len(" | old")] for n in table if n.startswith(group) and n.endswith(" | old")]
        old, new = ([float(table[f"{n} | {side}"].mean()) for n in own] for side in ("old", "new"))
        right.plot(old, new, "o-", color=COLOURS[colour], markersize=4, label=group)
    right.set(xlabel="digits 0-4, %", ylabel="digits 5-9, %", title="then trained on 5-9")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.title.set_fontsize(10)
        tidy(axes)
    save(figure, path)


if __name__ == "__main__":
    main()
