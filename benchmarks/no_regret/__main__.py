"""Does natgrad lose anywhere? Twelve small tasks, the same weights and batches, so many seconds of the processor on one
thread for each optimizer: AdamW at the best of four rates, NewtonMuon and KFAC as they are.

The rate is the one with the lowest held-out loss on the first seed. Learning rates rise over a twentieth of the time,
then fall to zero; KFAC finds its own.

python -m benchmarks.no_regret --seconds 10 --seeds 3 --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.no_regret.runs import RATES, best_rate, perform, table
from benchmarks.no_regret.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor, for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/no_regret.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["task"], r["optimizer"], r["seed"]) for r in kept}

    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for seed in range(options.seeds):
            adamw = {t: [f"AdamW {lr:g}" for lr in RATES] if seed == 0 else [best_rate(kept, t)] for t in options.tasks}
            jobs = [(t, n, seed, options.seconds) for t in options.tasks for n in (*adamw[t], "NewtonMuon", "KFAC")]
            for found in pool.imap_unordered(perform, [job for job in jobs if job[:3] not in done]):
                kept.append(found)
                options.out.write_text(json.dumps(kept, indent=1))
                print({k: v for k, v in found.items() if v != ""}, flush=True)
    print(f"{machine()}; {options.seconds:g} s, {options.seeds} seeds, {options.processes} processes\n")
    print(table(sorted(kept, key=lambda r: (list(TASKS).index(r["task"]), r["optimizer"], r["seed"]))))


if __name__ == "__main__":
    main()
