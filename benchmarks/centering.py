"""Centered against not centered, and the exact bias update against the simple one: the same seeds, weights and batches.

python -m benchmarks.centering --tasks curves mnist classifier --seeds 0 1 2 3 4 5 6 7 8 9 --seconds 20

Of every pair of runs the ratio of their final figures is taken; the table has the geometric mean of the ratios over the
seeds, and its 95% confidence interval by Student's t on their logarithms. Runs are kept in `--out` and not run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.race.__main__ import kept
from benchmarks.race.contestants import Contestant, kfac, second_order
from benchmarks.race.report import final
from benchmarks.race.tasks import TASKS

VARIANTS: dict[str, dict[str, Any]] = {
    "centered": {},
    "not centered": {"centered": False},
    "not centered, as fresh as centered": {"centered": False, "statistics_every": 10, "inverses_every": 20},
    "centered, simple bias update": {"bias_update": "simple"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["curves", "mnist", "classifier"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/centering"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    contestant = Contestant("KFAC", second_order(kfac))
    lines = ["| task | | figure, median | over centered | 95% |", "| --- | --- | --- | --- | --- |"]
    for name in options.tasks:
        task = TASKS[name]()
        came: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for seed in options.seeds:
            for variant, setting in VARIANTS.items():
                run, _ = kept(options.out, task, contestant, setting, seed, options.seconds)
                came[variant].append(final(run))
        for variant, values in came.items():
            logs = [math.log(v / c) for v, c in zip(values, came["centered"], strict=True)]
            lines.append(f"| {name} | {variant} | {sorted(values)[len(values) // 2]:.3g} | {interval(logs)} |")
            print(lines[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")


def interval(logs: list[float]) -> str:
    """The geometric mean of the ratios, and between what it is with 95% confidence."""
    if len(logs) < 2 or not any(logs):
        return "1 | "
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return f"{math.exp(sum(logs) / len(logs)):.2f} | {math.exp(low):.2f} to {math.exp(high):.2f}"


if __name__ == "__main__":
    main()
