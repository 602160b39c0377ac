"""Features with different units: what becomes of training if nobody standardizes them.

A perceptron 8-64-64-1 learns a smooth function of eight normal features, multiplied by `1, 10, ..., 10^k, 1, 10, ...`
(3,200 examples, batch 128). `divided`: the columns of the initial weight are divided by the units, so that the initial
function is that of standardized features. Held-out squared errors. AdamW and NewtonMuon have the best of some rates.

python -m benchmarks.units
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine

Make = Callable[[nn.Module], Any]
WAYS: dict[str, list[Make]] = {
    "KFAC": [lambda m: natgrad.KFAC(m, nn.MSELoss())],
    "KFAC, input_scales=False": [lambda m: natgrad.KFAC(m, nn.MSELoss(), input_scales=False)],
    "NewtonMuon": [lambda m, lr=lr: natgrad.NewtonMuon(m, lr=lr) for lr in (0.01, 0.03, 0.1)],
    "AdamW": [lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)],
}
STEPS = {"KFAC": 400, "KFAC, input_scales=False": 400, "NewtonMuon": 800, "AdamW": 2400}
"""About equal time: a step of KFAC takes six steps of AdamW here, one of NewtonMuon three."""
TRAINED = 3200


def data(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.sin(x[:, 0] * x[:, 1]) + x[:, 2] + 0.5 * x[:, 3].square() + 0.1 * x[:, 4].sign()
    return x, ((y - y.mean()) / y.std())[:, None]


def trained(name: str, make: Make, power: int, divided: bool, seed: int) -> float:
    (x, y), units = data(seed), 10.0 ** (torch.arange(8) % (power + 1))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    if divided:
        with torch.no_grad():
            next(model.parameters()).div_(units)
    x, opt, source = x * units, make(model), torch.Generator().manual_seed(seed)
    steps, adaptive = STEPS[name], name.startswith("KFAC")
    falling = None if adaptive else torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, steps)
    loss_of = opt.loss if adaptive else nn.functional.mse_loss
    for _ in range(steps):
        own = torch.randint(TRAINED, (128,), generator=source)
        opt.zero_grad()
        loss_of(model(x[own]), y[own]).backward()
        opt.step()
        if falling is not None:
            falling.step()
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x[TRAINED:]), y[TRAINED:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--powers", type=int, nargs="+", default=[0, 1, 2, 3, 4, 6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    print(f"{machine()}\n\n| largest unit | initial weight | {' | '.join(WAYS)} |\n" + "| --- " * (2 + len(WAYS)) + "|")
    for power in options.powers:
        for divided in (False, True) if power else (False,):
            cells = []
            for name, makes in WAYS.items():
                runs = [[trained(name, make, power, divided, seed) for seed in options.seeds] for make in makes]
                best = min(runs, key=statistics.median)
                cells.append(", ".join(f"{value:.2g}" for value in best))
            print(f"| 1e{power} | {'divided' if divided else 'as usual'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
