"""A Laplace posterior: how sure is a trained network, and where?

The posterior is a Gaussian about the trained weights. Its precision P is N/(2σ²) times the Gauss-Newton matrix of the
squared error, plus the prior's precision, which is the damping. The variance of a prediction is J P⁻¹ Jᵀ, in one call
for all points, and `sample` draws from the posterior.

    python examples/gallery/laplace.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import natgrad

FOLDER, NOISE, PRIOR = Path(*sys.argv[1:]), 0.15, 3.0
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.cat([torch.rand(40, 1) * 1.6 - 3, torch.rand(40, 1) * 2.2 + 0.8])  # nothing between -1.4 and 0.8
y = torch.sin(2 * x) + 0.3 * x + NOISE * torch.randn_like(x)
grid = torch.linspace(-4.5, 4.5, 301).unsqueeze(1)
model = nn.Sequential(nn.Linear(1, 25), nn.Tanh(), nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 1))
opt = torch.optim.LBFGS(model.parameters(), max_iter=2000, line_search_fn="strong_wolfe")


def minus_log_posterior():
    opt.zero_grad()
    prior = PRIOR / 2 * sum(p.square().sum() for p in model.parameters())
    loss = (model(x) - y).square().sum() / (2 * NOISE**2) + prior
    loss.backward()
    return loss


opt.step(minus_log_posterior)
weights = {name: p.detach() for name, p in model.named_parameters()}
J = vmap(jacrev(lambda w, x: functional_call(model, w, x).squeeze(-1)), (None, 0))(weights, grid)
mean = functional_call(model, weights, grid).squeeze(-1)
deviations = {}
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
for axes, structure in zip(panels, ("diagonal", "kfac", "dense"), strict=True):
    G = natgrad.gauss_newton(model, nn.MSELoss(), (x, y), structure)
    P = len(x) / (2 * NOISE**2) * G
    deviations[structure] = s = P.inverse(PRIOR).quadratic(J).sqrt()
    draws = P.sample(6, PRIOR)  # of the weights, less their mean; the function is linear in them, as in the variance
    functions = mean + sum(draws[n].flatten(1) @ J[n].flatten(1).mT for n in J)
    axes.fill_between(grid[:, 0], mean - 2 * s, mean + 2 * s, color="C1", alpha=0.2, linewidth=0)
    axes.plot(grid, functions.mT, color="C0", linewidth=0.7)
    axes.plot(grid, mean, color="C1")
    axes.plot(x, y, ".", color="k", markersize=4)
    axes.set(title={"dense": "all of the Gauss-Newton matrix"}.get(structure, structure), ylim=(-4, 4), xlabel="x")
figure.savefig(FOLDER / "laplace.png")
gap, data = (", ".join(f"{name} {s[place]:.3f}" for name, s in deviations.items()) for place in (140, 210))
print(f"standard deviation in the gap, x = -0.3: {gap}; amid the data, x = 1.8: {data}")
