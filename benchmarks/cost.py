"""What a K-FAC step costs, in AdamW steps of the same model and batch, measured in turns in one run.

python benchmarks/cost.py
python benchmarks/cost.py --profile      # and where the time goes
"""

import argparse
import cProfile
import platform
import pstats
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import natgrad
from natgrad.cli.tasks import make_autoencoder, make_task
from natgrad.cli.training import WEIGHT_COST, shuffled_batches

BLOCK = 40  # a multiple of all intervals between statistics, inverses and adaptations


def stepper(opt: torch.optim.Optimizer, model: nn.Module, loss: Callable, images: torch.Tensor, batch: int):
    batches = shuffled_batches(images, batch, seed=0)

    def step() -> None:
        x = next(batches)
        value = loss(model(x), x) / len(x)
        opt.zero_grad()
        value.backward()
        opt.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="curves", choices=["curves", "mnist"])
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=6, help=f"blocks of {BLOCK} steps of each")
    parser.add_argument("--uncentered", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    task = make_task(options.task, seed=0)
    module = nn.BCEWithLogitsLoss(reduction="sum")
    first, second = (make_autoencoder(task.widths, seed=0) for _ in range(2))
    adamw = torch.optim.AdamW(first.parameters(), lr=1e-3)
    kfac = natgrad.KFAC(second, module, weight_decay=WEIGHT_COST, centered=not options.uncentered)
    steps = {
        "AdamW": stepper(adamw, first, module, task.images, options.batch),
        "KFAC": stepper(kfac, second, kfac.loss, task.images, options.batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(options.blocks + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(BLOCK):
                step()
            if block > 0:  # the first warms up
                times[name].append((time.perf_counter() - start) / BLOCK)
    ratios = [k / a for a, k in zip(times["AdamW"], times["KFAC"], strict=True)]
    for name, values in times.items():
        print(f"{name:6} {1e3 * statistics.median(values):7.1f} ms/step")
    print(
        f"one KFAC step is {statistics.median(ratios):.2f} AdamW steps ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{options.task}, batch {options.batch}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if options.profile:
        profile = cProfile.Profile()
        with profile:
            for _ in range(BLOCK):
                steps["KFAC"]()
        pstats.Stats(profile).sort_stats("cumulative").print_stats("natgrad|run_backward|linear|cholesky", 30)


if __name__ == "__main__":
    main()
