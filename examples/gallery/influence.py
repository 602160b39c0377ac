"""Influence functions: which training examples does a prediction rest on?

Without example i the test loss changes by ∇ℓᵀ H⁻¹ ∇ℓ_i / N, to first order. H is K-FAC's Gauss-Newton matrix plus the
weight decay, which is the damping of `solve`. Checked by training again without each of the most influential examples.

    python examples/gallery/influence.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, vmap

import natgrad

FOLDER, N, DECAY = Path(*sys.argv[1:]), 600, 1e-2
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
model, loss_fn = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)), nn.CrossEntropyLoss()


def loss_of(weights, x, y):
    return loss_fn(functional_call(model, weights, x / 16), y)


def train(weights, kept):
    """To convergence, from the given weights."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
    opt = torch.optim.LBFGS(weights.values(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective():
        opt.zero_grad()
        decay = DECAY / 2 * sum(p.square().sum() for p in weights.values())
        loss = loss_of(weights, x[kept], y[kept]) * len(kept) / N + decay
        loss.backward()
        return loss

    opt.step(objective)
    return {name: p.detach() for name, p in weights.items()}


every = torch.arange(N)
trained = train(dict(model.named_parameters()), every)
model.load_state_dict(trained)
i_test = N + vmap(loss_of, (None, 0, 0))(trained, x[N:], y[N:]).sub(1).abs().argmin()  # the model is not sure of it
test = x[i_test], y[i_test]
H = natgrad.gauss_newton(model, loss_fn, (x[:N] / 16, y[:N]), "kfac")
direction = H.solve(grad(loss_of)(trained, *test), damping=DECAY)
each = vmap(grad(loss_of), (None, 0, 0))(trained, x[:N], y[:N])
predicted = sum(each[name].flatten(1) @ direction[name].flatten() for name in each) / N
chosen = torch.cat([predicted.argsort()[:8], predicted.argsort()[-8:]])
found = torch.stack([loss_of(train(trained, every[every != i]), *test) for i in chosen]) - loss_of(trained, *test)
correlation = torch.corrcoef(torch.stack([predicted[chosen], found]))[0, 1]

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplot_mosaic("Tabcsss;.defsss", figsize=(9.5, 3))
shown = [("T", "test", i_test), *(("abc"[k], "for it", chosen[-1 - k]) for k in range(3))]
for key, title, i in [*shown, *(("def"[k], "against it", chosen[k]) for k in range(3))]:
    panels[key].imshow(x[i].view(8, 8), cmap="gray_r")
    panels[key].set(title=f"{title}: a {y[i]}", xticks=[], yticks=[])
panels["s"].axline((0, 0), slope=1, color="C0", linewidth=1)
panels["s"].plot(predicted[chosen], found, "o", color="C2")
panels["s"].set(xlabel="change of the test loss, predicted", ylabel="found by training again")
figure.savefig(FOLDER / "influence.png")
size = found @ predicted[chosen] / predicted[chosen].square().sum()
print(f"changes of the test loss: found are {size:.2f} of those predicted, correlation {correlation:.3f}")
