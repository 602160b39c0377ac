"""The spectrum of a Hessian: the picture of docs/spectrum.md.

python -m benchmarks.spectrum --plot docs/images/spectrum.png

A network on scikit-learn's digits after 50 steps of Adam, in float64. The estimate by Lanczos quadrature is printed
beside the exact figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import natgrad
from benchmarks.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print(machine())
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double(), nn.CrossEntropyLoss()
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(50):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    H = natgrad.hessian(model, loss, (x, y))
    dense = natgrad.hessian(model, loss, (x, y), "dense")
    exact = dense.spectral_density()
    found = H.spectral_density(samples=10, steps=100, generator=torch.Generator().manual_seed(0))
    top = H.top_eigenvalues(10)
    error = (top.values - exact.nodes.flip(0)[:10]).abs().max()
    print(f"{H.space.size} parameters; the ten largest {[round(float(v), 3) for v in top.values]}, off by {error:.1g}")
    for above in (1e-3, 1e-2, 1e-1):
        print(f"eigenvalues above {above:g}: {exact.count(above):.0f}, estimated {found.count(above):.0f}")
    below = float((exact.nodes < -1e-6).double().sum())
    print(f"below -1e-6: {below:.0f}")
    if args.plot:
        found.plot(args.plot)


if __name__ == "__main__":
    main()
