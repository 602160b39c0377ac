"""What ranks do with NewtonMuon in the tests: each function is given the ranks' group, and is called on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natgrad
import work

OPTIONS = {"lr": 0.05, "refresh_every": 3, "momentum": 0.9}


def network() -> nn.Module:
    """With a kernel, rows of one weight apart, and an embedding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(work.D, 7), nn.Tanh(), nn.LayerNorm(7), Packed(), nn.Tanh(), nn.Linear(7, 3)
    ).double()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(14, 7) / 3), nn.Parameter(torch.zeros(14))

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (c, d) = self.weight.chunk(2), self.bias.chunk(2)
        return F.linear(x, a, c).tanh() + F.linear(x.square(), b, d).tanh()


def trained(group: Any, steps: int, how: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after some steps, of one process (`group=None`) or of several with their parts of each batch."""

    model = network()
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    late = how.get("late", False)
    opt = natgrad.NewtonMuon(model, **OPTIONS, **how.get("options", {})) if late else None
    called = work.placed(model, group, how.get("sharded", ""))
    opt = opt or natgrad.NewtonMuon(called, **OPTIONS, **how.get("options", {}))
    if how.get("load"):
        weights = model.state_dict()
        dcp.load({"model": weights}, checkpoint_id=how["load"], process_group=group, no_dist=group is None)
        model.load_state_dict(weights)
        natgrad.load_checkpoint(opt, how["load"])
    for step in range(how.get("first", 0), steps):
        opt.zero_grad()
        for k in range(how.get("microbatches", 1)):
            x, y = work.batch(step * 2 + k)
            own = work.share_of(len(x), rank, size, False)
            F.cross_entropy(called(x[own]), y[own]).backward()
        opt.step()
    if how.get("save"):
        state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        dcp.save(state, checkpoint_id=how["save"], process_group=group, no_dist=group is None)
    return {n: work.whole(p) for n, p in model.named_parameters()}


def routes(group: Any) -> dict[str, str]:
    """The steps where each rank has used another branch."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(work.D, 7)
            self.branches = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
            self.head = nn.Linear(7, 3)

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.head(self.branches[which](self.first(x).tanh()).tanh())

    torch.manual_seed(0)
    model = Branches().double()
    called = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    opt = natgrad.NewtonMuon(called, lr=0.05)
    for step in range(5):
        x, y = work.batch(step)
        opt.zero_grad()
        F.cross_entropy(called(x, dist.get_rank(group)), y).backward()
        opt.step()
    others = [torch.zeros_like(model.branches[0].weight) for _ in range(2)]
    dist.all_gather(others, model.branches[0].weight.detach(), group=group)
    assert torch.equal(*others)
    return {n: route.step for n, route in opt.routing().items()}


def spoiled(group: Any) -> list[bool]:
    """Which steps were accepted, where one rank's gradient is not finite in the third."""
    model = network()
    called = work.placed(model, group, "fsdp")
    opt = natgrad.NewtonMuon(called, **OPTIONS)
    accepted = []
    for step in range(5):
        x, y = work.batch(step)
        opt.zero_grad()
        F.cross_entropy(called(x), y).backward()
        if step == 2 and dist.get_rank(group) == 1:
            next(p for p in model.parameters()).grad.to_local().fill_(float("nan"))
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
        accepted.append(opt.diagnostics["accepted"])
    assert all(work.whole(p).isfinite().all() for p in model.parameters())
    return accepted


def joined(group: Any) -> str:
    """The error within `DistributedDataParallel.join()`."""
    model = network()
    called = work.placed(model, group, "")
    opt = natgrad.NewtonMuon(called, **OPTIONS)
    try:
        with called.join():
            F.cross_entropy(called(work.batch(0)[0]), work.batch(0)[1]).backward()
            opt.step()
    except RuntimeError as error:
        return str(error)
    return ""


def one_ranks_state(group: Any) -> str:
    """The error where the state of a rank with shards is given to an optimizer of the whole model."""
    model = network()
    called = work.placed(model, group, "fsdp")
    opt = natgrad.NewtonMuon(called, **OPTIONS)
    x, y = work.batch(0)
    F.cross_entropy(called(x), y).backward()
    opt.step()
    try:
        natgrad.NewtonMuon(network(), **OPTIONS).load_state_dict(opt.state_dict())
    except ValueError as error:
        return str(error)
    return ""
