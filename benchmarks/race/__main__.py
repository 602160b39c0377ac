"""Optimizers against one another at equal time.

    python -m benchmarks.race run --task curves                       # every contestant, its whole grid, seed 0
    python -m benchmarks.race run --task curves --best --seeds 1 2    # each one's best setting so far, more seeds
    python -m benchmarks.race run --task language --only Muon "one-sided"
    python -m benchmarks.race export --task curves                    # weights and images, for peers elsewhere
    python -m benchmarks.race report                                  # tables and plots of all that was run

Every run of a seed starts from the same weights and sees the same data; one runs at a time. What was run is kept in
`--out`, one JSON a run, and not run again. Evaluation takes no part in the time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.race.contestants import CONTESTANTS, Contestant
from benchmarks.race.report import best_setting, load, write_report
from benchmarks.race.tasks import TASKS, Task

console = Console()
EVALUATIONS = 60


def race(task: Task, contestant: Contestant, setting: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """One run: `curve` has steps, seconds and what was evaluated."""
    model = task.make_model(seed)
    step, evaluation = contestant.make(model, task, setting)
    batches = task.batches(seed, setting.get("batch", task.batch))
    steps, spent, due = 0, 0.0, 0.0
    curve: list[dict[str, float]] = []
    with console.status(f"{task.name}: {contestant.name} {setting}, seed {seed}") as status:
        while True:
            done = spent >= seconds
            if done or spent >= due:
                with evaluation():
                    curve.append({"step": steps, "seconds": spent, **task.evaluate(model)})
                due = spent + seconds / EVALUATIONS
                status.update(
                    f"{task.name}: {contestant.name} {setting}, seed {seed}, {spent:.0f} of {seconds:.0f} s, "
                    f"{task.figure} {curve[-1][task.figure]:.4g}"
                )
            if done or not math.isfinite(curve[-1][task.figure]):
                break
            x, y = next(batches)
            start = time.perf_counter()
            step(x, y)
            spent += time.perf_counter() - start
            steps += 1
    return {
        "task": task.name,
        "figure": task.figure,
        "contestant": contestant.name,
        "setting": setting,
        "seed": seed,
        "seconds": seconds,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "curve": curve,
    }


def kept(
    out: Path, task: Task, contestant: Contestant, setting: dict[str, Any], seed: int, seconds: float
) -> tuple[dict[str, Any], bool]:
    """The run as it is kept in `out`, or raced now and kept; whether it was raced now."""
    label = " ".join(f"{k}={v}" for k, v in setting.items())
    path = out / f"{task.name} {seconds:g}s {contestant.name} {label} seed {seed}.json"
    new = not path.exists()
    if new:
        came = race(task, contestant, setting, seed, seconds)
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(came))
    return json.loads(path.read_text()), new


def run(options: argparse.Namespace) -> None:
    task = TASKS[options.task]()
    seconds = options.seconds or task.seconds
    for seed in options.seeds:
        for contestant in CONTESTANTS:
            if options.only and contestant.name not in options.only:
                continue
            settings = contestant.settings(task.name)
            if options.best:
                found = best_setting(load(options.out), task.name, contestant.name)
                settings = [found] if found is not None else []
            for setting in settings:
                came, new = kept(options.out, task, contestant, setting, seed, seconds)
                if not new:
                    continue
                label = " ".join(f"{k}={v}" for k, v in setting.items())
                last = came["curve"][-1]
                pace = 1e3 * last["seconds"] / max(1, last["step"])
                console.print(
                    f"{task.name:10} seed {seed}  {contestant.name:24} {label:34} {last['step']:6} steps "
                    f"{pace:7.1f} ms/step  {task.figure} {last[task.figure]:.4g}",
                    highlight=False,
                    soft_wrap=True,
                )


def export(options: argparse.Namespace) -> None:
    """The weights that an autoencoder starts from, and its images, as arrays: for `kfac_jax_peer.py`."""
    task = TASKS[options.task]()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        linears = [m for m in task.make_model(seed).modules() if isinstance(m, torch.nn.Linear)]
        arrays = {f"W{i}": m.weight.detach().numpy() for i, m in enumerate(linears)}
        arrays |= {f"b{i}": m.bias.detach().numpy() for i, m in enumerate(linears)}
        images = task.images
        if images is None:
            raise SystemExit(f"--task was {task.name}, which has no images to export; expected curves or mnist")
        about = {"task": task.name, "seed": seed, "weight_decay": task.weight_decay}
        np.savez(options.out / f"{task.name} seed {seed}.npz", images=images.numpy(), **arrays, **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "export", "report"])
    parser.add_argument("--task", choices=list(TASKS), default="curves")
    parser.add_argument("--seconds", type=float, help="of each run; each task has its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="contestants by name")
    parser.add_argument("--best", action="store_true", help="each contestant's best setting alone, of what was run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    {"run": run, "export": export, "report": lambda o: write_report(o.out)}[options.command](options)


if __name__ == "__main__":
    main()
