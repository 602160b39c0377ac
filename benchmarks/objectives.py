"""What objectives of several parts cost: two heads beside one, a PINN by autograd or `torch.func` beside one by hand.

Steps are taken by turns, in processor time; the ratio of the medians, and its spread over five parts of the run.

    python -m benchmarks.objectives
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine

STEPS, PARTS = 60, 5


class Heads(nn.Module):
    """A trunk with a head for each name."""

    def __init__(self, heads: dict[str, int], width: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(width, outputs) for name, outputs in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def heads(both: bool) -> Callable[[], None]:
    """A step with one head or two."""
    torch.manual_seed(0)
    x, y, t = torch.randn(500, 64), torch.randint(10, (500,)), torch.randn(500, 4)
    losses: dict[str, nn.Module] = {"class": nn.CrossEntropyLoss()}
    if both:
        losses["box"] = nn.SmoothL1Loss()
    model = Heads({"class": 10, "box": 4} if both else {"class": 10})
    opt = natgrad.KFAC(model, losses)

    def step() -> None:
        out = model(x)
        loss = opt.loss["class"](out["class"], y)
        if both:
            loss = loss + 0.5 * opt.loss["box"](out["box"], t)
        opt.zero_grad()
        loss.backward()
        opt.step()

    return step


class ByAutograd(nn.Module):
    """`Δu` at points, by `torch.autograd.grad`."""

    def __init__(self, u: nn.Module):
        super().__init__()
        self.u = u

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        parts = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        return torch.stack(parts).sum(0).unsqueeze(1)


class ByTransforms(nn.Module):
    """The same, by `torch.func` at each point."""

    def __init__(self, u: nn.Module):
        super().__init__()
        self.u = u

    def forward(self, x: Tensor) -> Tensor:
        curved = torch.func.vmap(torch.func.hessian(lambda z: self.u(z)[0]))(x)
        return curved.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


class ByHand(nn.Module):
    """The same, carried through the layers."""

    def __init__(self, u: nn.Module):
        super().__init__()
        self.u = u

    def forward(self, x: Tensor) -> Tensor:
        return natgrad.pde.derivatives(self.u, x).laplacian


def pinn(kind: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    model = kind(u)
    x = torch.rand(500, 2, dtype=torch.float64)
    f = -x.prod(1, keepdim=True)
    opt = natgrad.NaturalGradient(model, nn.MSELoss())

    def step() -> None:
        loss = opt.loss(model(x), f)
        opt.zero_grad()
        loss.backward()
        opt.step()

    return step


def compare(what: str, costly: Callable[[], None], plain: Callable[[], None]) -> None:
    for step in (costly, plain):
        for _ in range(5):
            step()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for step, its in zip((costly, plain), times, strict=True):
            start = time.process_time()
            step()
            its.append(time.process_time() - start)
    size = STEPS // PARTS
    ratios = [
        statistics.mean(times[0][i : i + size]) / statistics.mean(times[1][i : i + size]) for i in range(0, STEPS, size)
    ]
    mean = [1e3 * statistics.mean(t) for t in times]
    print(
        f"{what}: {mean[0]:.1f} against {mean[1]:.1f} ms a step, {mean[0] / mean[1]:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    compare("two heads beside one", heads(True), heads(False))
    compare("a PINN by autograd beside natgrad.pde", pinn(ByAutograd), pinn(ByHand))
    compare("a PINN by torch.func beside natgrad.pde", pinn(ByTransforms), pinn(ByHand))


if __name__ == "__main__":
    main()
