"""Train a classifier with K-FAC in place of AdamW.

Only two lines differ: the one that makes the optimizer and the one that computes the loss. KFAC has nothing to tune;
AdamW has the best of a few learning rates here. Both start from the same weights and see the same batches of
scikit-learn's digits.

    python examples/gallery/train.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, STEPS, RATES = Path(*sys.argv[1:]), 150, (1e-3, 3e-3, 1e-2, 3e-2)
FOLDER.mkdir(parents=True, exist_ok=True)
images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
x, y = images[shuffled].float() / 16, labels[shuffled]
train, test = slice(0, 1400), slice(1400, None)
loss_fn = nn.CrossEntropyLoss()


def run(make):
    """The training loss after each step, and the test accuracy at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 10))
    opt = make(model)
    loss_of = opt.loss if isinstance(opt, natgrad.KFAC) else loss_fn  # the two have the same value
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(1400, (200,))
        loss = loss_of(model(x[batch]), y[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            losses.append(loss_fn(model(x[train]), y[train]).item())
    return losses, (model(x[test]).argmax(1) == y[test]).float().mean().item()


kfac, kfac_accuracy = run(lambda model: natgrad.KFAC(model, loss_fn))
tried = {lr: run(lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr)) for lr in RATES}
best = min(RATES, key=lambda lr: tried[lr][0][-1])
adamw, adamw_accuracy = tried[best]

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, axes = plt.subplots(figsize=(6, 3.6))
axes.semilogy(adamw, label=f"AdamW, learning rate {best:g}, the best of {len(RATES)}")
axes.semilogy(kfac, color="C2", label="KFAC, nothing tuned")
axes.set(xlabel="steps", ylabel="training loss")
axes.legend()
figure.savefig(FOLDER / "train.png")
print(f"training loss after {STEPS} steps: KFAC {kfac[-1]:.1e}, AdamW {adamw[-1]:.1e}; ", end="")
print(f"test accuracy: KFAC {kfac_accuracy:.3f}, AdamW {adamw_accuracy:.3f}")
