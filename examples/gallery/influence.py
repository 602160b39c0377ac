"""Influence functions: which training examples does a prediction rest on?

Without example i, the test loss changes by ∇ℓᵀ (F + λI)⁻¹ ∇ℓ_i / N to first order: the score of i divided by N. The
damping λ is the weight decay. The script checks this by training again without each of the most influential examples.

    python examples/gallery/influence.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, N, DECAY = Path(*sys.argv[1:]), 600, 1e-2
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x / 16
model, loss_fn = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)), nn.CrossEntropyLoss()


def train(start, kept):
    """To convergence, from the given weights."""
    model.load_state_dict(start)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective():
        opt.zero_grad()
        decay = DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss = loss_fn(model(x[kept]), y[kept]) * len(kept) / N + decay
        loss.backward()
        return loss

    opt.step(objective)


every = torch.arange(N)
train(model.state_dict(), every)
trained = {name: p.clone() for name, p in model.state_dict().items()}
losses = nn.functional.cross_entropy(model(x[N:]), y[N:], reduction="none").detach()
i_test = N + losses.sub(1).abs().argmin()  # the model is not sure of it
test = x[i_test : i_test + 1], y[i_test : i_test + 1]
scores = natgrad.influence(model, loss_fn, (x[:N], y[:N]), test, "kfac", damping=DECAY)
chosen = torch.cat([scores.top(8, against=True).indices[0], scores.top(8).indices[0].flip(0)])
found = []
for i in chosen:
    train(trained, every[every != i])
    found.append(loss_fn(model(test[0]), test[1]).detach() - losses[i_test - N])
found, predicted = torch.stack(found), scores.as_subclass(torch.Tensor)[0, chosen] / N
correlation = torch.corrcoef(torch.stack([predicted, found]))[0, 1]

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplot_mosaic("Tabcsss;.defsss", figsize=(9.5, 3))
shown = [("T", "test", i_test), *(("abc"[k], "for it", chosen[-1 - k]) for k in range(3))]
for key, title, i in [*shown, *(("def"[k], "against it", chosen[k]) for k in range(3))]:
    panels[key].imshow(x[i].view(8, 8), cmap="gray_r")
    panels[key].set(title=f"{title}: a {y[i]}", xticks=[], yticks=[])
panels["s"].axline((0, 0), slope=1, color="C0", linewidth=1)
panels["s"].plot(predicted, found, "o", color="C2")
panels["s"].set(xlabel="change of the test loss, predicted", ylabel="found by training again")
figure.savefig(FOLDER / "influence.png")
size = found @ predicted / predicted.square().sum()
print(f"changes of the test loss: found are {size:.2f} of those predicted, correlation {correlation:.3f}")
