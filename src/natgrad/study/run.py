"""One run: a model trained on a task by an optimizer with a seed, and the result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import natgrad
from natgrad.checks.errors import UserError
from natgrad.report.machine import describe_machine
from natgrad.study.measure import measure
from natgrad.study.optimizers import OPTIMIZERS
from natgrad.study.own_task import own_task
from natgrad.study.spec import Job
from natgrad.study.task import Task
from natgrad.study.tasks import TASKS
from natgrad.study.training import CLOCKS, CONSTANT, Moment, moments

Result = dict[str, Any]
"""The saved result of a run, ready for JSON. `status` is finished, diverged or raised. `curve` has a dict of step,
seconds and figures for each evaluation; `measured` has one of step and layers for each measurement."""


@functools.cache
def _shipped(name: str) -> Task:
    return TASKS[name]()


def task_of(job: Job) -> Task:
    """The task of the run.

    Raises:
        UserError: if it needs a package that is not installed, or the user's function cannot be used.
    """
    use = job.task.use
    return own_task(job.task.name, use, job.seed) if ":" in use else _shipped(use)


def perform(job: Job, on_moment: Callable[[Moment, float], None] = lambda moment, figure: None) -> Result:
    """Trains, evaluates and measures. An exception from the optimizer or the model ends the run, not the study.

    `on_moment` is called after every step, with the last figure.

    Raises:
        UserError: if the task cannot be created.
    """
    torch.set_num_threads(job.threads)
    task = task_of(job)
    result: Result = {
        "task": job.task.name,
        "optimizer": job.optimizer,
        "setting": job.setting,
        "seed": job.seed,
        "status": "finished",
        "error": "",
        "figure": task.figure,
        "rejected": 0,
        "curve": [],
        "measured": [],
        "what": job.what(),
        "machine": {**describe_machine(), "natgrad": natgrad.__version__},
    }
    try:
        _train(job, task, result, on_moment)
    except UserError:
        raise
    except Exception as error:
        result["status"], result["error"] = "raised", " ".join(f"{type(error).__name__}: {error}".split())
    return result


def _train(job: Job, task: Task, result: Result, on_moment: Callable[[Moment, float], None]) -> None:
    model = task.make_model(job.seed)
    torch.manual_seed(job.seed)
    stepper = OPTIMIZERS[job.use].make(model, task, job.setting)
    size = job.setting.get("batch") or job.task.batch or task.batch
    budget = job.task.budget.scaled(job.setting.get("length", 1.0))
    schedule = job.used_schedule
    rates = [(group, group["lr"]) for opt in stepper.optimizers for group in opt.param_groups]
    wanted, due, figure = job.measure, 0.0, math.nan
    every = moments(stepper.step, task.batches(job.seed, size), budget, job.evaluations, clock=CLOCKS[job.clock])
    for moment in every:
        measured = wanted.residual and (moment.last or moment.share >= due - 1e-9)
        if moment.due or measured:
            with stepper.averaged():
                model.eval()
                if moment.due:
                    figures = task.evaluate(model)
                    figure = figures[task.figure]
                    values = {k: v if math.isfinite(v) else None for k, v in figures.items()}
                    result["curve"].append({"step": moment.step, "seconds": moment.seconds, **values})
                if measured and math.isfinite(figure):
                    layers = measure(model, task, wanted, job.seed)
                    result["measured"].append({"step": moment.step, "seconds": moment.seconds, "layers": layers})
                    due += 1 / (wanted.points - 1)
                model.train()
        result["rejected"] = stepper.rejected
        on_moment(moment, figure)
        if not math.isfinite(figure):
            result["status"] = "diverged"
            return
        if schedule != CONSTANT:
            for group, rate in rates:
                group["lr"] = rate * schedule.factor(budget, moment.step, moment.share)
