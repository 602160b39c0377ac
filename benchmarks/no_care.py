"""KFAC's defaults where nobody looks: many seeds on every task, batches of any size, inputs of any scale.

python -m benchmarks.no_care seeds --seeds 0 1 2 --seconds 20   # beside Adam at its best learning rate
python -m benchmarks.no_care batches                            # CURVES, batches of 64 to 4,096, by images seen
python -m benchmarks.no_care inputs                             # CURVES, images times 100 or plus 10
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.race.__main__ import kept
from benchmarks.race.contestants import CONTESTANTS, Contestant, kfac, second_order
from benchmarks.race.report import final
from benchmarks.race.tasks import TASKS, Task


def seeds(options: argparse.Namespace) -> None:
    """The figure after equal time, by seed, beside Adam's at the best rate of its grid on the first seed."""
    print("| task | | figure, by seed | worst over Adam |\n| --- | --- | --- | --- |")
    adam = next(c for c in CONTESTANTS if c.name == "Adam")
    own = Contestant("KFAC", second_order(kfac))
    for name in options.tasks:
        task = TASKS[name]()

        def figure(contestant: Contestant, setting: dict[str, Any], seed: int, task: Task = task) -> float:
            return final(kept(options.out, task, contestant, setting, seed, options.seconds)[0])

        best = min(adam.settings(name), key=lambda s: figure(adam, s, options.seeds[0]))
        ours, theirs = [], []
        for seed in options.seeds:
            theirs.append(figure(adam, best, seed))
            ours.append(figure(own, {}, seed))
        worst = max(o / t for o, t in zip(ours, theirs, strict=True))
        print(f"| {name} | Adam, {best} | {', '.join(f'{v:.3g}' for v in theirs)} | |")
        print(f"| {name} | KFAC | {', '.join(f'{v:.3g}' for v in ours)} | {worst:.2f} |", flush=True)


def batches(options: argparse.Namespace) -> None:
    """The error after the same number of steps, whatever the batch."""
    task = TASKS["curves"]()
    print("| batch | squared error after 150 steps |\n| --- | --- |")
    for size in (64, 256, 1024, 4096):
        values = []
        for seed in options.seeds:
            model = task.make_model(seed)
            step, _ = second_order(kfac)(model, task, {})
            source = task.batches(seed, size)
            for _ in range(150):
                step(*next(source))
            values.append(task.evaluate(model)["squared error"])
        print(f"| {size} | {', '.join(f'{v:.3g}' for v in values)} |", flush=True)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "times 100": lambda x: 100 * x,
    "plus 10": lambda x: x + 10,
}


def inputs(options: argparse.Namespace) -> None:
    """The error after the same number of steps, the network's inputs changed, its targets not."""
    task = TASKS["curves"]()
    assert task.images is not None
    contestants: dict[str, dict[str, Any] | None] = {
        "Adam 1e-3": None,
        "KFAC": {},
        "KFAC, not centered": {"centered": False},
    }
    print("| inputs | " + " | ".join(contestants) + " |\n" + "| --- " * (1 + len(contestants)) + "|")
    for what, change in CHANGES.items():
        row = []
        for setting in contestants.values():
            values = []
            for seed in options.seeds:
                model = task.make_model(seed)
                values.append(trained(model, setting, change, task, seed))
            row.append(f"{statistics.median(values):.3g}")
        print(f"| {what} | {' | '.join(row)} |", flush=True)


def trained(
    model: nn.Module, setting: dict[str, Any] | None, change: Callable[[Tensor], Tensor], task: Any, seed: int
) -> float:
    """The squared error after 150 steps on changed inputs."""
    if setting is None:
        opt: Any = torch.optim.Adam(model.parameters(), lr=1e-3)
        loss_of = task.loss
    else:
        opt = natgrad.KFAC(model, task.loss, weight_decay=task.weight_decay, **setting)
        loss_of = opt.loss
    source = task.batches(seed, 1000)
    for _ in range(150):
        x, y = next(source)
        loss = loss_of(model(change(x)), y) / len(x)
        opt.zero_grad()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
    with torch.no_grad():
        x = task.images[:2000]
        return float((model(change(x)).sigmoid() - x).square().sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["seeds", "batches", "inputs"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/no care"), help="where runs are kept")
    options = parser.parse_args()
    {"seeds": seeds, "batches": batches, "inputs": inputs}[options.what](options)


if __name__ == "__main__":
    main()
