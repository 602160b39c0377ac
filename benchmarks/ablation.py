"""What each part of KFAC's recipe is worth: the defaults, and one departure from them at a time.

python -m benchmarks.ablation --task curves --seconds 40
python -m benchmarks.ablation --task mnist --seconds 60 --seeds 0 1 --only defaults "exact damping"
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.race.__main__ import race
from benchmarks.race.contestants import Contestant, kfac, second_order
from benchmarks.race.report import final
from benchmarks.race.tasks import TASKS

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "not centered": {"centered": False},
    "simple bias update": {"bias_update": "simple"},
    "exact damping": {"damping_style": "exact"},
    "EKFAC": {"structure": "ekfac"},
    "no momentum": {"momentum": 0.0},
    "no floor of the damping": {"damping_floor": 0.0},
    "a floor of 1": {"damping_floor": 1.0},
    "a floor of 0.1": {"damping_floor": 0.1},
    "Martens & Grosse's damping, (19/20)^5 every 5 steps": {"damping_decay": 0.95, "adapt_every": 5},
    "α and μ jointly at every step": {"adapt_every": 1},
    "statistics every 5, inverses every 5": {"statistics_every": 5, "inverses_every": 5},
    "statistics every 10 and inverses every 20 from the start": {"statistics_every": 10, "inverses_every": 20},
    "statistics on half of the batch": {"statistics_share": 0.5},
    "statistics on a quarter": {"statistics_share": 0.25},
    "averages of 0.95": {"decay": 0.95},
    "averages of 0.5": {"decay": 0.5},
    "full precision": {"matmul_precision": "highest"},
    "KL at most 1 nat": {"max_kl": 1.0},
    "KL at most 0.1 nats": {"max_kl": 0.1},
    "batch of 500": {"batch": 500},
    "batch of 2,000": {"batch": 2000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="curves")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="a file for the table, too")
    options = parser.parse_args()

    task = TASKS[options.task]()
    contestant = Contestant("KFAC", second_order(kfac))
    lines = [
        f"| {task.name}, {options.seconds:g} s | ms/step | {task.figure}, by seed | median |",
        "| --- | --- | --- | --- |",
    ]
    for name in options.only:
        runs = [race(task, contestant, VARIANTS[name], seed, options.seconds) for seed in options.seeds]
        values = [final(r) for r in runs]
        pace = statistics.median(1e3 * r["curve"][-1]["seconds"] / r["curve"][-1]["step"] for r in runs)
        by_seed = ", ".join(f"{v:.3g}" for v in values)
        lines.append(f"| {name} | {pace:.0f} | {by_seed} | {statistics.median(values):.3g} |")
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
