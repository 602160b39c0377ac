"""The exact step in float32 beside float64: `poisson2d-257`, the same seeds and points.

python -m benchmarks.exact_precision [--steps 80] [--seeds 3]

Parameters, points and the forward pass have the dtype; the matrix of the step is float64 in both cases. Prints the
lowest error so far after a tenth, a quarter, half and all of the steps.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

import natgrad
from benchmarks.machine import machine
from natgrad.study.pinns import SETTINGS, batches, objective, pinn

NAME = "poisson2d-257"


def errors(seed: int, steps: int, dtype: torch.dtype) -> list[float]:
    """The error after each step."""
    task = pinn(NAME)
    model = task.make_model(seed).to(dtype)
    x, y = ([part.to(dtype) for part in parts] for parts in next(batches(SETTINGS[NAME], seed)))
    opt = natgrad.NaturalGradient(model, nn.MSELoss())
    found = []
    for _ in range(steps):
        loss = objective(opt.loss, model, x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        found.append(task.evaluate(model.double())["error"])
        model.to(dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact step in float32 beside float64.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    marks = [options.steps // k for k in (10, 4, 2, 1)]
    print(f"{NAME}; {machine()}\n{'dtype':9}{'seed':>5}" + "".join(f"{f'{n} steps':>12}" for n in marks))
    for dtype in (torch.float64, torch.float32):
        for seed in range(options.seeds):
            found = errors(seed, options.steps, dtype)
            cells = "".join(f"{min(found[:n]):12.1e}" for n in marks)
            print(f"{str(dtype).removeprefix('torch.'):9}{seed:5}{cells}", flush=True)


if __name__ == "__main__":
    main()
