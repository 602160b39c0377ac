"""Natural gradients and Adam in equal processor time: the code that the recipes for objectives share.

All runs start from the same weights and draw the same random numbers. They take turns, so that a busy machine slows all
of them down alike. Adam has the best of four learning rates.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import natgrad

RATES, TURNS = (1e-3, 3e-3, 1e-2, 3e-2), 20
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


class Run:
    """A model in training, and (seconds of processor time, loss) at every step.

    `loss_of(model, opt)` is the loss of one step.
    """

    def __init__(self, name, model_of, optimizer_of, loss_of):
        torch.manual_seed(0)
        self.name, self.model, self.loss_of = name, model_of(), loss_of
        self.opt, self.spent, self.curve = optimizer_of(self.model), 0.0, []
        self.random = torch.get_rng_state()

    def train(self, seconds):
        torch.set_rng_state(self.random)
        while self.spent < seconds:
            start = time.process_time()
            loss = self.loss_of(self.model, self.opt)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            self.curve.append((self.spent, loss.item()))
            self.spent += time.process_time() - start
        self.random = torch.get_rng_state()

    def last(self):
        """The loss at the end: the mean of the last tenth, as mini-batches differ."""
        losses = [loss for _, loss in self.curve]
        return sum(losses[-(len(losses) // 10 + 1) :]) / (len(losses) // 10 + 1)


def on_fresh_batches(loss_of, count=20):
    """A key of `race`: the loss of a run's model on the same new batches for all runs."""

    @torch.no_grad()
    def loss(run):
        torch.manual_seed(1)
        return sum(loss_of(run.model).item() for _ in range(count)) / count

    return loss


def train(runs, seconds):
    for turn in range(1, TURNS + 1):
        for run in runs:
            run.train(seconds * turn / TURNS)


def adams(model_of, loss_of):
    """A run of Adam for each learning rate."""
    makes = {lr: lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr=lr) for lr in RATES}
    return [Run(f"Adam, learning rate {lr:g}", model_of, make, loss_of) for lr, make in makes.items()]


def best(runs, key=Run.last):
    """The run that ends lowest."""
    run = min(runs, key=key)
    run.name += f", the best of {len(runs)}" if len(runs) > 1 else ", nothing tuned"
    return run


def race(model_of, terms, loss_of, seconds, optimizer=natgrad.KFAC, dampings=(), key=Run.last, **given):
    """The best run of natgrad's optimizer, over some dampings or with the default, and the best of Adam's.

    The best has the lowest `key`. `loss_of(model, losses)` takes `opt.loss` in one case, and `terms` in the other: they
    have the same values.
    """

    def ours(name, **options):
        options |= given
        return Run(name, model_of, lambda m: optimizer(m, terms, **options), lambda m, opt: loss_of(m, opt.loss))

    ours("warm-up").train(0.5)  # what the first step imports takes no part
    name = optimizer.__name__
    own = [ours(f"{name}, damping {d:g}", damping=d) for d in dampings] or [ours(name)]
    others = adams(model_of, lambda m, opt: loss_of(m, terms))
    train([*own, *others], seconds)
    return best(own, key), best(others, key)


def draw(axes, ours, adam, ylabel, key=Run.last):
    for colour, run in (("C2", ours), ("C0", adam)):
        axes.plot(*zip(*run.curve, strict=True), color=colour, label=run.name)
    axes.set(xlabel="seconds of processor time", ylabel=ylabel)
    axes.legend()
    return f"{key(ours):.4g}, Adam {key(adam):.4g}"
