"""Prune a network: which weights can be removed, and how do the others compensate?

Removing weights R costs ½ w_Rᵀ (Σ_RR)⁻¹ w_R where Σ = (F + λI)⁻¹, if the others move by −Σ_·R (Σ_RR)⁻¹ w_R: the optimal
brain surgeon. A diagonal F gives optimal brain damage, in which no other weight moves. Weights are removed in rounds,
those with the smallest w²/Σ_qq first. After each round, Σ is updated to that of the remaining weights.

    python examples/gallery/pruning.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import natgrad

FOLDER, DAMPING = Path(*sys.argv[1:]), 1e-3
FOLDER.mkdir(parents=True, exist_ok=True)
GOALS = [k / 20 for k in range(19)]  # the shares of the weights that are gone after each round
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
shuffled = torch.randperm(len(labels))
x, y = images[shuffled] / 16, labels[shuffled]
train, test = slice(0, 1300), slice(1300, None)
model = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10))
loss_fn = nn.CrossEntropyLoss()
opt = natgrad.KFAC(model, loss_fn, weight_decay=1e-3)
for _ in range(60):
    loss = opt.loss(model(x[train]), y[train])
    opt.zero_grad()
    loss.backward()
    opt.step()
trained = parameters_to_vector(model.parameters()).detach()
prunable = torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in model.parameters()])  # biases stay


def prune(Sigma):
    """The test accuracy after each round."""
    w, alive, curve = trained.clone(), prunable.clone(), []
    for goal in GOALS:
        R = torch.where(alive, w.square() / Sigma.diagonal(), torch.inf).argsort()
        R = R[: round(goal * int(prunable.sum())) - int((prunable & ~alive).sum())]
        change = torch.linalg.solve(Sigma[R][:, R], torch.cat([w[R, None], Sigma[R]], 1))
        w, Sigma = w - Sigma[:, R] @ change[:, 0], Sigma - Sigma[:, R] @ change[:, 1:]
        alive[R], w[R] = False, 0.0
        vector_to_parameters(w, model.parameters())
        curve.append((model(x[test]).argmax(1) == y[test]).double().mean().item())
    vector_to_parameters(trained, model.parameters())
    return curve


curves = {"magnitude": prune(torch.eye(len(trained)))}
for structure in ("diagonal", "kfac"):
    F = natgrad.fisher(model, loss_fn, (x[train], y[train]), structure)
    curves[structure] = prune(F.inverse(DAMPING).to_dense())

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, axes = plt.subplots(figsize=(6, 3.6))
for name, curve in curves.items():
    axes.plot(GOALS, curve, label=name)
axes.set(xlabel="share of weights removed", ylabel="test accuracy")
axes.legend()
figure.savefig(FOLDER / "pruning.png")
results = ", ".join(f"{name} {curve[GOALS.index(0.8)]:.3f}" for name, curve in curves.items())
print(f"test accuracy without 80% of the weights: {results}; with all {curves['kfac'][0]:.3f}")
