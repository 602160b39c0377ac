"""Whether data come in a fixed order, where results are told apart by their place in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from natgrad.curvature.problem import Problem
from natgrad.uses.rows import Columns, Rows, rows_of


def rows_in_order(
    name: str, problem: Problem, data: Any, columns: Columns, batches: Iterable[Any] | None = None
) -> Iterator[Rows]:
    """The rows of every batch of a problem whose batches are the same at each pass; `batches` are those of one pass.

    Unless the data are known to be, the first batch is read again at the end, and its outputs and targets compared.

    Raises:
        ValueError: if they are not.
    """
    sampler = _sampler(data)
    if isinstance(sampler, RandomSampler):
        raise ValueError(
            f"{name} is a DataLoader that shuffles, so the order of the scores would be unknown; expected one with "
            "shuffle=False"
        )
    first: Any = None
    for rows in rows_of(problem, columns, batches):
        first = (rows.output, rows.target) if first is None else first
        yield rows
    if isinstance(data, (list, tuple)) or isinstance(sampler, SequentialSampler):
        return
    for batch in problem:
        with torch.no_grad():
            again = problem.run(problem.model, batch)
        if not _same(first, again):
            raise ValueError(
                f"the first batch of {name} differs between two passes, so the order of the scores would be unknown; "
                "expected the same batches at each pass, without shuffling or random augmentation, and a model in "
                "evaluation mode"
            )
        return


def _sampler(data: Any) -> Any:
    """What decides the order of a DataLoader's examples, if it is known."""
    if not isinstance(data, DataLoader):
        return None
    return data.sampler if data.batch_sampler is None else getattr(data.batch_sampler, "sampler", None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-3)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True
