"""The results of a study: for each task the last figures, the comparisons, the steps to reach an error, the
measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from natgrad.study.run import Result
from natgrad.study.spec import Spec, TaskEntry, brief
from natgrad.study.statistics import Interval, Paired, final, paired, reach

HEADINGS = ("optimizer", "runs", "steps", "ms/step", "median", "lowest", "highest")


@dataclass(frozen=True)
class Group:
    """The runs of one optimizer on one task with its chosen setting, one for each seed."""

    optimizer: str
    setting: Mapping[str, Any]
    results: Sequence[Result]
    tried: int
    """The number of settings tried."""

    @property
    def finished(self) -> list[Result]:
        return [r for r in self.results if r["status"] == "finished" and r["curve"]]

    @property
    def finals(self) -> dict[int, float]:
        return {r["seed"]: final(r) for r in self.results}


@dataclass(frozen=True)
class Reached:
    """Steps and seconds, medians over the seeds, to reach an error: `of` seeds have a target, `count` reached it."""

    optimizer: str
    target: str
    count: int
    of: int
    steps: float | None
    seconds: float | None


@dataclass(frozen=True)
class TaskSummary:
    """The results of one task."""

    entry: TaskEntry
    figure: str
    groups: Sequence[Group]
    pairs: Sequence[Paired]
    reached: Sequence[Reached]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table of last figures under `HEADINGS`, as strings; the best median first."""
        return [_row(g) for g in sorted(self.groups, key=lambda g: median(list(g.finals.values())))]

    @property
    def more_figures(self) -> list[str]:
        """The evaluated figures other than the main one."""
        points = [p for g in self.groups for r in g.results for p in r["curve"][:1]]
        return [n for n in dict.fromkeys(k for p in points for k in p) if n not in ("step", "seconds", self.figure)]

    @property
    def measured(self) -> list[Group]:
        """The groups with measurements."""
        return [g for g in self.groups if any(r["measured"] for r in g.results)]


@dataclass(frozen=True)
class Summary:
    """The results of a study."""

    spec: Spec
    tasks: Sequence[TaskSummary]
    troubles: Sequence[str]
    """A sentence for each run that diverged, raised or died."""
    runs: int
    machines: Sequence[str]
    interrupted: bool


def summarize(spec: Spec, results: Sequence[Result], interrupted: bool) -> Summary:
    """Summarizes the existing runs."""
    tasks = [_task(spec, entry, [r for r in results if r["task"] == entry.name]) for entry in spec.tasks]
    troubles = [trouble(r) for r in results if r["status"] != "finished"]
    machines = dict.fromkeys(machine_of(r) for r in results if r.get("machine"))
    return Summary(spec, [t for t in tasks if t.groups], troubles, len(results), list(machines), interrupted)


def trouble(result: Result) -> str:
    """What went wrong with a run."""
    label = ", ".join(filter(None, [result["task"], result["optimizer"], brief(result["setting"])]))
    step = f" after {result['curve'][-1]['step']:,} steps" if result["curve"] else ""
    why = f": {result['error']}" if result["error"] else ""
    return f"{label}, seed {result['seed']} {result['status']}{step}{why}"


def machine_of(result: Result) -> str:
    """The machine of the run, in words."""
    m = result["machine"]
    if not isinstance(m, dict):
        return str(m)
    at_once = f", {m['processes']} runs at a time" if m.get("processes", 1) > 1 else ""
    return f"{m.get('cpu')}, {m.get('cores')} cores, {m.get('threads')} threads a run{at_once}, torch {m.get('torch')}"


def median(values: Sequence[float]) -> float:
    """The median, including infinite runs; infinite for no values."""
    return statistics.median(values) if values else math.inf


def _task(spec: Spec, entry: TaskEntry, results: Sequence[Result]) -> TaskSummary:
    names = [o.name for o in spec.optimizers]
    names += [n for n in dict.fromkeys(r["optimizer"] for r in results) if n not in names]
    groups = [g for g in (_group(spec, name, [r for r in results if r["optimizer"] == name]) for name in names) if g]
    figure = next((r["figure"] for r in results if r["figure"]), "figure")
    base = next((g for g in groups if g.optimizer == spec.baseline), None)
    pairs = []
    if base is not None:
        pairs = [
            paired(entry.name, g.optimizer, base.optimizer, g.finals, base.finals) for g in groups if g is not base
        ]
    return TaskSummary(entry, figure, groups, pairs, _reached(entry, groups))


def _group(spec: Spec, name: str, results: Sequence[Result]) -> Group | None:
    """The group with the setting that has the lowest figure on the first seed; that setting was chosen for the
    others."""
    if not results:
        return None
    first = min((r["seed"] for r in results), key=lambda s: spec.seeds.index(s) if s in spec.seeds else math.inf)
    on_first = [r for r in results if r["seed"] == first]
    setting = min(on_first, key=final)["setting"]
    return Group(name, setting, [r for r in results if r["setting"] == setting], len(on_first))


def _reached(entry: TaskEntry, groups: Sequence[Group]) -> list[Reached]:
    """For every optimizer's last figure on the same seed, and for the task's own targets."""
    targets: dict[str, Mapping[int, float]] = {}
    seeds = {r["seed"] for g in groups for r in g.results}
    for value in entry.targets:
        targets[f"{value:g}"] = dict.fromkeys(seeds, value)
    for g in groups:
        targets[f"{g.optimizer}'s last"] = {s: v for s, v in g.finals.items() if math.isfinite(v)}
    found = []
    for name, by_seed in targets.items():
        for g in groups:
            tried = [reach(r, by_seed[r["seed"]]) for r in g.results if r["seed"] in by_seed]
            got = [t for t in tried if t is not None]
            # The median over all seeds; those that did not reach the target count as infinite.
            lost = [math.inf] * (len(tried) - len(got))
            steps, seconds = (median([*(float(t[i]) for t in got), *lost]) for i in (0, 1))
            if tried:
                some = math.isfinite(steps)
                found.append(
                    Reached(g.optimizer, name, len(got), len(tried), *((steps, seconds) if some else (None, None)))
                )
    return found


def _row(g: Group) -> tuple[str, ...]:
    name = f"{g.optimizer} ({brief(g.setting)})" if g.tried > 1 else g.optimizer
    values = sorted(g.finals.values())
    done = g.finished
    last = [r["curve"][-1] for r in done]
    steps = f"{median([float(p['step']) for p in last]):,.0f}" if last else "–"
    pace = f"{median([1000 * p['seconds'] / max(1, p['step']) for p in last]):.1f}" if last else "–"
    runs = f"{len(done)}" if len(done) == len(g.results) else f"{len(done)} of {len(g.results)}"
    return name, runs, steps, pace, *(number(v) for v in (median(values), values[0], values[-1]))


def number(value: float | None) -> str:
    """Four digits; a dash if the value is not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def interval_words(interval: Interval | None) -> tuple[str, str]:
    """The mean, and its confidence interval."""
    if interval is None:
        return "–", "–"
    ends = "–" if math.isnan(interval.low) else f"{interval.low:.3g} to {interval.high:.3g}"
    return f"{interval.mean:.3g}", ends


def ratio_words(interval: Interval | None) -> tuple[str, str]:
    """The same for ratios, whose interval may be too wide to be useful."""
    mean, ends = interval_words(interval)
    wide = interval is not None and not math.isnan(interval.low) and not interval.tells
    return mean, "too wide to tell" if wide else ends


def to_dict(summary: Summary) -> dict[str, Any]:
    """The whole summary, with every run, ready for JSON."""
    return {
        "study": summary.spec.name,
        "title": summary.spec.title,
        "baseline": summary.spec.baseline,
        "seeds": summary.spec.seeds,
        "interrupted": summary.interrupted,
        "troubles": summary.troubles,
        "machines": summary.machines,
        "spec": summary.spec.text,
        "tasks": {
            t.entry.name: {
                **t.entry.budget.to_dict(),
                "figure": t.figure,
                "pairs": [_finite(asdict(p)) for p in t.pairs],
                "reached": [_finite(asdict(r)) for r in t.reached],
                "runs": [
                    {k: r.get(k) for k in ("optimizer", "setting", "seed", "status", "rejected", "curve", "measured")}
                    for g in t.groups
                    for r in g.results
                ],
            }
            for t in summary.tasks
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
