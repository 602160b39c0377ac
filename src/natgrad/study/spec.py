"""A study: what to run, as read from its TOML file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from natgrad.checks.errors import UserError
from natgrad.report.words import shortened
from natgrad.study.optimizers import OPTIMIZERS, Kind, check
from natgrad.study.own_task import digest
from natgrad.study.reading import Table, near, parse, read_text, shown
from natgrad.study.tasks import TASKS
from natgrad.study.training import CLOCKS, CONSTANT, Budget, Schedule

SHIPPED = ("centering", "residual", "peers", "language", "pinns", "pinns-long")
Setting = dict[str, Any]


@dataclass(frozen=True)
class TaskEntry:
    """A task and its name in the study. `use` is the task's own name, or `MODULE:FUNCTION`."""

    name: str
    use: str
    budget: Budget
    batch: int | None = None
    targets: tuple[float, ...] = ()


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer and its name in the study, with the settings to try on each task. It does not run on tasks that are
    not listed."""

    name: str
    use: str
    settings: Mapping[str, tuple[Setting, ...]]


@dataclass(frozen=True)
class Measure:
    """What to measure about the model, at `points` moments of a run from the first to the last."""

    residual: bool = False
    points: int = 4
    examples: int = 500
    samples: int = 8
    permutations: int = 100


@dataclass(frozen=True)
class Job:
    """One run."""

    task: TaskEntry
    optimizer: str
    use: str
    setting: Setting
    seed: int
    evaluations: int
    threads: int
    measure: Measure
    clock: str = "wall"
    schedule: Schedule = CONSTANT

    @property
    def used_schedule(self) -> Schedule:
        """The study's schedule, or with the cooldown of the optimizer's own setting."""
        return self.schedule.of(self.setting)

    @property
    def label(self) -> str:
        words = [self.task.name, self.optimizer]
        if self.setting:
            words.append(brief(self.setting))
        return f"{', '.join(words)}, seed {self.seed}"

    def what(self) -> dict[str, Any]:
        """Everything that the result depends on, ready for JSON. A saved run with another `what` is not this run."""
        measured = {k: v for k, v in vars(self.measure).items() if self.measure.residual}
        own = {"source": digest(self.task.use)} if ":" in self.task.use else {}
        return {
            "task": self.task.use,
            "batch": self.task.batch,
            **self.task.budget.to_dict(),
            "optimizer": self.use,
            "setting": self.setting,
            "seed": self.seed,
            "evaluations": self.evaluations,
            "threads": self.threads,
            "measure": measured,
            **({} if self.clock == "wall" else {"clock": self.clock}),
            **({"schedule": vars(self.schedule)} if self.schedule != CONSTANT else {}),
            **own,
        }


@dataclass(frozen=True)
class Spec:
    """Optimizers x tasks x seeds."""

    name: str
    title: str
    text: str
    tasks: tuple[TaskEntry, ...]
    optimizers: tuple[OptimizerEntry, ...]
    seeds: tuple[int, ...]
    baseline: str
    evaluations: int
    threads: int
    measure: Measure
    clock: str = "wall"
    schedule: Schedule = CONSTANT

    def job(self, task: TaskEntry, optimizer: OptimizerEntry, setting: Setting, seed: int) -> Job:
        how = self.evaluations, self.threads, self.measure, self.clock, self.schedule
        return Job(task, optimizer.name, optimizer.use, setting, seed, *how)

    @property
    def in_seconds(self) -> bool:
        """Whether any budget is in seconds."""
        return any(task.budget.seconds is not None for task in self.tasks)


def brief(setting: Mapping[str, Any]) -> str:
    """The options, on one line."""
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={shown(v)}" for k, v in setting.items())


def find_spec(given: str) -> tuple[str, str, str]:
    """The name of the study, the file's name for messages, and the text of the file.

    Raises:
        UserError: if there is no such file and no such shipped study.
    """
    if given in SHIPPED:
        file = resources.files("natgrad.study").joinpath("specs").joinpath(f"{given}.toml")
        return given, f"{given}.toml", file.read_text(encoding="utf-8")
    path = Path(given)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is neither a file nor a study that comes with natgrad"
        raise UserError(f"SPEC was {given!r}, which {what}; expected a TOML file; {near(given, SHIPPED)}")
    return path.stem, str(path), read_text(path)


def load_spec(given: str) -> Spec:
    """The study from the path of a TOML file, or from the name of a shipped study.

    Raises:
        UserError: for an error in the file; the message names the file and the key.
    """
    name, file, text = find_spec(given)
    return read_spec(name, file, text)


def read_spec(name: str, file: str, text: str) -> Spec:
    """The study that the text describes.

    Raises:
        UserError: for an error in the text; the message names the file and the key.
    """
    top = Table(file, "", parse(text, file))
    title = top.text("title", name)
    seeds = _seeds(top)
    budget = _budget(top)
    evaluations = top.whole("evaluations", 40, 2)
    threads = top.whole("threads", 1)
    clock = top.text("clock", "wall")
    if clock not in CLOCKS:
        raise top.fail("clock", shown(clock), " or ".join(map(repr, CLOCKS)), near(clock, CLOCKS))
    batch = top.whole("batch", None)
    measure = _measure(top.table("measure"))
    schedule = _schedule(top.table("schedule"))
    tasks = _tasks(top, budget, batch)
    optimizers = _optimizers(top, tasks, schedule)
    names = [o.name for o in optimizers]
    baseline = top.text("baseline", names[0])
    if baseline not in names:
        raise top.fail("baseline", shown(baseline), "the name of one of the optimizers", near(baseline, names))
    top.finish()
    for task in tasks:
        if not any(o.settings.get(task.name) for o in optimizers):
            raise top.fail(f"tasks.{task.name}", "a task that no optimizer runs on", "at least one", "leave it out.")
    return Spec(name, title, text, tasks, optimizers, seeds, baseline, evaluations, threads, measure, clock, schedule)


def _seeds(top: Table) -> tuple[int, ...]:
    value = top.take("seeds", 3)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    good = isinstance(value, list) and value and all(type(v) is int and 0 <= v < 2**63 for v in value)
    if not good or len(set(value)) < len(value):
        raise top.fail("seeds", shown(value), "how many, or a list of different ones", "write, say, seeds = 3.")
    return tuple(value)


def _budget(table: Table) -> Budget | None:
    steps, seconds = table.whole("steps", None), table.number("seconds", None)
    if steps is not None and seconds is not None:
        raise table.fail("steps", "given together with seconds", "one of the two", "leave out one of them.")
    if steps is None and seconds is None:
        return None
    return Budget(steps, None if seconds is None else float(seconds))


def _measure(table: Table) -> Measure:
    d = Measure()
    found = Measure(
        table.truth("residual", d.residual),
        table.whole("points", d.points, 2),
        table.whole("examples", d.examples, 8),
        table.whole("samples", d.samples),
        table.whole("permutations", d.permutations, 0),
    )
    table.finish()
    return found


def _schedule(table: Table) -> Schedule:
    shares = {}
    for key in ("warmup", "cooldown"):
        shares[key] = float(table.number(key, 0.0))
        if shares[key] > 1:
            raise table.fail(key, f"{shares[key]:g}", "a share of the budget, at most 1", f"write, say, {key} = 0.1.")
    table.finish()
    return Schedule(**shares)


def _tasks(top: Table, budget: Budget | None, batch: int | None) -> tuple[TaskEntry, ...]:
    entries = []
    for name, table in top.names("tasks", f"tasks: {', '.join(TASKS)}", 'write, say, tasks = ["curves"].').items():
        use = table.text("use", name)
        if use not in TASKS and ":" not in use:
            raise table.fail(
                "use" if use != name else "",
                f"{shortened(use)!r}, which is no task",
                "a task's name, or MODULE:FUNCTION",
                near(use, TASKS),
            )
        its_budget = _budget(table) or budget
        if its_budget is None:
            for place in (table, top):
                place.check_spelling("steps", "seconds")
            raise table.fail("", "without a budget", "steps or seconds", "write, say, steps = 200 at the top.")
        targets = table.take("targets", [])
        if not isinstance(targets, list) or not all(type(t) in (int, float) and math.isfinite(t) for t in targets):
            raise table.fail("targets", shown(targets), "a list of numbers", "write, say, targets = [10, 5].")
        entries.append(TaskEntry(name, use, its_budget, table.whole("batch", batch), tuple(map(float, targets))))
        table.finish()
    return tuple(entries)


def _optimizers(top: Table, tasks: tuple[TaskEntry, ...], schedule: Schedule) -> tuple[OptimizerEntry, ...]:
    expected, mend = f"optimizers: {', '.join(OPTIMIZERS)}", 'write, say, optimizers = ["Adam", "KFAC"].'
    entries = top.names("optimizers", expected, mend).items()
    return tuple(_optimizer(name, table, tasks, schedule) for name, table in entries)


def _optimizer(name: str, table: Table, tasks: tuple[TaskEntry, ...], schedule: Schedule) -> OptimizerEntry:
    use = table.text("use", name)
    if use not in OPTIMIZERS:
        mend = near(use, OPTIMIZERS)
        if use == name:
            mend += ' Under a name of its own it has a key, say, use = "KFAC".'
        raise table.fail(
            "use" if use != name else "", f"{shortened(use)!r}, which is no optimizer", "an optimizer's name", mend
        )
    task_names = [t.name for t in tasks]
    on = table.table("on")
    overrides = {task: on.table(task).rest() for task in on.names_left()}
    for task in overrides:
        if task not in task_names:
            raise table.fail(f"on.{task}", "about no task of the study", "one of its tasks", near(task, task_names))
    only = table.take("tasks", task_names)
    if not isinstance(only, list) or not only or not all(isinstance(t, str) for t in only):
        raise table.fail("tasks", shown(only), "a list of names of tasks", f'write, say, tasks = ["{task_names[0]}"].')
    for task in only:
        if task not in task_names:
            raise table.fail("tasks", shown(task), "names of the study's tasks", near(task, task_names))
    options = table.rest()
    settings = {}
    for task in only:
        where = f"{table.where}.on.{task}" if task in overrides else table.where
        settings[task] = _grid(Table(table.file, where, {**options, **overrides.get(task, {})}), use, schedule)
    return OptimizerEntry(name, use, settings)


def _grid(table: Table, use: str, schedule: Schedule) -> tuple[Setting, ...]:
    """Every combination of the options; an option with several values is a list. Each is checked on a small model."""
    kind = OPTIMIZERS[use]
    options = table.rest()
    names = kind.options()
    several: list[list[tuple[str, Any]]] = []
    for key, value in options.items():
        if key not in names:
            raise UserError(
                f"{table.file}: {use} has no option {key!r}, which is in [{table.where}]; {near(key, names)}"
            )
        if value == []:
            raise table.fail(key, "an empty list", "at least one value", "give one, or leave the key out.")
        if not _is_plain(value):
            raise table.fail(key, shown(value), "text, true or false, or finite numbers", "mend it.")
        several.append([(key, v) for v in (value if isinstance(value, list) else [value])])
        _check_types(table, kind, key, [v for _, v in several[-1]])
    settings = tuple(dict(chosen) for chosen in itertools.product(*several))
    for setting in settings:
        try:
            stepper = check(use, setting)
        except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            what = brief(setting) or "nothing set"
            raise UserError(
                f"{table.file}: [{table.where}] with {what} is refused by {use}: {said}; give it another value."
            ) from error
        rates = [group["lr"] for opt in stepper.optimizers for group in opt.param_groups]
        if None in rates and schedule.of(setting) != CONSTANT:
            raise UserError(
                f"{table.file}: [{table.where}] has a schedule or cooldown, and {use} adapts its step size; expected a "
                "number for lr; write, say, lr = 0.1."
            )
    return settings


def _is_plain(value: Any) -> bool:
    """Whether a saved run can represent it: not a date, and not infinity."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _check_types(table: Table, kind: Kind, key: str, values: list[Any]) -> None:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
    types = kind.types(key) if key != "batch" else (int,)
    for value in values:
        if types and type(value) not in types:
            expected = " or ".join(words[t] for t in dict.fromkeys(types) if not (t is int and float in types))
            raise table.fail(key, shown(value), f"{expected}, or a list of such to try", "mend it.")
        if key == "length" and not 0 < value <= 1:
            raise table.fail(
                key, shown(value), "a share of the budget, above 0 and at most 1", "write, say, length = 0.8."
            )
        if key == "cooldown" and not 0 <= value <= 1:
            raise table.fail(key, shown(value), "a share of the budget, at most 1", "write, say, cooldown = 0.5.")
        if key == "batch" and value < 1:
            raise table.fail(key, shown(value), "a whole number of at least 1", "write, say, batch = 250.")
