"""Squared error at equal time: K-FAC, centered and not, against Adam at its best of a grid.

    python benchmarks/time_to_error.py --task curves --seconds 40
    python benchmarks/time_to_error.py --task mnist --seconds 60

Every run starts from the same weights and sees the same images; only one runs at a time. Adam's grid is learning
rates 1e-3, 2e-3, 3e-3 times batches 250, 1000; the best by the final error on all images counts. Prints a table,
and writes every curve to `--out`.
"""

import argparse
import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from natgrad.cli.tasks import make_autoencoder, make_task
from natgrad.cli.training import WEIGHT_COST, Run, train

console = Console()


def runs() -> list[Run]:
    grid = [
        Run(f"Adam {lr:g}, batch {batch}", "adam", batch, {"lr": lr, "weight_decay": WEIGHT_COST})
        for batch in (250, 1000)
        for lr in (1e-3, 2e-3, 3e-3)
    ]
    kfac = [
        Run(name, "kfac", 1000, {"weight_decay": WEIGHT_COST, "centered": centered})
        for name, centered in (("K-FAC", False), ("K-FAC, centered", True))
    ]
    return grid + kfac


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="curves", choices=["curves", "mnist"])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="only the runs whose name contains one of these, separated by ;")
    parser.add_argument("--out", type=Path, default=Path("time_to_error.json"))
    options = parser.parse_args()

    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    final: dict[str, dict[int, float]] = {}
    curves = []
    for seed in options.seeds:
        task = make_task(options.task, seed)
        initial = make_autoencoder(task.widths, seed)
        for run in runs():
            if not any(part in run.optimizer for part in options.only.split(";")):
                continue
            train(run, initial, task.images, options.seconds, seed=seed)
            assert run.final is not None
            final.setdefault(run.optimizer, {})[seed] = run.final.squared_error
            curves.append({"seed": seed, "optimizer": run.optimizer, "curve": [asdict(point) for point in run.curve]})
            console.print(
                f"seed {seed}  {run.optimizer:22} {run.step:5} steps  {1e3 * run.seconds / run.step:6.1f} ms/step  "
                f"error {run.final.squared_error:.3f}" + ("  diverged" if run.diverged else ""),
                highlight=False,
            )
            options.out.write_text(json.dumps({"task": options.task, "machine": machine, "runs": curves}))

    adam = {name: by_seed for name, by_seed in final.items() if name.startswith("Adam")}
    table = Table(title=f"{options.task}: squared error after {options.seconds:g} s ({machine})")
    for column in ("optimizer", *(f"seed {seed}" for seed in options.seeds), "median", "of best Adam"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    best = {s: min(by_seed[s] for by_seed in adam.values()) for s in options.seeds} if adam else {}
    for name, by_seed in final.items():
        ratio = statistics.median(by_seed[s] / best[s] for s in options.seeds) if best else float("nan")
        values = [by_seed[s] for s in options.seeds]
        table.add_row(name, *(f"{v:.2f}" for v in values), f"{statistics.median(values):.2f}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
