"""Progress of the training: a live display on a terminal, plain lines elsewhere."""

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from natgrad.cli.training import Run

LINES_PER_RUN = 5


class TrainingDisplay:
    """One row for each optimizer, updated within the context; pass `update` to `train`."""

    def __init__(self, console: Console, runs: Sequence[Run], seconds: float) -> None:
        self._console = console
        self._seconds = seconds
        self._live: Progress | None = None
        self._rows: dict[str, TaskID] = {}
        self._next_line: dict[str, float] = {}
        if console.is_terminal:
            # The words fill the usual 80 columns of a terminal; a wider one also has the bar.
            bar = [BarColumn(bar_width=16)] if console.width >= 100 else []
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                *bar,
                TextColumn("{task.fields[state]}"),
                console=console,
                refresh_per_second=4,
            )
            for run in runs:
                self._rows[run.optimizer] = self._live.add_task(
                    f"{run.optimizer:<15}", total=seconds, state="[dim]waiting"
                )

    def __enter__(self) -> "TrainingDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, run: Run) -> None:
        """Show the current state of the run."""
        if self._live is not None:
            self._live.update(
                self._rows[run.optimizer],
                completed=min(run.seconds, self._seconds),
                state=self._describe(run),
            )
        elif run.step and run.seconds >= self._next_line.get(run.optimizer, 0.0):
            self._next_line[run.optimizer] = run.seconds + self._seconds / LINES_PER_RUN
            self._console.print(f"{run.optimizer:<15} {self._describe(run)}", soft_wrap=True)

    def _describe(self, run: Run) -> str:
        error = run.curve[-1].squared_error if run.curve else math.nan
        damping = "" if run.damping is None else f"  damping {run.damping:.0e}"
        left = max(0.0, self._seconds - run.seconds)
        state = f"step {run.step:>4}  loss {run.batch_loss:6.2f}  error {error:6.2f}{damping}"
        return f"{state}  {left:2.0f} s left"


def summary_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Build the closing table's rows under `SUMMARY_HEADINGS`."""
    reference = next((run.final.squared_error for run in runs if run.kind == "adam" and run.final), None)
    rows: list[tuple[str, ...]] = []
    for run in runs:
        final = run.final
        if final is None:
            rows.append((run.optimizer, "not run", "", "", "", ""))
            continue
        per_step = f"{1000 * final.seconds / (final.step - 1):.1f}" if final.step > 1 else "–"
        ratio = f"{final.squared_error / reference:.3f}" if reference else "–"
        name = f"{run.optimizer} (diverged)" if run.diverged else run.optimizer
        rows.append((name, f"{final.step:,}", per_step, f"{final.loss:.2f}", f"{final.squared_error:.3f}", ratio))
    return rows


SUMMARY_HEADINGS = ("optimizer", "steps", "ms/step", "loss", "squared error", "ratio to Adam")
FEW_STEPS = 100


def calibration(runs: Sequence[Run]) -> str:
    """A sentence on the time of the first steps, which is not part of the budgets."""
    took = ", ".join(f"{run.optimizer} {run.first_step:.2g} s" for run in runs if run.final and run.final.step)
    return f"Calibration of the damping (the first step, not counted above): {took}." if took else ""


def too_few_steps(runs: Sequence[Run], seconds: float) -> str:
    """A sentence if an optimizer took too few steps for a comparison; else empty."""
    few = [f"{run.optimizer} took {run.final.step}" for run in runs if run.final and run.final.step < FEW_STEPS]
    if not few or any(run.diverged for run in runs):
        return ""
    more = 60 if seconds < 60 else 2 * math.ceil(seconds)
    return f"{', '.join(few)}: too few steps to compare, use --seconds {more}"


def summary_table(runs: Sequence[Run]) -> Table:
    """Lay out the closing table for the terminal."""
    table = Table()
    for index, heading in enumerate(SUMMARY_HEADINGS):
        table.add_column(heading, justify="right" if index else "left")
    for row in summary_rows(runs):
        table.add_row(*row)
    return table
