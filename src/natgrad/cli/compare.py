"""`natgrad compare`: trains a user's own model with several optimizers for equal time, and gives advice."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from natgrad.checks.errors import UserError
from natgrad.cli.interrupt import Interruption
from natgrad.cli.report import check_seed, check_writable, finite, write_json, write_page
from natgrad.report.figures import MORE_COLOURS, new_figure, save, tidy
from natgrad.study.comparison import Outcome, Problem, advice, contestants, run
from natgrad.study.pictures import STYLES, plain_log_ticks
from natgrad.study.split import split
from natgrad.study.target import load_problem, words
from natgrad.study.training import Budget

HEADINGS = ("optimizer", "steps", "ms/step", "AdamW steps", "training loss", "held-out loss")
LINES = 4
"""Progress lines for each optimizer, if the output is not a terminal."""


def run_compare(target: str, seconds: float, batch: int, seed: int, out: Path) -> None:
    """Train the model of `MODULE:FUNCTION` with each optimizer from the same weights, and write the report to `out`."""
    if not (0 < seconds < math.inf):
        raise UserError(f"--seconds was {seconds:g}; expected a number above 0, such as --seconds 60.")
    if batch < 1:
        raise UserError(f"--batch was {batch}; expected at least 1; the default is 64.")
    check_seed(seed)
    torch.manual_seed(seed)
    problem = _problem(target, batch, seed)
    check_writable(out)
    entries = contestants(problem.model)
    console = Console()
    console.print(
        f"{target}: {len(entries)} optimizers from the same weights, {seconds:g} s of the processor for each. "
        "Ctrl-C stops and writes a report on the runs so far.",
        highlight=False,
        soft_wrap=True,
    )
    outcomes: list[Outcome] = []
    with Interruption() as interruption:
        for entry in entries:
            outcome = run(
                entry, problem, Budget(seconds=seconds), lambda: interruption.requested, _Progress(console, seconds)
            )
            if interruption.requested:
                console.print("Stopped early: the unfinished run is left out.")
                break
            outcomes.append(outcome)
            console.print(_line(outcome), highlight=False, soft_wrap=True, markup=False)
        if not outcomes:
            return
        if all(o.status == "refused" for o in outcomes):
            raise UserError(
                f"no optimizer can train what {target} returned: AdamW raised {outcomes[0].error}; expected a model, a "
                "loss and data for which loss.backward() works; correct the function."
            )
        held_out = bool(problem.data.held_out)
        sentence = advice(outcomes, held_out)
        page = _write(target, seconds, seed, outcomes, sentence, held_out, out)
    table = Table()
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows(outcomes):
        table.add_row(*row)
    console.print(table)
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True, markup=False, highlight=False)


BROADCAST = "Using a target size"
"""How torch's warning begins where a loss compares each output with all targets."""


def _problem(target: str, batch: int, seed: int) -> Problem:
    model, loss, data, forward = load_problem(target)
    divided = split(data, batch)

    def read(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if forward is not None:
            return forward(model, batch)
        x, y = batch
        return model(x), y

    problem = Problem(model, loss, divided, read, seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", BROADCAST)
            problem.figure(model, divided.sample[:1])
    except UserWarning as warning:
        raise UserError(
            f"output and target of {target} have different shapes, so that every output would be compared with every "
            f"target: {words(warning)} Expected the same shapes, as by target.view_as(output)."
        ) from warning
    except Exception as error:
        raise UserError(
            f"what {target} returned cannot be trained: {words(error)}; expected loss(model(x), y) to be a number for "
            "the first batch (x, y), or a fourth value forward(model, batch) that gives output and target."
        ) from error
    return problem


class _Progress:
    """A line for each optimizer at intervals; a terminal overwrites it."""

    def __init__(self, console: Console, seconds: float):
        self._console, self._seconds, self._next = console, seconds, 0.0

    def __call__(self, outcome: Outcome) -> None:
        if outcome.seconds < self._next or not outcome.curve:
            return
        self._next = outcome.seconds + self._seconds / (50 if self._console.is_terminal else LINES)
        left = max(0.0, self._seconds - outcome.seconds)
        line = f"{outcome.contestant.name:<22} step {outcome.steps:>6,}  loss {outcome.curve[-1]['training']:8.4g}"
        end = "\r" if self._console.is_terminal else "\n"
        self._console.print(f"{line}  {left:3.0f} s left", end=end, highlight=False, soft_wrap=True)


def _line(outcome: Outcome) -> str:
    if outcome.status == "refused":
        return f"{outcome.contestant.name}: left out: {outcome.error}"
    if outcome.status == "diverged":
        return f"{outcome.contestant.name}: diverged after {outcome.steps:,} steps"
    return f"{outcome.contestant.name}: {outcome.steps:,} steps, training loss {outcome.last('training'):.4g}"


def rows(outcomes: list[Outcome]) -> list[tuple[str, ...]]:
    """The rows of the table under `HEADINGS`, the best optimizer first."""
    costs = [o.cost for o in outcomes if o.contestant.name.startswith("AdamW") and o.costs]
    unit = min(costs, default=math.nan)
    which = "held-out" if any(math.isfinite(o.last("held-out")) for o in outcomes) else "training"
    found: list[tuple[str, ...]] = []
    for o in sorted(outcomes, key=lambda o: o.last(which)):
        name = o.contestant.name + ("" if o.status == "finished" else f" ({o.status})")
        figures = (_number(o.last("training")), _number(o.last("held-out")))
        found.append((name, f"{o.steps:,}", _number(1000 * o.cost), _number(o.cost / unit, 3), *figures))
    return found


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "–"


def _write(
    target: str, seconds: float, seed: int, outcomes: list[Outcome], sentence: str, held_out: bool, out: Path
) -> Path:
    """Write results.json, the picture and report.html; return the report's path."""
    runs = [
        {
            "optimizer": o.contestant.name,
            "line": o.contestant.line,
            "status": o.status,
            "error": o.error,
            "steps": o.steps,
            "seconds": o.seconds,
            "seconds a step": finite(o.cost),
            "curve": [{k: finite(v) for k, v in point.items()} for point in o.curve],
        }
        for o in outcomes
    ]
    write_json(
        {"target": target, "seconds": seconds, "seed": seed, "advice": sentence, "runs": runs}, out / "results.json"
    )
    pictures = {}
    if any(len(o.curve) > 1 for o in outcomes):
        pictures["curves"] = out / "curves.png"
        draw(outcomes, held_out, pictures["curves"])
    page = out / "report.html"
    write_page(
        "compare.html.jinja",
        pictures,
        page,
        target=target,
        seconds=seconds,
        seed=seed,
        advice=sentence,
        held_out=held_out,
        headings=HEADINGS,
        rows=rows(outcomes),
        lines=[(o.contestant.name, o.contestant.line, o.error or o.status) for o in outcomes],
    )
    return page


def draw(outcomes: list[Outcome], held_out: bool, path: Path) -> None:
    """The figures against time: one panel for the training data, one for the held-out data."""
    which = ["training", "held-out"] if held_out else ["training"]
    figure = new_figure(4.1 * len(which), 3.9)
    panels = figure.subplots(1, len(which), squeeze=False)[0]
    for axes, key in zip(panels, which, strict=True):
        values: list[float] = []
        for i, o in enumerate(outcomes):
            points = [(p["seconds"], p[key]) for p in o.curve if math.isfinite(p[key])]
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                colour, style = MORE_COLOURS[i % len(MORE_COLOURS)], STYLES[i // len(MORE_COLOURS) % len(STYLES)]
                axes.plot(x, y, color=colour, linestyle=style, linewidth=1.8, label=o.contestant.name)
                values += y
        if values and min(values) > 0:
            axes.set_yscale("log")
            plain_log_ticks(axes)
        axes.set_xlabel("training time (s)")
        axes.set_ylabel(f"{key} loss")
        tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, ncols=4, loc="outside lower center")
    save(figure, path)
