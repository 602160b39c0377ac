"""CURVES with batches of one size, and with batches that grow, for the same time.

python -m benchmarks.growing --seeds 0 1
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from torch import Tensor

from benchmarks.machine import machine
from natgrad import GrowingBatches
from natgrad.study.optimizers import OPTIMIZERS
from natgrad.study.tasks import TASKS
from natgrad.study.training import Budget, moments

SIZES = {"250": (250, 250), "1000": (1000, 1000), "4000": (4000, 4000), "250 to 4000": (250, 4000)}


def batches(images: Tensor, first: int, last: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    sampler = GrowingBatches(images, first, last, steps)
    while True:
        for chosen in sampler:
            x = images[chosen]
            yield x, x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=500, help="after which batches have their last size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    task = TASKS["curves"]()
    print(f"{machine()}; {options.seconds:g} s\n\n| batch | seed | steps | squared error |\n| --- | --- | --- | --- |")
    for seed in options.seeds:
        for name, (first, last) in SIZES.items():
            model = task.make_model(seed)
            stepper = OPTIMIZERS["KFAC"].make(model, task, {})
            source = batches(task.images, first, last, options.steps)
            for moment in moments(stepper.step, source, Budget(seconds=options.seconds), 1):
                steps = moment.step
            print(f"| {name} | {seed} | {steps} | {task.evaluate(model)['squared error']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
