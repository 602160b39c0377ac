"""Learn a second task without forgetting the first: elastic weight consolidation.

While the second task is learned, the penalty c/2 (θ − θ*)ᵀ F (θ − θ*) protects the weights that the first task needs. F
is the first task's Fisher matrix, and its data are not used again. The tasks are upright digits and digits turned by 90
degrees.

    python examples/gallery/continual.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, STRENGTHS = Path(*sys.argv[1:]), (1.0, 10.0, 100.0, 1000.0, 10000.0)
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
shuffled = torch.randperm(len(labels))
y, upright = labels[shuffled], images[shuffled].float() / 16
turned = upright.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
model, loss_fn = nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 10)), nn.CrossEntropyLoss()


def learn(x, penalty=lambda: 0.0):
    """The test accuracies on both tasks afterwards."""
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        batch = torch.randint(1300, (200,))
        opt.zero_grad()
        (loss_fn(model(x[batch]), y[batch]) + penalty()).backward()
        opt.step()
    return tuple((model(x[1300:]).argmax(1) == y[1300:]).float().mean().item() for x in (upright, turned))


def moved():
    return {name: p - first[name] for name, p in model.named_parameters()}


learn(upright)
first = {name: p.detach().clone() for name, p in model.named_parameters()}
unheld = learn(turned)
curves = {}
for structure in ("diagonal", "kfac"):
    model.load_state_dict(first)
    F = natgrad.fisher(model, loss_fn, (upright[:1300], y[:1300]), structure)
    curves[structure] = []
    for c in STRENGTHS:
        model.load_state_dict(first)
        curves[structure].append(learn(turned, lambda F=F, c=c: c / 2 * F.quadratic(moved())))

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, axes = plt.subplots(figsize=(6, 3.6))
axes.plot(*unheld, "o", label="no penalty")
for name, curve in curves.items():
    axes.plot(*zip(*curve, strict=True), "o-", label=name)
axes.set(xlabel="test accuracy on the first task", ylabel="on the second")
axes.legend()
figure.savefig(FOLDER / "continual.png")
best = {name: max(sum(point) / 2 for point in curve) for name, curve in curves.items()}
print(f"mean accuracy on both tasks: no penalty {sum(unheld) / 2:.3f}, ", end="")
print(f"diagonal {best['diagonal']:.3f}, K-FAC {best['kfac']:.3f}")
