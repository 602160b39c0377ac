"""Training on several ranks: each function is given the ranks' group, and is called on all of them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

import natgrad
from work import C, D, batch, network, placed, share_of, whole


def trained(
    group: Any,
    options: dict[str, Any],
    steps: int,
    *,
    uneven: bool | str = False,
    microbatches: int = 1,
    reduction: str = "mean",
    clip: float | None = None,
    sharded: str = "",
    first: int = 0,
    load: str = "",
    save: str = "",
    dtype: torch.dtype = torch.float64,
    few: bool | str = False,
    raw: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights after some steps, and the steps' diagnostics. `group`: None for one process that sees everything.
    The steps begin with the `first`, from the checkpoint `load`; `save` is the folder of one after the last. `raw`:
    each input has another unit."""
    model = network(few).to(dtype)
    units = 10.0 ** -torch.arange(D) if raw else torch.ones(D)
    with torch.no_grad():
        next(model.parameters()).div_(units)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    called = placed(model, group, sharded)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    opt = natgrad.KFAC(called, loss_fn, **options)
    diagnostics = []
    if load:
        weights = model.state_dict()
        dcp.load({"model": weights}, checkpoint_id=load, process_group=group, no_dist=group is None)
        model.load_state_dict(weights)
        natgrad.load_checkpoint(opt, load)
    for step in range(first, steps):
        opt.zero_grad()
        for k in range(microbatches):
            x, y = batch(step * microbatches + k)
            x = x * units
            own = share_of(len(x), rank, size, uneven if uneven != "none" or step % 3 == 1 else False)
            loss = opt.loss(called(x[own].to(dtype)), y[own])
            (loss / (microbatches if reduction == "mean" else microbatches * len(x) / size)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
        diagnostics.append({k: v for k, v in opt.diagnostics.items() if k != "diagonal_factors"})
    if save:
        state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        dcp.save(state, checkpoint_id=save, process_group=group, no_dist=group is None)
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return weights | {"0.weight": weights["0.weight"] * units}, diagnostics


def trained_in(group: Any, options: dict[str, Any], steps: int, how: dict[str, Any]) -> Any:
    """`trained`, with its options in a dictionary."""
    return trained(group, options, steps, **how)


class TrainingStep(nn.Module):
    """A module whose forward is a whole training step, as Lightning's are in `DistributedDataParallel`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, opt: Any, x: Tensor, y: Tensor) -> Tensor:
        return opt.loss(self.model(x), y)


class Sometimes(nn.Linear):
    """A layer that adds its bias where the last input is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x[:, :-1], self.weight, self.bias if bool(x[0, -1] > 0) else None)


def used_in_part(
    group: Any, sharded: str, options: dict[str, Any], microbatches: int, period: int
) -> dict[str, Tensor]:
    """The weights where every `period`-th microbatch does not use the bias of the first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(Sometimes(D, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, C)).double()
    called = placed(model, group, sharded)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    opt = natgrad.KFAC(called, nn.CrossEntropyLoss(), statistics_every=2, **options)
    for step in range(9):
        opt.zero_grad()
        for k in range(step * microbatches, (step + 1) * microbatches):
            x, y = batch(k)
            x = torch.cat([x, torch.full_like(x[:, :1], -1.0 if (k + 1) % period == 0 else 1.0)], 1)
            own = share_of(len(x), rank, size, False)
            (opt.loss(called(x[own]), y[own]) / microbatches).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
    return {n: whole(p) for n, p in model.named_parameters()}


def trained_within(group: Any, how: str, options: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """The weights where the optimizer is made before `DistributedDataParallel`, as Accelerate has it (`"late"`), or for
    a part of what is in it (`"part"`)."""
    model = network()
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
    whole = DistributedDataParallel(model if how == "late" else TrainingStep(model), process_group=group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(steps):
        x, y = batch(step)
        own = share_of(len(x), rank, size, True)
        loss = opt.loss(whole(x[own]), y[own]) if how == "late" else whole(opt, x[own], y[own])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def dropped(group: Any) -> dict[str, Tensor]:
    """The weights after steps before each of which one rank has asked for a loss that it has not used."""
    model = network()
    called = placed(model, group, "") if group is not None else model
    opt = natgrad.KFAC(called, nn.CrossEntropyLoss(), estimator="exact", statistics_every=2)
    size = 1 if group is None else dist.get_world_size(group)
    for step in range(6):
        x, y = batch(step, 24)
        own = slice(None) if group is None else slice(dist.get_rank(group), None, size)
        if group is not None and dist.get_rank(group) == 1:
            with called.no_sync():
                opt.loss(called(x[:4]), y[:4])
        opt.loss(called(x[own]), y[own]).backward()
        opt.step()
        opt.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def joined(group: Any, options: dict[str, Any], batches: list[int]) -> dict[str, Tensor]:
    """The weights after each rank has trained on so many batches of its own; one process: on the whole ones."""
    model = network()
    called = placed(model, group, "")
    opt = natgrad.KFAC(called, nn.CrossEntropyLoss(), **options)
    rank = 0 if group is None else dist.get_rank(group)
    with contextlib.nullcontext() if group is None else Join([called, opt]):
        for step in range(max(batches) if group is None else batches[rank]):
            x, y = batch(step, 12 * len(batches))
            own = [
                slice(12 * r, 12 * r + 12) for r, n in enumerate(batches) if n > step and (group is None or r == rank)
            ]
            x, y = torch.cat([x[s] for s in own]), torch.cat([y[s] for s in own])
            opt.zero_grad()
            opt.loss(called(x), y).backward()
            opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Labelled(nn.Module):
    """A model that computes the loss of its labels itself."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained_on_own_loss(group: Any, sharded: str, options: dict[str, Any], uneven: bool) -> dict[str, Tensor]:
    """The weights after steps by a model's own loss."""
    model = Labelled()
    called = placed(model, group, sharded)
    opt = natgrad.KFAC(called, "model", **options)
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    for step in range(12):
        x, y = batch(step)
        own = share_of(len(x), rank, size, uneven)
        opt.zero_grad()
        called(x[own], labels=y[own])["loss"].backward()
        opt.step()
    return {n: whole(p) for n, p in model.named_parameters()}


class Headed(nn.Module):
    """Two heads on one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = network()
        self.other = nn.Linear(C, 2).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"class": h, "box": self.other(h.tanh())}


def trained_on_terms(group: Any, sharded: str, options: dict[str, Any], uneven: bool) -> dict[str, Tensor]:
    """The weights after steps by two terms."""
    torch.manual_seed(1)
    model = Headed()
    called = placed(model, group, sharded)
    opt = natgrad.KFAC(called, {"class": nn.CrossEntropyLoss(), "box": nn.SmoothL1Loss()}, **options)
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    for step in range(12):
        x, y = batch(step)
        own = share_of(len(x), rank, size, uneven)
        out = called(x[own])
        opt.zero_grad()
        loss = opt.loss["class"](out["class"], y[own]) + 0.5 * opt.loss["box"](out["box"], x[own, :2])
        loss.backward()
        opt.step()
    return {n: whole(p) for n, p in model.named_parameters()}


class Equation(nn.Module):
    """`Δu + u` of a network with one output, by autograd or by `torch.func`."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(2)
        self.u, self.way = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 1)).double(), way

    def forward(self, x: Tensor, inside: bool = True) -> Tensor:
        if not inside:
            return self.u(x)
        if self.way == "torch.func":
            curved = torch.func.vmap(torch.func.hessian(lambda z: self.u(z)[0]))(x)
            return curved.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + self.u(x)
        x = x.clone().requires_grad_()
        u = self.u(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(D)]
        return sum(second)[:, None] + u


def trained_on_derivatives(group: Any, way: str, options: dict[str, Any], uneven: bool | str) -> dict[str, Tensor]:
    """The weights after steps by an equation inside and conditions on the boundary."""
    model = Equation(way)
    called = placed(model, group, "")
    opt = natgrad.KFAC(called, {"inside": nn.MSELoss(), "boundary": nn.MSELoss()}, **options)
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    for step in range(8):
        x, y = batch(step)
        own = share_of(len(x), rank, size, uneven if uneven != "none" or step % 3 == 1 else False)
        x, y = x[own], y[own, None].double()
        opt.zero_grad()
        loss = opt.loss["inside"](called(x), y)
        if step != 2:
            loss = loss + 0.5 * opt.loss["boundary"](called(x.tanh(), False), y)
        loss.backward()
        opt.step()
    return {n: whole(p) for n, p in model.named_parameters()}
