"""How many products conjugate gradients take with no preconditioner, Jacobi's, a randomized Nyström's, K-FAC, and the
exact blocks of the layers.

python -m benchmarks.preconditioned

Five Gauss-Newton matrices of small networks in the course of their training, each with three dampings in units of the
mean eigenvalue. The right-hand side is the gradient. `N K / P` says how many columns the matrix has for each parameter:
below 1 it is singular without damping. Counts do not depend on the machine.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine
from natgrad.linalg import Dense, Diagonal, IterativeInverse, Operator, nystrom

TOLERANCE, RANK, SEED = 1e-6, 50, 0
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3)
F64 = torch.float64
Problem = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """`Δu` of a tanh network without a last bias, which has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Linear(16, 1, bias=False)
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), last).double()

    def forward(self, x: Tensor) -> Tensor:
        return natgrad.pde.derivatives(self.net, x).laplacian


def tanh_network(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def problems() -> dict[str, Problem]:
    """Networks, their losses and their data, before training."""
    g = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    scales = torch.logspace(-1, 1, 12, dtype=F64)
    codes = (randn(600, 3) @ randn(3, 14)).sigmoid()
    line = torch.linspace(-2, 2, 200, dtype=F64).unsqueeze(1)
    convolutions = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    square = natgrad.pde.uniform(1000, 2, generator=g, dtype=F64)
    return {
        "perceptron": (
            tanh_network(12, 20, 4),
            nn.CrossEntropyLoss(),
            (randn(1000, 12) * scales, torch.arange(1000) % 4),
        ),
        "autoencoder": (tanh_network(14, 10, 3, 10, 14), nn.BCEWithLogitsLoss(), (codes, codes)),
        "convolutions": (
            nn.Sequential(*convolutions).double(),
            nn.CrossEntropyLoss(),
            (randn(400, 1, 8, 8), torch.arange(400) % 3),
        ),
        "regression": (tanh_network(1, 24, 12, 1), nn.MSELoss(), (line, (3 * line).sin())),
        "residual": (Residual(), nn.MSELoss(), (square, torch.ones(1000, 1, dtype=F64))),
    }


def train(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, steps: int = 100) -> None:
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()


def counts(F: Operator, v: Tensor, damping: float, preconditioners: dict[str, Operator]) -> dict[str, int]:
    """Products until the residual is below the tolerance."""
    found = {}
    for name, K in {"none": None, **preconditioners}.items():
        inverse = IterativeInverse(F, damping, TOLERANCE, preconditioner=None if K is None else K.inverse(damping))
        _ = inverse @ v
        found[name] = inverse.solutions[0].products
    return found


def main() -> None:
    print(f"products to a relative residual of {TOLERANCE:g}; Nyström of rank {RANK}; seed {SEED}; {machine()}\n")
    kinds = f"{'none':>7}{'Jacobi':>8}{'Nyström':>9}{'K-FAC':>7}{'blocks':>8}"
    print(f"{'matrix':14}{'P':>6}{'N K / P':>9}{'damping':>10}{kinds}")
    for name, (model, loss, (x, y)) in problems().items():
        train(model, loss, x, y)
        G = natgrad.gauss_newton(model, loss, (x, y), structure="dense")
        F = Dense(G.to_dense())
        K, blocks = (
            Dense(natgrad.gauss_newton(model, loss, (x, y), structure=structure).to_dense())
            for structure in ("kfac", "block")
        )
        gradient = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
        size, mean = F.space.size, float(F.trace()) / F.space.size
        generator = torch.Generator().manual_seed(SEED)
        jacobi, sketch = Diagonal((F.diagonal(),)), nystrom(F, RANK, generator)
        preconditioners = {"Jacobi": jacobi, "Nyström": sketch, "K-FAC": K, "blocks": blocks}
        columns = model(x).numel() / size
        for relative in DAMPINGS:
            its = counts(F, gradient, relative * mean, preconditioners)
            numbers = f"{its['none']:7}{its['Jacobi']:8}{its['Nyström']:9}{its['K-FAC']:7}{its['blocks']:8}"
            print(f"{name:14}{size:6}{columns:9.1f}{relative:10g}{numbers}")


if __name__ == "__main__":
    main()
