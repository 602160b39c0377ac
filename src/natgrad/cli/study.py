"""`natgrad study`: optimizers x tasks x seeds, from a TOML file to a report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from natgrad.checks.errors import UserError
from natgrad.cli.interrupt import Interruption
from natgrad.cli.report import check_writable, writing
from natgrad.cli.study_display import StudyDisplay
from natgrad.cli.study_report import write_report
from natgrad.report.machine import cores
from natgrad.report.words import visible
from natgrad.study.beside import HEADINGS as BESIDE_HEADINGS
from natgrad.study.beside import beside_rows, has_published
from natgrad.study.images import check_mnist
from natgrad.study.keeping import jobs, keep, kept, others, pending
from natgrad.study.own_task import own_task
from natgrad.study.pool import run_study
from natgrad.study.spec import Spec, find_spec, load_spec
from natgrad.study.summary import HEADINGS, summarize
from natgrad.study.tasks import NEED_MNIST

MOST_PROCESSES = 8


def run(given: str, out: Path | None, processes: int | None, replace: bool) -> None:
    """Run what is missing, save every run in `out`, and write the report there."""
    if processes is not None and processes < 1:
        raise UserError(f"--processes was {processes}; expected at least 1; leave it out for the default.")
    spec = load_spec(given)
    check_tasks(spec)
    out = Path("natgrad-study") / spec.name if out is None else out
    check_writable(out)
    console = Console()
    results = kept(
        out, spec, replace, lambda words: console.print(visible(words), markup=False, highlight=False, soft_wrap=True)
    )
    others(out, spec)
    processes = processes or default_processes(spec)
    console.print(
        f"{visible(spec.title)}: {_count(len(spec.optimizers), 'optimizer')}, {_count(len(spec.tasks), 'task')}, "
        f"{_count(len(spec.seeds), 'seed')}; {len(results)} runs are finished, {processes} at a time. "
        "Ctrl-C stops and writes a report on the runs so far.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with Interruption() as interruption:
        with StudyDisplay(console, len(pending(spec, results))) as display:
            for event in run_study(spec, results, processes, lambda: interruption.requested):
                if event.result is not None and event.result["status"] != "died":
                    event.result["machine"]["processes"] = processes
                    with writing(out):
                        keep(out, event.job, event.result)
                display.show(event, len(pending(spec, results)))
        summary = summarize(spec, [*results.values(), *others(out, spec)], interruption.requested)
        with writing(out):
            report = write_report(summary, out)
    for task in summary.tasks:
        title = f"{task.entry.name}: {task.figure} after {task.entry.budget}"
        table = Table(title=Text(visible(title)), title_justify="left")
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if i else "left")
        for row in task.rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        console.print(table)
    for task in summary.tasks:
        if has_published(task):
            table = Table(*BESIDE_HEADINGS, title=f"{task.entry.name}, beside published runs", title_justify="left")
            for row in beside_rows(task):
                table.add_row(*row)
            console.print(table)
    for trouble in summary.troubles:
        console.print(visible(trouble), markup=False, highlight=False, soft_wrap=True)
    if summary.interrupted:
        console.print("Stopped early: the same command resumes from here.")
    console.print(f"Report: {visible(str(report))}", soft_wrap=True, markup=False, highlight=False)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def show(given: str) -> None:
    """Print the spec's text."""
    print(find_spec(given)[2], end="")


def check_tasks(spec: Spec) -> None:
    """Raises UserError if a task cannot be created."""
    for task in spec.tasks:
        if ":" in task.use:
            own_task(task.name, task.use, spec.seeds[0])
        elif task.use in NEED_MNIST:
            check_mnist()


def default_processes(spec: Spec) -> int:
    """One if budgets are in seconds, else one for each core, at most 8."""
    if spec.in_seconds:
        return 1
    return max(1, min(cores() // spec.threads, MOST_PROCESSES, len(list(jobs(spec)))))
