"""The output of a study: results.json, the pictures and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from natgrad.cli.report import write_json, write_page
from natgrad.report.words import file_names
from natgrad.study.beside import HEADINGS as BESIDE_HEADINGS
from natgrad.study.beside import beside_rows, draw_beside, has_published
from natgrad.study.pictures import draw_conditions, draw_curves, draw_pairs, draw_residuals, has_conditions
from natgrad.study.published import source
from natgrad.study.spec import brief
from natgrad.study.summary import (
    HEADINGS,
    Reached,
    Summary,
    TaskSummary,
    interval_words,
    median,
    number,
    ratio_words,
    to_dict,
)

PAIR_HEADINGS = ("task", "optimizer", "pairs", "better on", "ratio", "95%", "difference", "95%")


def write_report(summary: Summary, out: Path) -> Path:
    """Write results.json, the pictures and report.html to `out`; return the report's path."""
    write_json(to_dict(summary), out / "results.json")
    pictures = draw(summary, out)
    page = out / "report.html"
    write_page(
        "study.html.jinja",
        pictures,
        page,
        summary=summary,
        headings=HEADINGS,
        more={t.entry.name: more_rows(t) for t in summary.tasks},
        pair_headings=PAIR_HEADINGS,
        pair_rows=pair_rows(summary),
        reached={t.entry.name: reached_rows(t.reached) for t in summary.tasks},
        settings=setting_rows(summary),
        beside={t.entry.name: [BESIDE_HEADINGS, *beside_rows(t)] for t in summary.tasks if has_published(t)},
        source=source(),
    )
    return page


def draw(summary: Summary, out: Path) -> dict[str, Path]:
    """Draw the pictures for which there are data; returns their paths by subject."""
    pictures, files = {}, file_names(t.entry.name for t in summary.tasks)
    for task in summary.tasks:
        name = task.entry.name
        slug = files[name]
        if any(g.finished for g in task.groups):
            pictures[f"curves {name}"] = out / f"curves-{slug}.png"
            draw_curves(task, pictures[f"curves {name}"])
        if has_published(task):
            pictures[f"beside {name}"] = out / f"beside-{slug}.png"
            draw_beside(task, pictures[f"beside {name}"])
        if task.measured:
            pictures[f"residuals {name}"] = out / f"residuals-{slug}.png"
            draw_residuals(task, pictures[f"residuals {name}"])
        if has_conditions(task):
            pictures[f"conditions {name}"] = out / f"conditions-{slug}.png"
            draw_conditions(task, pictures[f"conditions {name}"])
    pairs = [p for t in summary.tasks for p in t.pairs]
    if any(p.ratio is not None for p in pairs):
        pictures["pairs"] = out / "pairs.png"
        draw_pairs(pairs, pictures["pairs"])
    return pictures


def pair_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The comparisons with the baseline under `PAIR_HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for task in summary.tasks:
        for p in task.pairs:
            pairs = f"{p.pairs}" if not p.lost else f"{p.pairs} of {p.pairs + p.lost}"
            better = f"{p.better} of {p.pairs + p.lost}"
            rows.append((p.task, p.optimizer, pairs, better, *ratio_words(p.ratio), *interval_words(p.difference)))
    return rows


def reached_rows(reached: Sequence[Reached]) -> list[list[str]]:
    """A row for each optimizer and a column for each target, the headings first."""
    targets = list(dict.fromkeys(r.target for r in reached))
    optimizers = list(dict.fromkeys(r.optimizer for r in reached))
    cells = {(r.optimizer, r.target): _reached(r) for r in reached}
    return [["optimizer", *targets], *([o, *(cells.get((o, t), "") for t in targets)] for o in optimizers)]


def more_rows(task: TaskSummary) -> list[list[str]]:
    """The medians of the other evaluated figures, the headings first; empty if there are none."""
    names = task.more_figures
    if not names:
        return []
    rows = []
    for g in task.groups:
        last = [r["curve"][-1] for r in g.finished]
        values = [[p[n] for p in last if p.get(n) is not None] for n in names]
        rows.append([g.optimizer, *(number(median(v)) for v in values)])
    return [["optimizer", *names], *rows]


def setting_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Task, optimizer, setting, number of settings tried, steps taken back."""
    return [
        (
            t.entry.name,
            g.optimizer,
            brief(g.setting) or "its defaults",
            str(g.tried),
            ", ".join(str(r["rejected"]) for r in g.results),
        )
        for t in summary.tasks
        for g in t.groups
    ]


def _reached(r: Reached) -> str:
    if r.steps is None or r.seconds is None:
        return "–" if not r.count else f"– ({r.count} of {r.of})"
    some = "" if r.count == r.of else f" ({r.count} of {r.of})"
    return f"{r.steps:,.0f} steps, {r.seconds:.3g} s{some}"
