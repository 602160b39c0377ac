"""Does natgrad lose anywhere? Twelve small tasks, the same weights and batches, equal time on one thread for each
optimizer: AdamW at the best of four rates, NewtonMuon and KFAC as they are.

AdamW has as many steps as it takes in the given seconds, and at most `--most`. The others have as many fewer as a step
of theirs costs more. These costs are measured first, by turns with AdamW's, so that a busy machine does not change who
wins. The rate is the one with the lowest held-out loss on the first seed. Learning rates rise over a twentieth of the
steps, then fall to zero; KFAC finds its own.

python -m benchmarks.no_regret --seconds 6 --seeds 1
python -m benchmarks.no_regret --optimizers NewtonMuon 'NewtonMuon lr=0.04' --tasks 'autoencoder'
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.no_regret.runs import RATES, best_rate, costs, perform, table
from benchmarks.no_regret.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor, for AdamW's steps")
    parser.add_argument("--most", type=int, default=2000, help="AdamW steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--optimizers", nargs="+", default=["NewtonMuon", "KFAC"], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/no_regret.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"costs": {}, "runs": []}
    runs, every = kept["runs"], kept["costs"]
    done = {(r["task"], r["optimizer"], r["seed"]) for r in runs}
    print(f"{machine()}; AdamW's steps in {options.seconds:g} s, at most {options.most}; {options.seeds} seeds\n")

    def share(task: str, name: str) -> float:
        return 1.0 if name.startswith("AdamW") else float(every[task][name])

    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for seed in range(options.seeds):
            for task in options.tasks:
                if not set(options.optimizers) <= set(every.get(task, ())):
                    every[task] = pool.apply(costs, ((task, options.optimizers),)) | every.get(task, {})
                most = min(options.most, options.seconds / every[task]["AdamW"])
                adamw = [f"AdamW {lr:g}" for lr in RATES] if seed == 0 else [best_rate(runs, task)]
                jobs = [
                    (task, name, seed, max(1, round(most / share(task, name))))
                    for name in (*adamw, *options.optimizers)
                    if (task, name, seed) not in done
                ]
                for found in pool.imap_unordered(perform, jobs):
                    runs.append(found)
                    options.out.write_text(json.dumps(kept, indent=1))
                    print({k: v for k, v in found.items() if v != ""}, flush=True)
    order = list(TASKS)
    print(table(sorted(runs, key=lambda r: (order.index(r["task"]), r["seed"])), every, options.optimizers))


if __name__ == "__main__":
    main()
