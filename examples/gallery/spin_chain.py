"""Variational Monte Carlo: the ground state of a spin chain, H = −Σ σᶻᵢ σᶻᵢ₊₁ − Σ σˣᵢ, by a network for log ψ(s).

The energy is an expectation over states s, which are drawn from ψ². Its gradient is 2 E[(E_loc − E) ∇log ψ]. The matrix
is 4 E[∇log ψ ∇log ψᵀ], by `opt.predict`. The Fisher information of ψ² has the covariance of ∇log ψ instead. The last
bias makes up for that: it only scales ψ, and the solve takes its direction out of all others. A step has fewer states
than parameters, and `momentum` keeps what earlier states have shown (SPRING, arXiv:2401.10190).

    python examples/gallery/spin_chain.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad

FOLDER, SPINS, STATES, STEPS, RATES = Path(*sys.argv[1:]), 10, 300, 300, (1e-3, 3e-3, 1e-2, 3e-2)
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
numbers = torch.arange(2**SPINS)
bits = 2 ** torch.arange(SPINS)
states = 1.0 - 2.0 * (numbers.unsqueeze(1) & bits).ne(0)  # all of them, +1 and −1
diagonal, flipped = -(states * states.roll(1, 1)).sum(1), numbers.unsqueeze(1) ^ bits  # a spin turned
H = torch.diag(diagonal).scatter_add(1, flipped, -torch.ones(len(states), SPINS))
lowest = torch.linalg.eigvalsh(H)[0]


def run(make):
    """The relative error of the energy, exact over all states, before each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SPINS, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    opt, errors = make(model), []
    for _ in range(STEPS):
        with torch.no_grad():
            log_psi = model(states)[:, 0]
            local = diagonal - (log_psi[flipped] - log_psi.unsqueeze(1)).exp().sum(1)
            p = (2 * log_psi).softmax(0)
        errors.append(1 - (p @ local / lowest).item())
        drawn = p.multinomial(STATES, replacement=True)
        output = model(states[drawn])
        if isinstance(opt, natgrad.NaturalGradient):
            opt.predict(output)
        opt.zero_grad()
        (2 * (local[drawn] - local[drawn].mean()) * output[:, 0]).mean().backward()
        opt.step()
    return errors


def exact(momentum):
    """N(log ψ, 1/4) has the Fisher information 4 in log ψ."""
    loss = natgrad.losses.Likelihood(lambda output: torch.distributions.Normal(output, 0.5))
    return lambda model: natgrad.NaturalGradient(model, loss, lr=0.1, damping=1e-3, momentum=momentum, max_norm=0.3)


adam = min((run(lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr=lr)) for lr in RATES), key=lambda e: e[-1])
curves = {"Adam, the best of 4": adam, "natural gradient": run(exact(0.0)), "with momentum": run(exact(0.95))}
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, axes = plt.subplots(figsize=(6, 3.6))
for (name, errors), colour in zip(curves.items(), ("C0", "C1", "C2"), strict=True):
    axes.semilogy(errors, color=colour, label=name)
axes.set(xlabel="steps", ylabel="relative error of the energy")
axes.legend()
figure.savefig(FOLDER / "spin_chain.png")
last = {name: f"{sum(errors[-20:]) / 20:.1e}" for name, errors in curves.items()}
print(f"relative error of the energy after {STEPS} steps: " + "; ".join(f"{n} {e}" for n, e in last.items()))
