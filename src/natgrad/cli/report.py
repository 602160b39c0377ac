"""What the demo leaves behind: results.json, and report.html with its pictures inside."""

import base64
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from natgrad.cli.conditioning import RELATIVE_FLOOR, LayerConditioning
from natgrad.cli.progress import SUMMARY_HEADINGS, summary_rows
from natgrad.cli.tasks import Task
from natgrad.cli.training import SUBSET, Point, Run


@dataclass(frozen=True)
class Outcome:
    """All that the demo found out, as the report needs it."""

    task: Task
    seconds: float
    seed: int
    interrupted: bool
    runs: Sequence[Run]
    conditioned: Run
    conditioning: Sequence[LayerConditioning]


def describe_machine() -> dict[str, Any]:
    """Describe what the demo ran on, as far as it bears on the timings."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def write_results(outcome: Outcome, path: Path) -> None:
    """Write everything that was measured as JSON; numbers that are not finite become null."""
    results = {
        "task": outcome.task.name,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "interrupted": outcome.interrupted,
        "images": len(outcome.task.images),
        "curve_images": min(SUBSET, len(outcome.task.images)),
        "widths": outcome.task.widths,
        "machine": describe_machine(),
        "runs": [
            {
                "optimizer": run.optimizer,
                "settings": {"batch": run.batch, **run.settings},
                "curve": [_point(point) for point in run.curve],
                "final": _point(run.final),
                "rejected_steps": run.rejected,
                "diverged": run.diverged,
            }
            for run in outcome.runs
            if run.final is not None
        ],
        "condition_numbers": {
            "model": outcome.conditioned.optimizer,
            "images": min(SUBSET, len(outcome.task.images)),
            "relative_floor_per_input": RELATIVE_FLOOR,
            "layers": [asdict(layer) for layer in outcome.conditioning],
        },
    }
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_report(outcome: Outcome, pictures: dict[str, Path], path: Path) -> None:
    """Write the report as one page that needs nothing from anywhere else."""
    environment = Environment(loader=PackageLoader("natgrad.cli", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        outcome=outcome,
        done=[run for run in outcome.runs if run.final is not None],
        headings=SUMMARY_HEADINGS,
        rows=summary_rows(outcome.runs),
        machine=describe_machine(),
        pictures={name: base64.b64encode(picture.read_bytes()).decode() for name, picture in pictures.items()},
        sizes=[*outcome.task.widths, *reversed(outcome.task.widths[:-1])],
        subset=min(SUBSET, len(outcome.task.images)),
        floor=RELATIVE_FLOOR,
    )
    path.write_text(page, encoding="utf-8")


def _point(point: Point | None) -> dict[str, float | int | None] | None:
    if point is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in asdict(point).items()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
