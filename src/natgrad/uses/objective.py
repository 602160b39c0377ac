"""The objective of a model on data, as rows: each example's gradient, of one loss or of the sum of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.problem import Problem
from natgrad.curvature.terms import Terms
from natgrad.uses.order import rows_in_order
from natgrad.uses.rows import Columns, Rows, loss_columns


class Objective:
    """`ℓ_i = Σ_t ω_t ℓ_ti` of every example, from the problem of one loss, or of several terms.

    A batch is a tuple with the rows of every term. What is linear in the gradient is summed over the terms, with the
    `weights` `ω`.
    """

    def __init__(self, problem: Problem | Terms):
        self.problem = problem
        self.terms: dict[str, Problem] = problem.problems if isinstance(problem, Terms) else {"": problem}
        self.weights: list[float] = list(problem.weights.values()) if isinstance(problem, Terms) else [1.0]
        first = next(iter(self.terms.values()))
        self.model, self.parameters, self.dtype, self.device = first.model, first.parameters, first.dtype, first.device
        self.world = first.world

    def batches(
        self, name: str, data: Any, columns: Callable[[Problem], Columns] = loss_columns
    ) -> Iterator[tuple[Rows, ...]]:
        """The rows of every batch, in the data's order. The terms share one pass over the data.

        Raises:
            ValueError: if the order may change, or the terms have different numbers of examples.
        """
        problems = list(self.terms.values())
        shared = tee(problems[0], len(problems))
        each = [rows_in_order(name, p, data, columns(p), its) for p, its in zip(problems, shared, strict=True)]
        for batch in zip(*each, strict=True):
            sizes = {term: len(rows) for term, rows in zip(self.terms, batch, strict=True)}
            if len(set(sizes.values())) > 1:
                found = ", ".join(f"{n} of {term!r}" for term, n in sizes.items())
                raise ValueError(
                    f"a batch of {name} has outputs of {found}; expected as many rows of each, as a score is that of "
                    "an example. Leave rows without a target in, with weight 0 in the loss"
                )
            yield batch

    def gradients(self, batch: tuple[Rows, ...], part: slice = slice(None)) -> Tensor:
        """Every example's gradient, `(n, size)`."""
        found: Tensor | None = None
        for weight, rows in zip(self.weights, batch, strict=True):
            some = rows.part(part)
            own = weight * rows.space.flatten(tuple(p[:, 0] for p in some.dense().values()))
            found = own if found is None else found + own
        assert found is not None
        return found


def sum_over(weights: list[float], each: Iterator[Tensor]) -> Tensor:
    """`Σ_t ω_t each_t`."""
    return torch.stack([w * t for w, t in zip(weights, each, strict=True)]).sum(0)
