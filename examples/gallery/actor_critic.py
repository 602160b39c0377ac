"""An actor-critic: the natural policy gradient of a pole on a cart, with a value head beside the policy.

`opt.predict` takes the curvature of the policy's distribution; the gradient is that of the advantages. The value head's
squared error is a term of its own, and each step goes as far as `max_kl` allows (ACKTR, arXiv:1708.05144).

    python examples/gallery/actor_critic.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import RATES, draw, train
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
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state):
        h = self.trunk(state)
        return self.policy(h), self.value(h)[:, 0]


terms = {"policy": nn.CrossEntropyLoss(), "value": nn.MSELoss()}


class Play:
    """One run of training, and how long poles stay up in it: an average over the updates, 500 steps at most."""

    def __init__(self):
        self.state, self.steps = torch.zeros(CARTS, 4), [20.0]

    def loss(self, model, opt):
        seen, pushes, fell = [], [], []
        with torch.no_grad():
            for _ in range(HORIZON):
                seen.append(self.state)
                pushes.append(torch.distributions.Categorical(logits=model(self.state)[0]).sample())
                self.state, down = move(self.state, pushes[-1])
                fell.append(down)
                self.state = torch.where(down[:, None], 0.05 * torch.randn(CARTS, 4), self.state)
            returns = [model(self.state)[1]]
            for down in reversed(fell):
                returns.insert(0, torch.where(down, 0.0, 1 - DISCOUNT + DISCOUNT * returns[0]))
        self.steps.append(0.9 * self.steps[-1] + 0.1 / max(torch.stack(fell).float().mean().item(), 1 / 500))
        (logits, value), returns = model(torch.cat(seen)), torch.cat(returns[:-1])
        advantage = returns - value.detach()
        log_p = logits.log_softmax(1).gather(1, torch.cat(pushes)[:, None])[:, 0]
        gain = ((advantage - advantage.mean()) / advantage.std() * log_p).mean()
        if isinstance(opt, natgrad.KFAC):
            opt.predict["policy"](logits)
            return opt.loss["value"](value, returns) / 2 - gain
        return terms["value"](value, returns) / 2 - gain


def run(optimizer_of, seconds=SECONDS):
    play = Play()
    _, curve = train(ActorCritic, optimizer_of, play.loss, seconds)
    return [(seconds, steps) for (seconds, _), steps in zip(curve, play.steps[1:], strict=True)]


def mean(curve):
    return sum(steps for _, steps in curve) / len(curve)


_, kfac = (run(lambda m: natgrad.KFAC(m, terms, max_kl=0.01), seconds) for seconds in (0.5, SECONDS))
tried = {lr: run(lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr=lr)) for lr in RATES}
best = max(tried, key=lambda lr: mean(tried[lr]))
figure, axes = plt.subplots(figsize=(6, 3.6))
curves = {"KFAC, max_kl=0.01": kfac, f"Adam, learning rate {best:g}, the best of {len(RATES)}": tried[best]}
draw(axes, curves, "steps before the pole falls")
figure.savefig(FOLDER / "actor_critic.png")
print(f"steps before a fall, mean over {SECONDS:g} s: KFAC {mean(kfac):.0f}, Adam {mean(tried[best]):.0f}")
