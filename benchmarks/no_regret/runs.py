"""What a step of each optimizer costs, one run of a task by an optimizer, and the table of many."""

from __future__ import annotations

import ast
import functools
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import natgrad
from benchmarks.no_regret.tasks import TASKS, Task
from natgrad.study.comparison import Contestant, run
from natgrad.study.training import CONSTANT, Budget

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ADAMW = f"AdamW {RATES[1]:g}"
FIRST, BLOCKS, BLOCK = 16, 4, 8
"""Steps that are not timed, in which refreshes are more frequent; and how many are timed, by turns."""


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


class _Loop:
    """Training steps of one optimizer, timed on the processor."""

    def __init__(self, name: str, task: str):
        self._problem, who = _task(task).problem(0), contestant(name)
        self._model = self._problem.model.train()
        self._opt = who.make(self._model, self._problem.loss)
        self._loss = self._opt.loss if who.follows_loss else self._problem.loss
        self._batches = self._problem.data.training(0)

    def seconds(self, steps: int) -> float:
        batches = [next(self._batches) for _ in range(steps)]
        start = time.process_time()
        for batch in batches:
            loss = self._loss(*self._problem.read(self._model, batch))
            self._opt.zero_grad()
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of rejected steps
                self._opt.step()
        return time.process_time() - start


def costs(job: tuple[str, Sequence[str]]) -> dict[str, float]:
    """The processor's seconds of a step of AdamW, and of others in AdamW steps. The optimizers take a few steps each,
    by turns: what else the machine does slows all of them. Ratios are medians over the turns."""
    task, names = job
    torch.set_num_threads(1)
    loops = {name: _Loop(name, task) for name in (ADAMW, *names)}
    for loop in loops.values():
        loop.seconds(FIRST)
    turns = [{name: loop.seconds(BLOCK) / BLOCK for name, loop in loops.items()} for _ in range(BLOCKS)]
    found = {name: statistics.median(turn[name] / turn[ADAMW] for turn in turns) for name in names}
    return {"AdamW": min(turn[ADAMW] for turn in turns), **found}


def perform(job: tuple[str, str, int, int]) -> dict[str, Any]:
    """One run of so many steps."""
    task, name, seed, steps = job
    torch.set_num_threads(1)
    outcome = run(contestant(name), _task(task).problem(seed), Budget(steps=steps), evaluations=2)
    return {
        "task": task,
        "optimizer": name,
        "seed": seed,
        "status": outcome.status,
        "error": outcome.error,
        "steps": outcome.steps,
        "training": outcome.last("training"),
        "held-out": outcome.last("held-out"),
    }


def figures(runs: list[dict[str, Any]], task: str, name: str) -> dict[int, float]:
    """The held-out losses by seed."""
    return {r["seed"]: r["held-out"] for r in runs if (r["task"], r["optimizer"]) == (task, name)}


def best_rate(runs: list[dict[str, Any]], task: str) -> str:
    """AdamW at the rate that has the lowest held-out loss on the first seed."""
    first = [r for r in runs if r["task"] == task and r["optimizer"].startswith("AdamW") and r["seed"] == 0]
    best = min(first, key=lambda r: r["held-out"])
    return str(best["optimizer"])


def table(runs: list[dict[str, Any]], every: dict[str, dict[str, float]], names: Sequence[str]) -> str:
    """Ratios of the means over the seeds to AdamW's, with the lowest and highest of one seed, and costs of steps. What
    was not run is left empty."""
    head = ["task", "AdamW, held-out loss", "rate", "steps", *names, *(f"a step of {name}" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for task in dict.fromkeys(r["task"] for r in runs):
        adamw = best_rate(runs, task)
        base = figures(runs, task, adamw)
        steps = next(r["steps"] for r in runs if (r["task"], r["optimizer"]) == (task, adamw))
        cells = [task, f"{statistics.mean(base.values()):.4g}", adamw.split()[1], str(steps)]
        for name in names:
            found = figures(runs, task, name)
            seeds = [seed for seed in found if seed in base]
            if not seeds:
                cells.append("")
                continue
            spread = [found[seed] / base[seed] for seed in seeds]
            ratio = statistics.mean(found[seed] for seed in seeds) / statistics.mean(base[seed] for seed in seeds)
            cells.append(f"{ratio:.2f}" + (f" ({min(spread):.2f} to {max(spread):.2f})" if len(spread) > 1 else ""))
        shares = [f"{every[task][name]:.1f}" if name in every[task] else "" for name in names]
        lines.append("| " + " | ".join([*cells, *shares]) + " |")
    return "\n".join(lines)
