"""An actor-critic: the natural policy gradient of a pole on a cart, with a value head beside the policy.

`opt.predict` gives the curvature of the policy's distribution; the gradient comes from the advantages. The squared
error of the value head is a second term. `max_kl` bounds the length of each step (ACKTR, arXiv:1708.05144).

    python examples/gallery/actor_critic.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import Run, adams, best, draw, train
from torch import nn

import natgrad

FOLDER, SECONDS, CARTS, HORIZON, DISCOUNT = Path(*sys.argv[1:]), 5.0, 64, 32, 0.98
FOLDER.mkdir(parents=True, exist_ok=True)


def move(state, push):
    """A fiftieth of a second of carts with poles, and which of them have fallen (Barto et al., 1983)."""
    _, v, angle, w = state.unbind(1)
    force = (20 * push - 10 + 0.05 * w * w * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * force) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
    state = state + 0.02 * torch.stack([v, force - 0.05 * turn * angle.cos() / 1.1, w, turn], 1)
    return state, (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2095)


class ActorCritic(nn.Module):
    """`state` is that of its carts, `steps` how long poles stay up: an average over the updates, 500 steps at most."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 2), nn.Linear(64, 1)
        self.state, self.steps = torch.zeros(CARTS, 4), [20.0]

    def forward(self, state):
        h = self.trunk(state)
        return self.policy(h), self.value(h)[:, 0]


terms = {"policy": nn.CrossEntropyLoss(), "value": nn.MSELoss()}


def play(model, opt):
    seen, pushes, fell = [], [], []
    with torch.no_grad():
        for _ in range(HORIZON):
            seen.append(model.state)
            pushes.append(torch.distributions.Categorical(logits=model(model.state)[0]).sample())
            model.state, down = move(model.state, pushes[-1])
            fell.append(down)
            model.state = torch.where(down[:, None], 0.05 * torch.randn(CARTS, 4), model.state)
        returns = [model(model.state)[1]]
        for down in reversed(fell):
            returns.insert(0, torch.where(down, 0.0, 1 - DISCOUNT + DISCOUNT * returns[0]))
    model.steps.append(0.9 * model.steps[-1] + 0.1 / max(torch.stack(fell).float().mean().item(), 1 / 500))
    (logits, value), returns = model(torch.cat(seen)), torch.cat(returns[:-1])
    advantage = returns - value.detach()
    log_p = logits.log_softmax(1).gather(1, torch.cat(pushes)[:, None])[:, 0]
    gain = ((advantage - advantage.mean()) / advantage.std() * log_p).mean()
    if isinstance(opt, natgrad.KFAC):
        opt.predict["policy"](logits)
        return opt.loss["value"](value, returns) / 2 - gain
    return terms["value"](value, returns) / 2 - gain


def make(model):
    return natgrad.KFAC(model, terms, max_kl=0.01)


def mean(run):
    return sum(steps for _, steps in run.curve) / len(run.curve)


Run("warm-up", ActorCritic, make, play).train(0.5)  # what the first step imports takes no part
runs = [Run("KFAC, max_kl=0.01", ActorCritic, make, play), *adams(ActorCritic, play)]
train(runs, SECONDS)
for run in runs:
    run.curve = [(seconds, steps) for (seconds, _), steps in zip(run.curve, run.model.steps[1:], strict=True)]
kfac, adam = runs[0], best(runs[1:], key=lambda run: -mean(run))
figure, axes = plt.subplots(figsize=(6, 3.6))
draw(axes, kfac, adam, "steps before the pole falls")
figure.savefig(FOLDER / "actor_critic.png")
print(f"steps before a fall, mean over {SECONDS:g} s: KFAC {mean(kfac):.0f}, Adam {mean(adam):.0f}")
