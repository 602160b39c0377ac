"""A user's program, for mypy --strict against the installed wheel; it runs, too."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import natgrad
from natgrad.linalg import CenteredKronecker, Estimate, Kronecker, Operator, Space
from natgrad.losses import Likelihood
from natgrad.report.residual import LayerResidual, ResidualReport

Batch = tuple[Tensor, Tensor]


def batches(count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield torch.randn(8, 4), torch.randint(3, (8,))


def curvature(model: nn.Module, data: list[Batch]) -> Operator:
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure="kfac", params=lambda name: "bias" not in name)
    space: Space = F.space
    trace: Tensor = F.trace()
    estimate: Estimate = F.estimate_trace(samples=4)
    blocks: dict[str, Operator] = F.blocks
    print(space.size, trace.item(), estimate.value, sorted(blocks))
    path = Path(mkdtemp()) / "fisher.safetensors"
    F.save(path)
    loaded: Operator = natgrad.load(path)
    return 2.0 * loaded + F.inverse(damping=1e-3)


def train(model: nn.Module, data: list[Batch]) -> dict[str, Any]:
    opt: torch.optim.Optimizer = natgrad.PRONG(model, lr=0.1)
    kfac = natgrad.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, momentum=0.9, damping=0.1)
    for x, y in data:
        loss: Tensor = kfac.loss(model(x), y)
        kfac.zero_grad()
        loss.backward()
        kfac.step()
    opt.zero_grad()
    return kfac.diagnostics


def inspect(model: nn.Module, data: list[Batch]) -> LayerResidual:
    report: ResidualReport = natgrad.residual(model, nn.CrossEntropyLoss(), data, permutations=0)
    return report["0"]


if __name__ == "__main__":
    net, some = nn.Sequential(nn.Linear(4, 3)), list(batches(2))
    print(curvature(net, some), train(net, some)["accepted"], inspect(net, some).relative)
    print(Kronecker(torch.eye(2), torch.eye(3)).solve(torch.ones(3, 2), damping=0.1))
    print(CenteredKronecker(covariance=torch.eye(2), mean=torch.ones(2), output=torch.eye(3)).logdet())
    print(Likelihood(lambda f: Normal(f, 1.0))(torch.ones(2), torch.ones(2)).item())
