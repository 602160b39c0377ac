"""What ranks do in the tests: each function is given the ranks' group, and is called on all of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import natgrad
from natgrad.curvature.problem import Problem
from natgrad.curvature.structures import KfacStructure
from natgrad.distributed.packing import leaves
from natgrad.distributed.sizes import Size, sizes_of
from natgrad.linalg.state import dump

D, C, N = 5, 3, 48


def batch(step: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def network(few: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if few:  # layers than some of four ranks have none of
        return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C)).double()
    return nn.Sequential(
        nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, C)
    ).double()


def placed(model: nn.Module, group: Any, sharded: str) -> nn.Module:
    """The model on a group's ranks: `""` by DistributedDataParallel, `"fsdp"` or `"hsdp"` by fully_shard; as it is
    without a group."""
    if group is None:
        return model
    if not sharded:
        return DistributedDataParallel(model, process_group=group)
    if sharded == "fsdp":
        mesh = DeviceMesh.from_group(group, "cpu")
    else:
        mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(2, -1), mesh_dim_names=("copy", "shard"))
    for part in list(model.modules())[1:]:
        if any(True for _ in part.parameters(recurse=False)) and not isinstance(part, nn.LayerNorm):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def share_of(n: int, rank: int, size: int, uneven: bool | str) -> slice:
    """A rank's part of a batch of `n`; with `"none"` the last rank has none of it."""
    if uneven == "none" and size > 1:
        return slice(n, n) if rank == size - 1 else share_of(n, rank, size - 1, False)
    if not uneven:
        return slice(rank * n // size, (rank + 1) * n // size)
    cuts = [0, *(n * (r + 1) ** 2 // size**2 for r in range(size))]
    return slice(cuts[rank], cuts[rank + 1])


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
    few: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights after some steps, and the steps' diagnostics. `group`: None for one process that sees everything.
    The steps begin with the `first`, from the checkpoint `load`; `save` is the folder of one after the last."""
    model = network(few).to(dtype)
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
    return {n: whole(p) for n, p in model.named_parameters()}, diagnostics


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


def refused_within(group: Any, kind: str) -> str:
    """The error of an optimizer that is not for several ranks, and was made before there were."""
    model = network()
    opt = natgrad.PRONG(model, lr=0.1) if kind == "PRONG" else natgrad.NaturalGradient(model, nn.CrossEntropyLoss())
    try:
        DistributedDataParallel(model, process_group=group)(batch(0)[0])
    except NotImplementedError as error:
        return str(error)
    return f"{opt} was not refused"


def refused(group: Any, kind: str) -> str:
    """The error of an optimizer that is not for several ranks."""
    model = DistributedDataParallel(network(), process_group=group)
    try:
        getattr(natgrad, kind)(model, nn.CrossEntropyLoss())
    except NotImplementedError as error:
        return str(error)
    return ""


def refused_by_prong(group: Any) -> str:
    """The error of PRONG on several ranks."""
    try:
        natgrad.PRONG(DistributedDataParallel(network(), process_group=group), lr=0.1)
    except NotImplementedError as error:
        return str(error)
    return ""


def spoiled(group: Any) -> list[tuple[bool, str]]:
    """What each step says where one rank's batch has a NaN in the third."""
    model = DistributedDataParallel(network(), process_group=group)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    said = []
    for step in range(8):
        x, y = batch(step)
        own = share_of(len(x), dist.get_rank(group), dist.get_world_size(group), False)
        x = x[own].clone()
        if step == 2 and dist.get_rank(group) == 1:
            x[0, 0] = float("nan")
        opt.zero_grad()
        opt.loss(model(x), y[own]).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
        said.append((opt.diagnostics["accepted"], opt.diagnostics["reason"]))
    assert all(p.isfinite().all() for p in model.parameters())
    return said


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


def state_of_one_rank(group: Any) -> str:
    """The error where the state of a rank with shards is given to an optimizer of the whole model."""
    model = placed(network(), group, "fsdp")
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    x, y = batch(dist.get_rank(group))
    opt.loss(model(x), y).backward()
    opt.step()
    try:
        natgrad.KFAC(network(), nn.CrossEntropyLoss()).load_state_dict(opt.state_dict())
    except ValueError as error:
        return str(error)
    return ""


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


def nothing(group: Any) -> str:
    """The error where no rank has data."""
    model = placed(network(), group, "")
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    x, y = batch(0, 0)
    try:
        opt.loss(model(x), y)
    except ValueError as error:
        return str(error)
    return ""


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


def left_alone(rank: int, file: str, how: str, outbox: Any) -> None:
    """A process of its own: what rank 0 says where rank 1 dies, or hangs, between backward and step."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=4 if how == "hangs" else 60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=wait)
    model = DistributedDataParallel(network())
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    for step in range(3):
        x, y = batch(step)
        opt.zero_grad()
        opt.loss(model(x), y).backward()
        if rank == 1 and step == 2:
            if how == "dies":
                os._exit(1)
            time.sleep(60)
        try:
            opt.step()
        except RuntimeError as error:
            outbox.put(str(error).replace("\n", " "))
            return


def own_data(group: Any, share: str) -> list[tuple[Tensor, Tensor]]:
    """A rank's batches of the whole of four; one process has them all."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    every = [batch(k, 10 + k) for k in range(4)]
    if share == "even" or size == 1:
        return every[rank::size]
    if share == "none":
        return every if rank == size - 1 else []
    return every[:1] if rank == 0 else every[1:] if rank == 1 else []


def in_ddp(group: Any) -> nn.Module:
    return network() if group is None else DistributedDataParallel(network(), process_group=group)


def matrix(group: Any, asked: dict[str, Any], reduction: str, share: str) -> Tensor:
    """What a matrix is, dense; of an implicit one, some products."""
    options = dict(asked)
    function = getattr(natgrad, options.pop("kind", "fisher"))
    data = own_data(None, "even") if share == "same" else own_data(group, share)
    operator = function(in_ddp(group), nn.CrossEntropyLoss(reduction=reduction), data, **options)
    if options.get("structure") != "implicit":
        return operator.to_dense()
    size = operator.space.size
    vectors = torch.randn(4, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.stack([operator @ v for v in vectors])


def labels(group: Any) -> list[float]:
    """Some of the numbers that labels come from."""
    problem = Problem(in_ddp(group), nn.CrossEntropyLoss(), own_data(group, "even"), estimator="mc")
    return torch.rand(5, generator=problem._labels).tolist()


def residuals(group: Any, share: str) -> dict[str, dict[str, Any]]:
    """The figures of each layer, of which none hangs on the order of the cases but by rounding."""
    generator = torch.Generator().manual_seed(3)
    report = natgrad.residual(
        in_ddp(group), nn.CrossEntropyLoss(), own_data(group, share), generator=generator, permutations=0
    )
    return {name: {k: v for k, v in vars(layer).items() if isinstance(v, float)} for name, layer in report.items()}


def matrix_error(group: Any, asked: dict[str, Any], what: str) -> str:
    """The error where one rank's data is spoiled, or all ranks' is."""
    data: Any = own_data(group, "even")
    rank = dist.get_rank(group)
    model = in_ddp(group)
    if what == "nan" and rank == 2:
        data[0][0][0, 0] = float("nan")
    if what == "key" and rank == 2:
        data = Broken()
    if what == "empty":
        data = []
    if what == "sharded":
        model = placed(network(), group, "fsdp")
    if what == "vectors":
        asked = {"structure": "implicit"}
    try:
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, **asked)
        F @ torch.full((F.space.size,), 1.0 + (what == "vectors") * rank, dtype=torch.float64)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Broken:
    """A data set without what it is asked for."""

    def __iter__(self) -> Any:
        raise KeyError("images")


def estimated(group: Any) -> tuple[float, float]:
    """The trace of an implicit matrix, estimated, and as it is."""
    torch.manual_seed(dist.get_rank(group))
    F = natgrad.fisher(in_ddp(group), nn.CrossEntropyLoss(), own_data(group, "even"), "implicit")
    return float(F.estimate_trace(60).value), float(F.to_dense().trace())


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
