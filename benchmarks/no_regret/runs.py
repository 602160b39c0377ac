"""One run of a task by an optimizer, and the table of many."""

from __future__ import annotations

import ast
import functools
import statistics
from typing import Any

import torch

import natgrad
from benchmarks.no_regret.tasks import TASKS, Task
from natgrad.study.comparison import Contestant, run
from natgrad.study.training import CONSTANT

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def contestant(name: str) -> Contestant:
    """By its name: `AdamW 0.001`, or `NewtonMuon` or `KFAC` with settings: `NewtonMuon lr=0.04 sides="both"`."""
    which, *words = name.split()
    if which == "AdamW":
        lr = float(words[0])
        return Contestant(name, "", lambda model, loss: torch.optim.AdamW(model.parameters(), lr=lr))
    setting = {key: ast.literal_eval(value) for key, value in (word.split("=", 1) for word in words)}
    if which == "NewtonMuon":
        return Contestant(name, "", lambda model, loss: natgrad.NewtonMuon(model, **setting))
    return Contestant(name, "", lambda model, loss: natgrad.KFAC(model, loss, **setting), True, CONSTANT)


@functools.cache
def _task(name: str) -> Task:
    return TASKS[name]()


def perform(job: tuple[str, str, int, float]) -> dict[str, Any]:
    """One run."""
    task, name, seed, seconds = job
    torch.set_num_threads(1)
    outcome = run(contestant(name), _task(task).problem(seed), seconds, evaluations=2)
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
