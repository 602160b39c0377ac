"""Progress of a study: a live display on a terminal, and a line for each run elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from natgrad.report.words import shortened, visible
from natgrad.study.pool import Event
from natgrad.study.statistics import final


class StudyDisplay:
    """Within the context, a bar for all runs and one for each active run; pass every event to `show`."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._finished = 0
        self._live: Progress | None = None
        self._rows: dict[int, TaskID] = {}
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=14),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._all = self._live.add_task("[bold]all runs", total=total, state=f"0 of {total}")

    def __enter__(self) -> StudyDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            for row in self._rows.values():
                self._live.remove_task(row)
            self._live.stop()

    def show(self, event: Event, waiting: int) -> None:
        """Show the event of a run; `waiting` is the number of runs without a result."""
        if event.result is not None:
            self._finished += 1
            self._console.print(visible(closing(event)), markup=False, highlight=False, soft_wrap=True)
        if self._live is None:
            return
        total = self._finished + waiting
        self._live.update(self._all, completed=self._finished, total=total, state=f"{self._finished} of {total}")
        if event.result is not None:
            self._live.remove_task(self._rows.pop(event.worker))
            return
        if event.worker not in self._rows:
            self._rows[event.worker] = self._live.add_task(
                escape(shortened(visible(event.job.label))), total=1.0, state="starting"
            )
        if event.step:
            state = f"step {event.step}, {event.figure:.4g}"
            self._live.update(self._rows[event.worker], completed=min(event.share, 1.0), state=state)


def closing(event: Event) -> str:
    """A run's result on one line."""
    result = event.result
    assert result is not None
    words = [event.job.label + ":"]
    if result["status"] == "finished":
        last = result["curve"][-1]
        pace = 1000 * last["seconds"] / max(1, last["step"])
        words.append(f"{result['figure']} {final(result):.4g}, {last['step']:,} steps, {pace:.1f} ms/step")
    else:
        words.append(result["status"] + (f": {result['error']}" if result["error"] else ""))
    return " ".join(words)
