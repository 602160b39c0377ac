"""The runs saved in a folder, one JSON file each, and the runs that are still missing."""

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
    """The name that identifies a run within its study."""
    return json.dumps([job.task.name, job.optimizer, job.setting, job.seed], sort_keys=True)


def path_of(out: Path, job: Job) -> Path:
    """The path of the run's file."""
    words = re.sub(r"[^\w.,=+ -]+", "-", f"{job.task.name} {job.optimizer}", flags=re.ASCII)[:80]
    return out / "runs" / f"{words} {hashlib.sha256(key(job).encode()).hexdigest()[:8]} seed {job.seed}.json"


def keep(out: Path, job: Job, result: Result) -> None:
    """Writes the run's file, completely or not at all."""
    path = path_of(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [json.dumps(result, allow_nan=False).encode()])


def kept(out: Path, spec: Spec, replace: bool = False, remark: Callable[[str], object] = lambda words: None) -> Results:
    """The saved runs of this study.

    Args:
        replace: delete the saved runs that no longer match the spec.
        remark: called with a line about each damaged run; such a run counts as missing.

    Raises:
        UserError: if there are runs that no longer match, and `replace` is not set.
    """
    results: Results = {}
    for job in jobs(spec):
        path = path_of(out, job)
        if not path.exists():
            continue
        found = _read(path)
        if found is None or not is_run(found) or not _is_own(found, job):
            remark(f"{path} is damaged, or holds another run; {job.label} is run again.")
            continue
        differing = _difference(found["what"], json.loads(json.dumps(job.what())))
        if not differing:
            results[key(job)] = found
        elif replace:
            path.unlink()
        else:
            raise UserError(
                f"--out was {str(out)!r}, where the saved run of {job.label} has {differing}; expected runs of this "
                "spec; choose another folder, or use --replace to repeat the runs that the spec has changed."
            )
    return results


def others(out: Path, spec: Spec) -> list[Result]:
    """Runs of other programs on the study's tasks, from the folder `OUT/others`, in the same form.

    Raises:
        UserError: if a file there is not in that form.
    """
    wanted = {"task", "optimizer", "setting", "seed", "figure", "curve"}
    names = {task.name for task in spec.tasks}
    found = []
    for path in sorted((out / "others").glob("*.json")):
        result = _read(path)
        if result is None or not wanted <= result.keys() or not is_run(_completed(result)):
            raise UserError(f"{path} is not a run; expected JSON with {', '.join(sorted(wanted))}; remove the file.")
        if result["task"] in names:
            found.append(_completed(result))
    return found


def jobs(spec: Spec) -> Iterator[Job]:
    """Every run that the study may need, seed by seed."""
    for seed in spec.seeds:
        for task in spec.tasks:
            for optimizer in spec.optimizers:
                for setting in optimizer.settings.get(task.name, ()):
                    yield spec.job(task, optimizer, setting, seed)


def chosen(
    spec: Spec, task: TaskEntry, optimizer: OptimizerEntry, results: Mapping[str, Result]
) -> dict[str, Any] | None:
    """The setting with the lowest last figure on the first seed; None until that is known."""
    settings = optimizer.settings.get(task.name, ())
    if len(settings) < 2:
        return settings[0] if settings else None
    keys = [key(spec.job(task, optimizer, setting, spec.seeds[0])) for setting in settings]
    if not all(k in results for k in keys):
        return None
    return min(zip(settings, keys, strict=True), key=lambda pair: final(results[pair[1]]))[0]


def pending(spec: Spec, results: Mapping[str, Result]) -> list[Job]:
    """The runs that can start now: all settings on the first seed, the chosen setting on the others."""
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
    """Whether the result is for this job, in everything that `perform` records about the job."""
    whose = json.dumps([result["task"], result["optimizer"], result["setting"], result["seed"]], sort_keys=True)
    whole = isinstance(result.get("what"), dict) and isinstance(result.get("machine"), dict)
    return whole and whose == key(job) and (bool(result["curve"]) or result["status"] != "finished")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first key that differs, in words; empty if none does."""
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            was, now = (json.dumps(values.get(name)) for values in (old, new))
            if name == "source":
                return "another text of its module"
            return f"{name} = {was}, but the spec has {now}"
    return ""
