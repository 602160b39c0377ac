"""What ranks send to one another, and when; each function is given the ranks' group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

import natgrad
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.problem import Problem
from natgrad.distributed.packing import leaves
from natgrad.distributed.sizes import Size, sizes_of
from natgrad.linalg.state import dump
from work import batch, network


def sent(group: Any) -> dict[str, int]:
    """The bytes that this rank gives in the first step, by purpose."""
    model = DistributedDataParallel(network(), process_group=group)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, momentum=0.9, damping=0.1)
    x, y = batch(0)
    opt.loss(model(x), y).backward()
    opt.step()
    return dict(opt.parameters.place.world.sent)


def under_way(group: Any) -> list[tuple[bool, ...]]:
    """Whether the moments were on their way before the backward: for the one microbatch of a step; for each of two, the
    first within no_sync(); after a loss that a rank has not used; where a rank's batch is empty; within a Join."""
    model = DistributedDataParallel(network(), process_group=group)
    rank = dist.get_rank(group)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, momentum=0.9, damping=0.1, statistics_every=1)
    said = []

    def forward(step: int, size: int = 24) -> bool:
        x, y = batch(step, size)
        before = opt.parameters.place.world.sent["the moments"]
        loss = opt.loss(model(x), y)
        sent = opt.parameters.place.world.sent["the moments"] > before
        loss.backward()
        return sent

    def step(*sent: bool) -> None:
        opt.step()
        opt.zero_grad()
        said.append(sent)

    step(forward(0))
    with model.no_sync():
        first = forward(1)
    step(first, forward(2))
    if rank == 0:
        with model.no_sync():
            opt.loss(model(batch(3)[0]), batch(3)[1])
    step(forward(4))
    step(forward(5, 24 if rank else 0))
    with Join([model, opt]):
        step(forward(6))
    return said


def moments_of(model: nn.Module, x: Tensor) -> tuple[Any, Any, int]:
    """What `sizes_of` takes, of a model with squared errors."""
    structure = KfacStructure()
    problem = Problem(model, nn.MSELoss(), (x, torch.zeros_like(model(x))))
    structure.add(next(iter(problem.cases())))
    return structure.moments, problem.parameters, len(x)


def planned(group: Any, adaptive: bool) -> tuple[list[Size], dict[str, int], int]:
    """The planned sizes of the network, what the first step sent, and the bytes of moments and inverse."""
    model = DistributedDataParallel(network(), process_group=group)
    step = {} if adaptive else {"lr": 0.1, "momentum": 0.9}
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), damping=0.1, **step)
    x, y = batch(0)
    opt.loss(model(x), y).backward()
    opt.step()
    structure = KfacStructure()
    problem = Problem(model.module, nn.CrossEntropyLoss(), (x, y))
    structure.add(next(iter(problem.cases())))
    moments = leaves([vars(m) for m in opt.recipe.preconditioner.running.total.moments.values()], Tensor)
    inverses = leaves([dump(block.operator) for block in (opt.recipe.preconditioner.inverse or {}).values()], Tensor)
    held = sum(t.nbytes for t in [*moments, *inverses])
    return sizes_of(structure.moments, problem.parameters, len(x)), dict(opt.parameters.place.world.sent), held
