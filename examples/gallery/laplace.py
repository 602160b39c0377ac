"""A Laplace posterior: how sure is a trained network, and where?

The posterior is a Gaussian around the trained weights. The prior's precision and the noise maximize the marginal
likelihood. Predictions and draws come from the network linearized in its weights.

    python examples/gallery/laplace.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

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
deviations, said = {}, []
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
for axes, structure in zip(panels, ("diagonal", "kfac", "dense"), strict=True):
    P = natgrad.laplace(model, nn.MSELoss(), (x, y), structure).fit_prior()
    prediction = P.predict(grid)
    mean, s = prediction.mean[:, 0], prediction.functional_variance.sqrt()[:, 0]
    deviations[structure], noise = s, P.sigma_noise
    axes.fill_between(grid[:, 0], mean - 2 * s, mean + 2 * s, color="C1", alpha=0.2, linewidth=0)
    axes.plot(grid, P.sample(grid, 6)[..., 0].mT, color="C0", linewidth=0.7)
    axes.plot(grid, mean, color="C1")
    axes.plot(x, y, ".", color="k", markersize=4)
    axes.set(title={"dense": "all of the Fisher matrix"}.get(structure, structure), ylim=(-4, 4), xlabel="x")
figure.savefig(FOLDER / "laplace.png")
gap, data = (", ".join(f"{name} {s[place]:.3f}" for name, s in deviations.items()) for place in (140, 210))
print(f"standard deviation in the gap, x = -0.3: {gap}; amid the data, x = 1.8: {data}; noise {noise:.3f}, is {NOISE}")
