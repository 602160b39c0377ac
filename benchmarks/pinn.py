"""A physics-informed network for Poisson's equation, trained by the exact natural gradient.

    −Δu = f  on the unit square,  u = 0 on its boundary,  u* = sin(πx) sin(πy)

python benchmarks/pinn.py
python benchmarks/pinn.py --compare      # and Adam and L-BFGS, for as long as the natural gradient took
"""

import argparse
import math
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import natgrad
from natgrad.study.poisson import PoissonResidual, collocation_points, relative_error

ROW = "{:>7} {:>9.2f} {:>11.3e} {:>12.3e} {:>11}"


def train(
    name: str, model: PoissonResidual, step: Callable[[], tuple[float, str]], stop: Callable[[int, float, float], bool]
) -> float:
    """Takes steps until `stop(steps, seconds, error)`, prints the way there, returns the seconds of the steps."""
    print(f"\n{name}\n{'step':>7} {'seconds':>9} {'loss':>11} {'relative L2':>12} {'damping':>11}")
    steps, seconds, next_print = 0, 0.0, 1
    while True:
        start = time.perf_counter()
        loss, damping = step()
        seconds += time.perf_counter() - start
        steps += 1
        if steps % 5 and steps < next_print:
            continue
        error = relative_error(model)
        done = stop(steps, seconds, error)
        if done or steps >= next_print:
            print(ROW.format(steps, seconds, loss, error, damping), flush=True)
            next_print = math.ceil(1.5 * steps)
        if done:
            return seconds


def natural_gradient(model: PoissonResidual, points: Tensor) -> Callable[[], tuple[float, str]]:
    opt = natgrad.NaturalGradient(model, nn.MSELoss())
    target = torch.zeros(len(points), 1, dtype=points.dtype)

    def step() -> tuple[float, str]:
        loss = opt.loss(model(points), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item(), f"{opt.diagnostics['damping']:.2e}"

    return step


def by_closure(opt: torch.optim.Optimizer, model: PoissonResidual, points: Tensor) -> Callable[[], tuple[float, str]]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(points).square().mean()
        loss.backward()
        return loss

    return lambda: (opt.step(closure).item(), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=1e-5, help="relative L2 error to stop at")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to stop at")
    parser.add_argument("--interior", type=int, default=20, help="points inside, along each axis")
    parser.add_argument("--boundary", type=int, default=20, help="points on each side")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()

    def fresh() -> PoissonResidual:
        torch.manual_seed(options.seed)
        return PoissonResidual()

    points = collocation_points(options.interior, options.boundary)
    model = fresh()
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(points)} points, float64, seed {options.seed}; "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    seconds = train(
        "NaturalGradient",
        model,
        natural_gradient(model, points),
        lambda _, seconds, error: error < options.target or seconds > options.limit,
    )
    if options.compare:
        for name, make in (
            ("Adam, lr 1e-3", lambda p: torch.optim.Adam(p, lr=1e-3)),
            ("L-BFGS, strong Wolfe", lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", history_size=50)),
        ):
            model = fresh()
            train(name, model, by_closure(make(model.parameters()), model, points), lambda _, s, __: s > seconds)


if __name__ == "__main__":
    main()
