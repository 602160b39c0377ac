"""The demo, from its options to its report."""

import math
from pathlib import Path

from rich.console import Console

from natgrad.checks.errors import UserError
from natgrad.checks.values import did_you_mean
from natgrad.cli.conditioning import layer_conditioning
from natgrad.cli.demo_report import Outcome, write_all
from natgrad.cli.interrupt import Interruption
from natgrad.cli.progress import TrainingDisplay, calibration, summary_table, too_few_steps
from natgrad.cli.report import check_seed, check_writable, writing
from natgrad.cli.training import demo_runs, train
from natgrad.report.words import visible
from natgrad.study.networks import make_autoencoder
from natgrad.study.tasks import SUBSET, autoencoder

TASKS = ("curves", "mnist")


def run_demo(task_name: str, seconds: float, seed: int, out: Path) -> None:
    """Train an autoencoder with each optimizer for some seconds of processor time, and write the report to `out`."""
    if not (0 < seconds < math.inf):
        raise UserError(f"--seconds was {seconds:g}; expected a number above 0, such as --seconds 40.")
    check_seed(seed)
    if task_name not in TASKS:
        near = did_you_mean(task_name, TASKS)
        raise UserError(f"--task was {task_name!r}; expected --task curves or --task mnist{near or '.'}")
    console = Console()
    with Interruption() as interruption:
        task = autoencoder(task_name, seed)
        assert task.images is not None
        check_writable(out)
        initial = make_autoencoder(task.widths, seed)
        runs = demo_runs()
        console.print(
            f"{task.name}: {len(task.images):,} images, an autoencoder {'-'.join(map(str, task.widths))} "
            f"and back, {seconds:g} s of processor time for each optimizer. Ctrl-C stops and writes the report.",
            highlight=False,
            soft_wrap=True,
        )
        with TrainingDisplay(console, runs, seconds) as display:
            for run in runs:
                train(
                    run,
                    initial,
                    task.images,
                    seconds,
                    seed=seed,
                    stopped=lambda: interruption.requested,
                    on_step=display.update,
                )
                if interruption.requested:
                    break
        # The model of the centered run, or the last one before an interruption.
        conditioned = [run for run in runs if run.model is not None][-1]
        assert conditioned.model is not None
        outcome = Outcome(
            task,
            seconds,
            seed,
            interruption.requested,
            runs,
            conditioned,
            [] if conditioned.diverged else layer_conditioning(conditioned.model, task.images[:SUBSET]),
        )
        with writing(out):
            report = write_all(outcome, out)
    console.print(summary_table(runs))
    if said := calibration(runs):
        console.print(said, soft_wrap=True, highlight=False)
    if few := too_few_steps(runs, seconds):
        console.print(few, soft_wrap=True, highlight=False)
    if outcome.interrupted:
        console.print("Stopped early: the report covers the training so far.")
    console.print(f"Report: {visible(str(report))}", soft_wrap=True, markup=False, highlight=False)
