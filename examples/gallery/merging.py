"""Merge two models that were tuned on different data, with their Fisher matrices instead of the data.

The merged weights minimize Σ_i (θ − θ_i)ᵀ F_i (θ − θ_i) + 2λ ‖θ − θ̄‖²: each model keeps the weights that its own F_i
says it needs, and all others are averaged. One was tuned on upright digits, the other on digits turned by 90 degrees. λ
is chosen on digits that are neither in the training nor in the test set.

    python examples/gallery/merging.py FOLDER
"""

import copy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import natgrad

FOLDER, DAMPINGS = Path(*sys.argv[1:]), torch.logspace(-6, 1, 15).tolist()
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
shuffled = torch.randperm(len(labels))
upright = images[shuffled].float().view(-1, 8, 8) / 16
x, y = torch.stack([upright, upright.rot90(1, (1, 2))]).flatten(2), labels[shuffled].expand(2, -1)
few, train, choose, test = slice(0, 50), slice(0, 1000), slice(1000, 1400), slice(1400, None)
model, loss_fn = nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 10)), nn.CrossEntropyLoss()


def tune(model, x, y, steps):
    model = copy.deepcopy(model)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (100,))
        opt.zero_grad()
        loss_fn(model(x[batch]), y[batch]).backward()
        opt.step()
    return model


def accuracy(weights, rows):
    vector_to_parameters(weights, model.parameters())
    return (model(x[:, rows]).argmax(-1) == y[:, rows]).float().mean().item()


model = tune(model, x[:, few].flatten(0, 1), y[:, few].flatten(), 60)  # both start from it
tuned = [tune(model, x[i, train], y[i, train], 100) for i in (0, 1)]
weights = [parameters_to_vector(m.parameters()).detach() for m in tuned]
mean = (weights[0] + weights[1]) / 2
curves, best = {}, {}
for structure in ("diagonal", "kfac"):
    F = [natgrad.fisher(m, loss_fn, (x[i, train], y[i, train]), structure) for i, m in enumerate(tuned)]
    pull = F[0] @ (weights[0] - mean) + F[1] @ (weights[1] - mean)
    curves[structure] = [mean + (F[0] + F[1]).solve(pull, 2 * damping) for damping in DAMPINGS]
    best[structure] = accuracy(max(curves[structure], key=lambda w: accuracy(w, choose)), test)

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, axes = plt.subplots(figsize=(6, 3.6))
axes.axhline(accuracy(mean, test), color="C0", label="average of the weights")
for colour, (name, curve) in enumerate(curves.items(), 1):
    axes.semilogx(DAMPINGS, [accuracy(w, test) for w in curve], color=f"C{colour}", label=name)
axes.set(xlabel="damping λ", ylabel="test accuracy, upright and turned")
axes.legend()
figure.savefig(FOLDER / "merging.png")
print(f"test accuracy: average {accuracy(mean, test):.3f}, diagonal {best['diagonal']:.3f}, K-FAC {best['kfac']:.3f}")
