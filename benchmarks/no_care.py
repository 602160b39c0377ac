"""KFAC's defaults where nobody looks: batches of any size, inputs of any scale. Many seeds on every task are a study,
no_care.toml.

python -m benchmarks.no_care batches   # CURVES, batches of 64 to 4,096, by images seen
python -m benchmarks.no_care inputs    # CURVES, images times 100, plus 10
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.report.figures import new_figure, save, tidy
from natgrad.study.optimizers import OPTIMIZERS
from natgrad.study.tasks import TASKS


def batches(options: argparse.Namespace) -> None:
    """The error after the same number of steps, whatever the batch."""
    task = TASKS["curves"]()
    print("| batch | squared error after 150 steps |\n| --- | --- |")
    for size in (64, 256, 1024, 4096):
        values = []
        for seed in options.seeds:
            model = task.make_model(seed)
            stepper = OPTIMIZERS["KFAC"].make(model, task, {})
            source = task.batches(seed, size)
            for _ in range(150):
                stepper.step(next(source))
            values.append(task.evaluate(model)["squared error"])
        print(f"| {size} | {', '.join(f'{v:.3g}' for v in values)} |", flush=True)


STEPS = range(0, 151, 10)


@dataclass(frozen=True)
class Change:
    """Inputs `factor * x + shift`; with `same` the first layer begins as one that undoes it."""

    factor: float = 1.0
    shift: float = 0.0
    same: bool = False

    def of(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift

    def begin(self, model: nn.Module) -> None:
        first = next(m for m in model.modules() if isinstance(m, nn.Linear))
        if self.same:
            with torch.no_grad():
                first.weight /= self.factor
                first.bias -= self.shift * first.weight.sum(1)


CHANGES = {
    "as they are": Change(),
    "times 100": Change(factor=100.0),
    "times 100, same function at first": Change(factor=100.0, same=True),
    "plus 10": Change(shift=10.0),
    "plus 10, same function at first": Change(shift=10.0, same=True),
}


def inputs(options: argparse.Namespace) -> None:
    """The error after the same number of steps, the network's inputs changed, its targets not; and a plot of it."""
    task = TASKS["curves"]()
    contestants: dict[str, dict[str, Any] | None] = {
        "Adam 1e-3": None,
        "KFAC": {},
        "KFAC, not centered": {"centered": False},
    }
    figure = new_figure(13.0, 3.2)
    panels = figure.subplots(1, len(CHANGES), sharey=True)
    print("| inputs | " + " | ".join(contestants) + " |\n" + "| --- " * (1 + len(contestants)) + "|")
    for (what, change), axes in zip(CHANGES.items(), panels, strict=True):
        row = []
        for i, (name, setting) in enumerate(contestants.items()):
            curves = [trained(task.make_model(seed), setting, change, task, seed) for seed in options.seeds]
            median = [statistics.median(values) for values in zip(*curves, strict=True)]
            row.append(f"{median[-1]:.3g}")
            for curve in curves:
                axes.plot(STEPS, curve, color=f"C{i}", lw=0.7, alpha=0.5)
            axes.plot(STEPS, median, color=f"C{i}", lw=1.8, label=name)
        axes.set_title(what.replace(", ", ",\n"), fontsize=9)
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        tidy(axes)
        print(f"| {what} | {' | '.join(row)} |", flush=True)
    panels[0].set_ylabel("squared error")
    panels[0].legend(fontsize=8, frameon=False)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    save(figure, options.plot)


def trained(model: nn.Module, setting: dict[str, Any] | None, change: Change, task: Any, seed: int) -> list[float]:
    """The squared error at `STEPS` on changed inputs. Without weight decay, which would weigh another function's
    parameters."""
    errors = []
    change.begin(model)
    if setting is None:
        opt: Any = torch.optim.Adam(model.parameters(), lr=1e-3)
        loss_of = task.loss
    else:
        opt = natgrad.KFAC(model, task.loss, **setting)
        loss_of = opt.loss
    source = task.batches(seed, 1000)
    for taken in range(STEPS[-1] + 1):
        if taken in STEPS:
            with torch.no_grad():
                x = task.images[:2000]
                errors.append(float((model(change.of(x)).sigmoid() - x).square().sum(1).mean()))
        x, y = next(source)
        loss = loss_of(model(change.of(x)), y) / len(x)
        opt.zero_grad()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batches", "inputs"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/inputs.png"), help="of inputs")
    options = parser.parse_args()
    {"batches": batches, "inputs": inputs}[options.what](options)


if __name__ == "__main__":
    main()
