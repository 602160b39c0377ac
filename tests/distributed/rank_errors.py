"""What ranks are told where something is wrong; each function is given the ranks' group, and returns what was said."""

from __future__ import annotations

import datetime
import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import natgrad
from rank_training import Equation
from work import batch, network, placed, share_of


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


def refused_with_shards(group: Any, way: str) -> str:
    """The error for a model with shards whose forward takes derivatives. It is one unit: torch cannot differentiate
    within the forward if each layer frees its weight."""
    model = fully_shard(Equation(way), mesh=DeviceMesh.from_group(group, "cpu"))
    opt = natgrad.KFAC(model, nn.MSELoss())
    x, y = batch(0, 6)
    try:
        opt.loss(model(x), y[:, None].double())
    except NotImplementedError as error:
        return str(error)
    return ""
