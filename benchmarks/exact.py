"""What an exact step costs, against the least that it has to do; and how that grows.

python -m benchmarks.exact [--steps 9]

For six networks and numbers of points a step of `NaturalGradient` (loss, backward, columns, matrix, Cholesky factor,
trial loss, and with `accelerate` one more forward) is timed in turn with its floor, written by hand: a forward and a
backward to the layers' outputs, the columns `S` of each layer in chunks, the smaller of `SᵀS` and `S Sᵀ` by its lower
triangle, a Cholesky factor and a solve. Steps that were tried more than once are left out. Medians, and the middle half
of the ratios.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine
from natgrad.linalg.gram import add_square
from natgrad.study.pinns import Batch, objective, pinn

F64 = torch.float64
WIDTH = 2048
"""Rows of `S` at a time."""
PINNS = ("poisson2d-257", "poisson5d-449", "poisson2d-9873", "heat4d-10065", "poisson2d-116097")


class Plain(nn.Module):
    """A tanh network for regression: one position for each example."""

    def __init__(self, *widths: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o, dtype=F64), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        return self.net(x)


Problem = tuple[nn.Module, Batch]


def problems() -> dict[str, Callable[[], Problem]]:
    """A model and a batch with two terms, by name."""

    def of_pinn(name: str) -> Problem:
        task = pinn(name)
        return task.make_model(0), next(task.batches(0, task.batch))

    def plain() -> Problem:
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        x = torch.randn(1500, 50, dtype=F64, generator=g)
        y = x[:, :5].prod(1, keepdim=True)
        return Plain(50, 128, 64, 1), ((x[:1000], x[1000:]), (y[:1000], y[1000:]))

    return {name: (lambda name=name: of_pinn(name)) for name in PINNS} | {"regression-14785": plain}


def rows_of(model: nn.Module, x: Tensor, residual: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The output, and for every linear layer its inputs `(n, t, i)`, its outputs, and 1 where the bias is added."""
    net, found = model.net, []
    n, d = x.shape
    z = x.unsqueeze(1)
    if residual:  # the value, its derivatives, the Laplacian
        eye = torch.eye(d, dtype=F64).expand(n, d, d)
        z = torch.cat([z, eye, torch.zeros(n, 1, d, dtype=F64)], 1)
    has_bias = torch.zeros(z.shape[1], dtype=F64)
    has_bias[0] = 1
    over = model.equation.over or range(d) if residual else []
    chosen = [1 + i for i in over]
    for layer in net:
        if isinstance(layer, nn.Linear):
            h = z
            z = h @ layer.weight.mT + has_bias[:, None] * layer.bias
            found.append((h.detach(), z, has_bias))
            continue
        value = z[:, :1].tanh()
        if not residual:
            z = value
            continue
        slope = 1 - value.square()
        second = slope * z[:, -1:] - 2 * value * slope * z[:, chosen].square().sum(1, keepdim=True)
        z = torch.cat([value, slope * z[:, 1:-1], second], 1)
    if not residual:
        return z[:, 0], found
    u = natgrad.pde.Derivatives(z[:, 0], z[:, 1:-1], z[:, -1])
    return model.equation.residual(u, x), found


def floor(model: nn.Module, batch: Batch) -> None:
    """The least that a step has to do."""
    (inside, conditions), _ = batch
    every = []
    for x, residual in ((inside, hasattr(model, "equation")), (conditions, False)):
        output, layers = rows_of(model, x, residual)
        weight = torch.full_like(output, (1 / len(x)) ** 0.5)
        gradients = torch.autograd.grad(output, [a for _, a, _ in layers], weight)
        every.append([(h, g, b) for (h, _, b), g in zip(layers, gradients, strict=True)])
    size, columns = sum(p.numel() for p in model.parameters()), len(inside) + len(conditions)
    if size < columns:
        parts = [torch.cat([columns_of(*case) for case in its]) for its in zip(*every, strict=True)]
        S = torch.cat(parts, 1).mT.contiguous()
        M = torch.zeros(size, size, dtype=F64)
        add_square(M, S)
    else:
        M = torch.zeros(columns, columns, dtype=F64)
        for its in zip(*every, strict=True):
            h, g, _ = its[0]
            step = max(1, WIDTH // (h.shape[2] + 1))
            for start in range(0, g.shape[2], step):
                add_square(M, torch.cat([columns_of(h, g[..., start : start + step], b) for h, g, b in its]))
    M.diagonal().add_(1e-3)
    L = torch.linalg.cholesky(M)
    torch.cholesky_solve(torch.ones(len(M), 1, dtype=F64), L)


def columns_of(h: Tensor, g: Tensor, has_bias: Tensor) -> Tensor:
    """Columns of `S` as rows, `(n, o (i + 1))`."""
    x = torch.cat([h, has_bias[None, :, None].expand(*h.shape[:2], 1)], 2)
    return torch.bmm(g.mT, x).flatten(1)


def timed(call: Callable[[], object]) -> float:
    """Seconds of the processor, so that other programs on the machine count for little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values, dtype=F64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=F64)).tolist()
    return low, middle, high


def measure(model: nn.Module, batch: Batch, accelerate: bool, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of single steps, and of the floor after each."""
    opt = natgrad.NaturalGradient(model, nn.MSELoss(), accelerate=accelerate)

    def step() -> None:
        loss = objective(opt.loss, model, *batch)
        opt.zero_grad()
        loss.backward()
        opt.step()

    own, least = [], []
    for i in range(4 * steps):
        seconds, its_floor = timed(step), timed(lambda: floor(model, batch))
        if i > 1 and opt.diagnostics.get("tries") == 1 and opt.diagnostics["accepted"]:
            own.append(seconds)
            least.append(its_floor)
        if len(own) == steps:
            break
    return own, least


def main() -> None:
    parser = argparse.ArgumentParser(description="An exact step's time over its floor.")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(machine())
    print(f"{'problem':20}{'columns':>8}{'P':>8}{'floor':>9}{'step':>9}{'ratio':>7}  {'middle half':14}accelerated")
    for name, make in problems().items():
        cells = []
        for accelerate in (False, True):
            model, batch = make()
            own, least = measure(model, batch, accelerate, options.steps)
            low, ratio, high = quartiles([a / b for a, b in zip(own, least, strict=True)])
            cells.append((quartiles(own)[1], quartiles(least)[1], ratio, low, high))
        size = sum(p.numel() for p in model.parameters())
        columns = sum(len(x) for x in batch[0])
        (step, least_, ratio, low, high), (*_, with_bend, _, _) = cells
        times = f"{1000 * least_:7.0f}ms{1000 * step:7.0f}ms{ratio:7.2f}"
        print(f"{name:20}{columns:8}{size:8}{times}  {f'{low:.2f} to {high:.2f}':14}{with_bend:.2f}", flush=True)


if __name__ == "__main__":
    main()
