"""Natural gradients beside Adam at equal processor time: what the recipes for objectives share.

All runs start from the same weights. natgrad's optimizer has nothing to tune; Adam has the best of four learning rates.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import natgrad

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


def train(model_of, optimizer_of, loss_of, seconds):
    """The model, and (seconds of processor time, loss) at every step. `loss_of(model, opt)` is the loss of one step."""
    torch.manual_seed(0)
    model = model_of()
    opt, spent, curve = optimizer_of(model), 0.0, []
    while spent < seconds:
        start = time.process_time()
        loss = loss_of(model, opt)
        opt.zero_grad()
        loss.backward()
        opt.step()
        curve.append((spent, loss.item()))
        spent += time.process_time() - start
    return model, curve


def race(model_of, terms, loss_of, seconds, optimizer=natgrad.KFAC):
    """The model that natgrad's optimizer has trained, its curve, and the best of Adam's. `loss_of(model, losses)` takes
    `opt.loss` in one case, and `terms` in the other: they have the same values."""

    def ours(seconds):
        return train(model_of, lambda m: optimizer(m, terms), lambda m, opt: loss_of(m, opt.loss), seconds)

    def adams(lr):
        make = lambda m: torch.optim.Adam(m.parameters(), lr=lr)  # noqa: E731
        return train(model_of, make, lambda m, opt: loss_of(m, terms), seconds)[1]

    ours(0.5)  # what the first step imports takes no part
    model, curve = ours(seconds)
    tried = {f"Adam, learning rate {lr:g}, the best of {len(RATES)}": adams(lr) for lr in RATES}
    best = min(tried, key=lambda name: last(tried[name]))
    return model, {f"{optimizer.__name__}, nothing tuned": curve, best: tried[best]}


def last(curve):
    """The loss at the end: the mean of the last tenth, as mini-batches differ."""
    losses = [loss for _, loss in curve]
    return sum(losses[-(len(losses) // 10 + 1) :]) / (len(losses) // 10 + 1)


def draw(axes, curves, ylabel):
    for colour, (name, curve) in zip(("C2", "C0"), curves.items(), strict=True):
        axes.plot(*zip(*curve, strict=True), color=colour, label=name)
    axes.set(xlabel="seconds of processor time", ylabel=ylabel)
    axes.legend()
    ours, adams = (last(curve) for curve in curves.values())
    return f"{ours:.4g}, Adam {adams:.4g}"
