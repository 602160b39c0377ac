"""Influence scores, batch after batch of the training data."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.terms import Terms
from natgrad.distributed.gathering import jointly
from natgrad.linalg import BlockDiagonal, Operator
from natgrad.uses.covariance import output_covariance
from natgrad.uses.objective import Objective, sum_over
from natgrad.uses.queries import Queries
from natgrad.uses.rows import Rows


class Top(NamedTuple):
    """The training examples with the largest scores: `values` and `indices`, `(queries, k)` each."""

    values: Tensor
    indices: Tensor


class Scores(Tensor):
    """Influence scores, `(queries, training examples)`: a tensor, with `top`.

    Example:
        >>> import torch
        >>> from natgrad.uses.scores import Scores
        >>> Scores(torch.tensor([[0.1, -2.0, 0.7]])).top(2).indices.tolist()
        [[2, 0]]
    """

    def __new__(cls, values: Tensor) -> Scores:
        """The same tensor, with `top`."""
        return values.as_subclass(cls)

    def top(self, k: int = 10, against: bool = False) -> Top:
        """The `k` training examples that speak most for each query; or `against` it, the lowest scores first."""
        most = self.shape[-1]
        if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= most:
            raise ValueError(
                f"k={k} is not usable: expected a whole number, at least 1 and at most the {most} training examples"
            )
        values, indices = self.as_subclass(Tensor).topk(k, -1, largest=not against)
        return Top(values, indices)


def scores_of(objective: Objective, train: Any, queries: list[Queries], per: str) -> Tensor:
    """The inner products of queries with the gradient of every training example, of this rank's data."""

    def of(rows: Rows) -> Tensor:
        return torch.cat([q.position_scores(rows) if per == "token" else q.scores(rows) for q in queries])

    found = []
    with jointly(objective.world, "the scores"):
        for batch in objective.batches("train", train):
            found.append(sum_over(objective.weights, map(of, batch)))
        return _joined(found, objective, (sum(q.count for q in queries),))


def of_themselves(
    objective: Objective, train: Any, inverse: Operator, refine_by: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """`∇ᵀ (F + λ I)⁻¹ ∇` of every training example of this rank's data."""
    found = []
    with jointly(objective.world, "the scores"):
        for batch in objective.batches("train", train):
            found.append(_with_itself(objective, batch, inverse, refine_by))
        return _joined(found, objective, ())


def _joined(found: list[Tensor], objective: Objective, lead: tuple[int, ...]) -> Tensor:
    """The scores of all batches, the training examples along the second axis, or the first where there is no `lead`.

    Raises:
        ValueError: if they are not finite.
    """
    axis = len(lead)
    if not found:  # a rank without data
        return torch.zeros(*lead, 0, dtype=objective.dtype, device=objective.device)
    scores = torch.cat(found, axis)
    bad = ~torch.isfinite(scores).movedim(axis, 0).flatten(1).all(1) if scores.ndim > 1 else ~torch.isfinite(scores)
    if bad.any():
        raise ValueError(
            f"the scores of {int(bad.sum())} training examples are not finite, of which the first is example "
            f"{int(bad.nonzero()[0])}; look for NaN or inf in train, and in its targets"
        )
    return scores


def _with_itself(
    objective: Objective, batch: tuple[Rows, ...], inverse: Operator, solved: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """`∇ᵀ (F + λ I)⁻¹ ∇` of every example."""
    rows = batch[0]
    if solved is None and isinstance(inverse, BlockDiagonal) and not isinstance(objective.problem, Terms):
        return output_covariance(rows, inverse, diagonal=True)[:, 0]
    found = []
    step = max(1, (1 << 25) // rows.space.size)
    for start in range(0, len(rows), step):
        g = objective.gradients(batch, slice(start, start + step))
        found.append((g * (inverse @ g if solved is None else solved(g))).sum(1))
    return torch.cat(found)
