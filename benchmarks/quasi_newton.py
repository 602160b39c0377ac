"""scipy's BFGS and L-BFGS on problems of `natgrad study pinns`, as peers of NaturalGradient's exact step.

python -m benchmarks.quasi_newton poisson2d-257 heat1d-257

They minimize the same objective from the same weights, on all points, in float64, on one thread. Seconds are of the
processor, without the evaluations of the error. BFGS keeps a dense matrix, as self-scaled Broyden methods do.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.machine import machine
from natgrad.study.pinns import objective, pinn
from natgrad.study.published import TARGETS

ENDLESS = {"gtol": 0.0, "maxiter": 10**9}
METHODS = {"BFGS": ENDLESS, "L-BFGS-B": {**ENDLESS, "ftol": 0.0, "maxcor": 50, "maxfun": 10**9}}
EVERY = 20
"""Iterations between two evaluations of the error."""


class Spent(Exception):
    """The time is over."""


def run(name: str, method: str, seed: int, seconds: float) -> tuple[dict[float, float], float, int]:
    """The seconds to each target, the lowest error, and the number of iterations."""
    task = pinn(name)
    model, batch = task.make_model(seed), next(task.batches(seed, task.batch))
    parameters = list(model.parameters())
    mean_square = torch.nn.MSELoss()
    first: dict[float, float] = {}
    lowest, iterations, start, evaluating = float("inf"), 0, time.process_time(), 0.0

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(theta), parameters)
        loss = objective(mean_square, model, *batch)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.item(), parameters_to_vector(gradients).numpy()

    def look(theta: np.ndarray) -> None:
        nonlocal lowest, iterations, evaluating
        spent = time.process_time() - start - evaluating
        iterations += 1
        if iterations % EVERY == 0 or spent > seconds:
            before = time.process_time()
            vector_to_parameters(torch.from_numpy(theta), parameters)
            lowest = min(lowest, task.evaluate(model)[task.figure])
            for target in TARGETS:
                if lowest <= target:
                    first.setdefault(target, spent)
            evaluating += time.process_time() - before
        if spent > seconds:
            raise Spent

    theta = parameters_to_vector(parameters).detach().numpy().copy()
    with contextlib.suppress(Spent):
        minimize(value, theta, jac=True, method=method, callback=look, options=METHODS[method])
    return first, lowest, iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="+")
    parser.add_argument("--seconds", type=float, default=35.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in options.problems:
        for method in METHODS:
            for seed in range(options.seeds):
                first, lowest, iterations = run(name, method, seed, options.seconds)
                times = ", ".join(f"{target:g} after {t:.1f} s" for target, t in first.items()) or "no target"
                print(f"{name} {method} seed {seed}: {times}; {lowest:.1e} in {iterations} iterations", flush=True)


if __name__ == "__main__":
    main()
