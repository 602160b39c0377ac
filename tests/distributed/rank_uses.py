"""Uses of matrices on several ranks: each function is given the ranks' group, and is called on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natgrad
from models import MODELS
from rank_matrices import in_ddp, own_data
from work import batch

QUERY = batch(9, 3)


def influences(group: Any, asked: dict[str, Any], share: str, itself: bool = False) -> Tensor:
    """The scores of a rank's own training examples."""
    query = None if itself else [QUERY]
    data = own_data(group, share)
    return natgrad.influence(in_ddp(group), nn.CrossEntropyLoss(), data, query, damping=0.01, **asked)


def of_words(group: Any, rank: int | None) -> Tensor:
    """The scores of a rank's own texts, under a small GPT-2."""
    torch.manual_seed(0)
    example = MODELS["GPT-2"]()
    model = example.model.double().eval()
    part = slice(None) if group is None else slice(dist.get_rank(group), None, dist.get_world_size(group))
    data, query = [(example.x[part], example.y[part])], [(example.x[:2], example.y[:2])]
    return natgrad.influence(
        model if group is None else DistributedDataParallel(model, process_group=group), nn.CrossEntropyLoss(), data,
        query, rank=rank, damping=0.01, forward=example.forward, centered=False,
    )  # fmt: skip


def influence_error(group: Any, what: str) -> str:
    """The error where one rank's data or queries are spoiled."""
    data, query, asked = own_data(group, "even"), QUERY, {}
    if dist.get_rank(group) == 1:
        if what == "nan":
            data[-1][0][0, 0] = float("nan")
        if what == "queries":
            query = batch(8, 3)
    if what == "factors":
        asked = {"factors": natgrad.fisher(in_ddp(group), nn.CrossEntropyLoss(), data)}
        data = [(x, y.where(y < 0, 99)) for x, y in data] if dist.get_rank(group) == 1 else data
    if what == "itself":
        query, asked = None, {"refine": 3}
    try:
        natgrad.influence(in_ddp(group), nn.CrossEntropyLoss(), data, query, **asked)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def posterior(group: Any, structure: str, share: str) -> tuple[float, float, Tensor]:
    """The evidence of a fitted posterior, its prior, and what one rank alone predicts with it."""
    P = natgrad.laplace(in_ddp(group), nn.CrossEntropyLoss(), own_data(group, share), structure).fit_prior()
    first = group is None or dist.get_rank(group) == 0
    predicted = P.predict(QUERY[0]) if first else torch.zeros(0)  # on one rank alone
    delta = float(next(iter(P.prior_precision.values())))
    return float(P.log_marginal_likelihood()), delta, predicted
