"""Does natgrad lose anywhere? Twelve small tasks, the same weights and batches, so many seconds of the processor on one
thread for each optimizer: AdamW at the best of four rates, NewtonMuon and KFAC as they are.

The rate is the one with the lowest held-out loss on the first seed. Learning rates rise over a twentieth of the time,
then fall to zero; KFAC finds its own.

python -m benchmarks.no_regret --seconds 10 --seeds 3 --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch

import natgrad
from benchmarks.machine import machine
from benchmarks.no_regret.tasks import TASKS
from natgrad.study.comparison import Contestant, run
from natgrad.study.training import CONSTANT

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def contestant(name: str) -> Contestant:
    """By its name: `AdamW 0.001`, `NewtonMuon` or `KFAC`."""
    if name.startswith("AdamW"):
        lr = float(name.split()[1])
        return Contestant(name, "", lambda model, loss: torch.optim.AdamW(model.parameters(), lr=lr))
    if name == "NewtonMuon":
        return Contestant(name, "", lambda model, loss: natgrad.NewtonMuon(model))
    return Contestant(name, "", lambda model, loss: natgrad.KFAC(model, loss), True, CONSTANT)


def perform(job: tuple[str, str, int, float]) -> dict[str, Any]:
    """One run."""
    task, name, seed, seconds = job
    torch.set_num_threads(1)
    outcome = run(contestant(name), TASKS[task]().problem(seed), seconds, evaluations=2)
    return {
        "task": task,
        "optimizer": name,
        "seed": seed,
        "status": outcome.status,
        "error": outcome.error,
        "steps": outcome.steps,
        "ms": 1000 * outcome.cost,
        "training": outcome.last("training"),
        "held-out": outcome.last("held-out"),
    }


def figures(runs: list[dict[str, Any]], task: str, name: str, key: str = "held-out") -> list[float]:
    return [r[key] for r in runs if (r["task"], r["optimizer"]) == (task, name)]


def best_rate(runs: list[dict[str, Any]], task: str) -> str:
    first = [r for r in runs if r["task"] == task and r["optimizer"].startswith("AdamW") and r["seed"] == 0]
    best = min(first, key=lambda r: r["held-out"])
    return str(best["optimizer"])


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds; ratios of these to AdamW's, and steps in units of AdamW's."""
    lines = [
        "| task | AdamW, held-out loss | rate | NewtonMuon | KFAC | a step of NewtonMuon | of KFAC |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(r["task"] for r in runs):
        adamw = best_rate(runs, task)
        base, cost = statistics.mean(figures(runs, task, adamw)), statistics.median(figures(runs, task, adamw, "ms"))
        cells = [task, f"{base:.4g}", adamw.split()[1]]
        for name in ("NewtonMuon", "KFAC"):
            ratio = statistics.mean(figures(runs, task, name)) / base
            spread = [v / b for v, b in zip(figures(runs, task, name), figures(runs, task, adamw), strict=True)]
            cells.append(f"{ratio:.2f} ({min(spread):.2f} to {max(spread):.2f})")
        cells += [f"{statistics.median(figures(runs, task, n, 'ms')) / cost:.1f}" for n in ("NewtonMuon", "KFAC")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor, for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/no_regret.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["task"], r["optimizer"], r["seed"]) for r in kept}

    def take(pool: Any, names: Any) -> None:
        """The runs that are not kept yet."""
        jobs = [(t, n, s, options.seconds) for t in options.tasks for s in range(options.seeds) for n in names(t, s)]
        for found in pool.imap_unordered(perform, [j for j in jobs if j[:3] not in done]):
            kept.append(found)
            done.add((found["task"], found["optimizer"], found["seed"]))
            options.out.write_text(json.dumps(kept, indent=1))
            print({k: v for k, v in found.items() if v != ""}, flush=True)

    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        take(pool, lambda task, seed: [f"AdamW {lr:g}" for lr in RATES] if seed == 0 else [])
        take(pool, lambda task, seed: [*([best_rate(kept, task)] if seed else []), "NewtonMuon", "KFAC"])
    print(f"{machine()}; {options.seconds:g} s, {options.seeds} seeds, {options.processes} processes\n")
    print(table(sorted(kept, key=lambda r: (list(TASKS).index(r["task"]), r["optimizer"], r["seed"]))))


if __name__ == "__main__":
    main()
