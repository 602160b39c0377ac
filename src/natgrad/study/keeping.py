"""The runs that a folder keeps, one JSON file each, and which are yet to be run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from natgrad.checks.errors import UserError
from natgrad.checks.files import write_whole
from natgrad.study.form import is_run
from natgrad.study.run import Result
from natgrad.study.spec import Job, OptimizerEntry, Spec, TaskEntry
from natgrad.study.statistics import final

Results = dict[str, Result]
"""By the run's key."""


def key(job: Job) -> str:
    """What tells a run from the study's others."""
    return json.dumps([job.task.name, job.optimizer, job.setting, job.seed], sort_keys=True)


def path_of(out: Path, job: Job) -> Path:
    """Where the run is kept."""
    words = re.sub(r"[^\w.,=+ -]+", "-", f"{job.task.name} {job.optimizer}", flags=re.ASCII)[:80]
    return out / "runs" / f"{words} {hashlib.sha256(key(job).encode()).hexdigest()[:8]} seed {job.seed}.json"


def keep(out: Path, job: Job, result: Result) -> None:
    """Writes the run, whole or not at all."""
    path = path_of(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [json.dumps(result, allow_nan=False).encode()])


def kept(out: Path, spec: Spec, replace: bool = False, remark: Callable[[str], object] = lambda words: None) -> Results:
    """The runs of this study that are there.

    Args:
        replace: delete those that the spec has made wrong since.
        remark: called with a line about each run that is damaged, which is as if it were not there.

    Raises:
        UserError: if there are such and they are not to be replaced.
    """
    results: Results = {}
    for job in jobs(spec):
        path = path_of(out, job)
        if not path.exists():
            continue
        found = _read(path)
        if found is None or not is_run(found) or not _is_own(found, job):
            remark(f"{path} is damaged, or is not that run; {job.label} is run again.")
            continue
        differing = _difference(found["what"], json.loads(json.dumps(job.what())))
        if not differing:
            results[key(job)] = found
        elif replace:
            path.unlink()
        else:
            raise UserError(
                f"--out was {str(out)!r}, where the run of {job.label} is kept with {differing}; expected runs of this "
                "spec; give another folder, or --replace to run anew what the spec has changed."
            )
    return results


def others(out: Path, spec: Spec) -> list[Result]:
    """Runs of other programs on the study's tasks, which were put into `OUT/others`, in the same form.

    Raises:
        UserError: if a file there is not in that form.
    """
    wanted = {"task", "optimizer", "setting", "seed", "figure", "curve"}
    names = {task.name for task in spec.tasks}
    found = []
    for path in sorted((out / "others").glob("*.json")):
        result = _read(path)
        if result is None or not wanted <= result.keys() or not is_run(_completed(result)):
            raise UserError(f"{path} is no run; expected JSON with {', '.join(sorted(wanted))}; take it away.")
        if result["task"] in names:
            found.append(_completed(result))
    return found


def jobs(spec: Spec) -> Iterator[Job]:
    """Every run that the study may come to, the seeds one after the other."""
    for seed in spec.seeds:
        for task in spec.tasks:
            for optimizer in spec.optimizers:
                for setting in optimizer.settings.get(task.name, ()):
                    yield spec.job(task, optimizer, setting, seed)


def chosen(
    spec: Spec, task: TaskEntry, optimizer: OptimizerEntry, results: Mapping[str, Result]
) -> dict[str, Any] | None:
    """The setting with the lowest last figure on the first seed; None as long as that is not known."""
    settings = optimizer.settings.get(task.name, ())
    if len(settings) < 2:
        return settings[0] if settings else None
    keys = [key(spec.job(task, optimizer, setting, spec.seeds[0])) for setting in settings]
    if not all(k in results for k in keys):
        return None
    return min(zip(settings, keys, strict=True), key=lambda pair: final(results[pair[1]]))[0]


def pending(spec: Spec, results: Mapping[str, Result]) -> list[Job]:
    """What can be run now: on the first seed every setting, on the others the chosen one."""
    best = {(t.name, o.name): chosen(spec, t, o, results) for t in spec.tasks for o in spec.optimizers}
    return [
        job
        for job in jobs(spec)
        if key(job) not in results and (job.seed == spec.seeds[0] or job.setting == best[job.task.name, job.optimizer])
    ]


def _read(path: Path) -> Result | None:
    """The file's dictionary; None if it cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _no_number(words: str) -> float:
    raise ValueError(f"{words} is no number of JSON; expected a finite one")


def _completed(result: Result) -> Result:
    return {"status": "finished", "error": "", "rejected": 0, "measured": [], **result}


def _is_own(result: Result, job: Job) -> bool:
    """Whether it is the job's, with all that `perform` says of it."""
    whose = json.dumps([result["task"], result["optimizer"], result["setting"], result["seed"]], sort_keys=True)
    whole = isinstance(result.get("what"), dict) and isinstance(result.get("machine"), dict)
    return whole and whose == key(job) and (bool(result["curve"]) or result["status"] != "finished")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first key in which the two are not the same, in words; empty where they are."""
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            was, now = (json.dumps(values.get(name)) for values in (old, new))
            if name == "source":
                return "another text of its module"
            return f"{name} = {was} where the spec has {now}"
    return ""
