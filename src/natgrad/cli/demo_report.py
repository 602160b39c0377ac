"""The results of the demo, and the files that present them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from natgrad.cli.conditioning import LayerConditioning
from natgrad.cli.plots import plot_conditioning, plot_error, plot_reconstructions
from natgrad.cli.progress import SUMMARY_HEADINGS, calibration, summary_rows, too_few_steps
from natgrad.cli.report import finite, write_json, write_page
from natgrad.cli.training import Point, Run
from natgrad.study.measure import RELATIVE_FLOOR
from natgrad.study.task import Task
from natgrad.study.tasks import SUBSET


@dataclass(frozen=True)
class Outcome:
    """The results of the demo that the report needs."""

    task: Task
    seconds: float
    seed: int
    interrupted: bool
    runs: Sequence[Run]
    conditioned: Run
    conditioning: Sequence[LayerConditioning]


def write_all(outcome: Outcome, out: Path) -> Path:
    """Write results.json, the pictures and report.html to `out`; return the report's path."""
    images = outcome.task.images
    assert images is not None
    pictures = {name: out / f"{name}.png" for name in ("error", "reconstructions", "conditioning")}
    write_results(outcome, out / "results.json")
    plot_error(outcome.runs, pictures["error"])
    plot_reconstructions(outcome.runs, images, pictures["reconstructions"])
    plot_conditioning(outcome.conditioning, pictures["conditioning"])
    report = out / "report.html"
    write_page(
        "demo.html.jinja",
        pictures,
        report,
        outcome=outcome,
        done=[run for run in outcome.runs if run.final is not None],
        headings=SUMMARY_HEADINGS,
        rows=summary_rows(outcome.runs),
        calibration=calibration(outcome.runs),
        too_few=too_few_steps(outcome.runs, outcome.seconds),
        sizes=[*outcome.task.widths, *reversed(outcome.task.widths[:-1])],
        subset=min(SUBSET, len(images)),
        floor=RELATIVE_FLOOR,
    )
    return report


def write_results(outcome: Outcome, path: Path) -> None:
    """Write all measurements as JSON; numbers that are not finite become null."""
    assert outcome.task.images is not None
    results = {
        "task": outcome.task.name,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "clock": "processor time of all threads divided by their number, without the first step",
        "too_few_steps": bool(too_few_steps(outcome.runs, outcome.seconds)),
        "interrupted": outcome.interrupted,
        "images": len(outcome.task.images),
        "curve_images": min(SUBSET, len(outcome.task.images)),
        "widths": outcome.task.widths,
        "runs": [
            {
                "optimizer": run.optimizer,
                "settings": {"batch": run.batch, **run.settings},
                "curve": [_point(point) for point in run.curve],
                "final": _point(run.final),
                "calibration_seconds": run.first_step,
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
    write_json(results, path)


def _point(point: Point | None) -> dict[str, float | int | None] | None:
    return None if point is None else {name: finite(value) for name, value in asdict(point).items()}
