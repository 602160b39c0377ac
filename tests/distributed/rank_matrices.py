"""Matrices on several ranks: each function is given the ranks' group, and is called on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natgrad
from natgrad.curvature.problem import Problem
from work import batch, network, placed


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
