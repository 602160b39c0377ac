"""The queries of influence scores: their gradients, and inner products of vectors with the gradients of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_function, described, did_you_mean
from natgrad.curvature.problem import Problem
from natgrad.curvature.terms import Terms
from natgrad.linalg import Block, ColumnBlock, ExactBlock, Operator
from natgrad.uses.objective import Objective
from natgrad.uses.rows import Rows, loss_columns, measure_columns

BUDGET = 1 << 26
"""About how many numbers are held at a time beside the queries."""


def of_measure(asked: Objective, measure: Any) -> tuple[Objective, Callable[[Problem], Any]]:
    """The queries' objective, and what the columns of its rows are."""
    if measure is None:
        return asked, loss_columns
    several = isinstance(asked.problem, Terms)
    if isinstance(measure, str) and several:
        if measure not in asked.terms:
            raise ValueError(
                f"measure={measure!r} is no term; expected one of {', '.join(map(repr, asked.terms))}"
                f"{did_you_mean(measure, asked.terms)}"
            )
        return Objective(asked.terms[measure]), loss_columns
    if several:
        raise ValueError(
            f"measure is {described(measure)}, but there are several losses; expected "
            f"the name of one of them: {', '.join(map(repr, asked.terms))}"
        )
    check_function("measure", measure, "of the output and the target that returns one number for each example")
    return asked, lambda problem: measure_columns(measure)


def query_gradients(
    asked: Objective, query: Any, columns: Callable[[Problem], Any]
) -> Iterator[tuple[Tensor, list[Block]]]:
    """The query gradients of every batch, `(queries, size)`, with the layers that they come from.

    Raises:
        ValueError: if one is zero or not finite, or ranks have different queries.
    """
    before = 0
    for batch in asked.batches("query", query, columns):
        gradients = asked.gradients(batch)
        size = gradients.norm(dim=1)
        if not torch.isfinite(size).all():
            raise ValueError(
                f"the gradient of query {before + int((~torch.isfinite(size)).nonzero()[0])} is not finite; look for "
                "NaN or inf in the queries"
            )
        if (size == 0).any():
            raise ValueError(
                f"query {before + int((size == 0).nonzero()[0])} has no gradient: its loss does not depend on the "
                "parameters, or all of its targets are ignored; leave it out"
            )
        before += len(size)
        _check_alike(asked, size)
        yield gradients, [layer for rows in batch for layer in layers_of(rows)]
    if not before:
        raise ValueError("query is empty: expected at least one (input, target) batch, the same on every rank")


def _check_alike(asked: Objective, size: Tensor) -> None:
    """Raises ValueError if other ranks have other queries."""
    every = asked.world.gather(size.tolist(), "the queries")
    if any(not isinstance(its, list) or len(its) != len(size) for its in every) or not all(
        torch.allclose(torch.tensor(its, dtype=size.dtype), size.cpu(), rtol=1e-3) for its in every
    ):
        raise ValueError(
            f"rank {asked.world.rank} has other queries than another rank; expected the same query on every rank, and "
            "each rank's own part of the training data"
        )


def held(F: Operator, v: Tensor, rank: int | None = None, layers: Iterable[Block] = ()) -> Queries:
    """Vectors `(q, size)` in the parameters of a matrix, by name; of low rank in some layers, if asked for."""
    queries = Queries(dict(zip(F.space.names or (), F.space.unflatten(v), strict=True)), rank)
    for layer in layers:
        assert isinstance(layer.operator, ExactBlock)
        queries.reduce(layer, layer.operator)
    return queries


def layers_of(rows: Rows) -> Iterator[Block]:
    """The layers of a batch whose gradients are matrices, without any examples."""
    for _, block, cases in rows.blocks():
        if not isinstance(cases, ColumnBlock):
            h, g = cases.h, cases.g
            none = ExactBlock(h.new_zeros(0, 1, h.shape[-1]), g.new_zeros(0, 1, 1, g.shape[-1]), bias=cases.bias)
            yield block.with_operator(none)
        elif not is_zero(cases) and [len(shape) for shape in cases.space.shapes] == [2]:  # such as an embedding
            yield block.with_operator(ColumnBlock(cases.S[:0].clone(), cases.space.shapes))


class LowRank(NamedTuple):
    """Matrices `(q, o, i)` as products `left @ right` of rank `r`: `(q, o, r)` and `(q, r, i)`."""

    left: Tensor
    right: Tensor


def reduced(W: Float[Tensor, "q o i"], rank: int) -> LowRank:
    """The best approximation of each matrix."""
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    root = s[:, :rank].sqrt()
    return LowRank(U[..., :rank] * root.unsqueeze(1), root.unsqueeze(2) * Vt[:, :rank])


class Queries:
    """Vectors `(q, *shape)` by parameter; of low rank, if asked for.

    Args:
        vectors: by name of the parameter.
        rank: that of the matrices. None: they are held as they are.
    """

    def __init__(self, vectors: Mapping[str, Tensor], rank: int | None):
        self.vectors, self.rank = dict(vectors), rank
        self.count = len(next(iter(vectors.values())))
        self._low: dict[tuple[str, ...], tuple[Block, LowRank, Tensor | None]] = {}

    def reduce(self, layer: Block, cases: ExactBlock) -> None:
        """Holds the weight matrix of a layer in low rank from now on."""
        if self.rank is None or any(n not in self.vectors for n in layer.names):
            return
        W, b = self._weights(layer, cases)
        if isinstance(W, Tensor) and self.rank < min(W.shape[1:]):
            self._low[layer.names] = layer, reduced(W, self.rank), b
            for n in layer.names:
                del self.vectors[n]

    def scores(self, rows: Rows) -> Float[Tensor, "q n"]:
        """The inner products with every row of a batch."""
        return torch.stack([self._of_layer(block, cases) for _, block, cases in rows.blocks()]).sum(0)

    def position_scores(self, rows: Rows) -> Float[Tensor, "q n t"]:
        """The share of every position of the layers' inputs, which sum to the scores.

        Raises:
            ValueError: if a layer's inputs have no positions, or other ones.
        """
        used = [(name, block, cases) for name, block, cases in rows.blocks() if not is_zero(cases)]
        sizes = {name: 0 if isinstance(cases, ColumnBlock) else cases.h.shape[1] for name, _, cases in used}
        if not sizes:
            raise ValueError("the loss does not depend on the parameters, so tokens have no scores; look at params=")
        usual = max(sizes.values())
        for name, size in sizes.items():
            if size != usual:
                held = f"{size} positions" if size else "no inputs by position"
                raise ValueError(
                    f"layer {name!r} has {held} where others have {usual}, so its gradient cannot be shared out among "
                    "tokens; leave it out with params=, as a predicate on names"
                )
        total: Tensor | None = None
        for _, block, cases in used:
            W, b = self._weights(block, cases)
            assert not isinstance(W, LowRank)
            for start, part in _parts(cases, self.count * cases.h.shape[1] * cases.g.shape[-1]):
                a = 0.0 if W is None else (part.h.flatten(0, 1) @ W.mT).unflatten(-2, part.h.shape[:2])  # (q, n, t, o)
                a = a if b is None else a + b[:, None, None]
                share = (torch.as_tensor(a) * part.g[:, 0]).sum(-1)
                if total is None:
                    total = share.new_zeros(self.count, len(rows), usual)
                total[:, start : start + len(part.h)] += share
        assert total is not None
        return total

    def _whole(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The vectors of some parameters, those of low rank multiplied out."""
        found = {n: self.vectors[n] for n in names if n in self.vectors}
        for own, (block, low, b) in self._low.items():
            if not set(own).isdisjoint(names):
                found |= block.named((low.left @ low.right, *(() if b is None else (b,))))
        return found

    def _weights(self, block: Block, cases: ExactBlock) -> tuple[Tensor | LowRank | None, Tensor | None]:
        """The queries' weight and bias of a layer, in the form of its cases."""
        if block.names in self._low:
            return self._low[block.names][1:]
        parts = block.parts(self._whole(block.names))
        if isinstance(cases, ColumnBlock):
            return parts[0], None
        return parts[0] if cases.h.shape[-1] else None, parts[-1] if cases.bias else None

    def _of_layer(self, block: Block, cases: ExactBlock) -> Tensor:
        if is_zero(cases):
            return cases.S.new_zeros(self.count, len(cases.S))
        if isinstance(cases, ColumnBlock):
            return self._of_columns(block, cases)
        W, b = self._weights(block, cases)
        found = []
        for _, part in _parts(cases, max(1, part_size(cases, W))):
            h, g = part.h, part.g[:, 0]
            if W is None:
                own = h.new_zeros(self.count, len(h))
            elif isinstance(W, LowRank):
                inner = (h @ W.right.flatten(0, 1).mT) * (g @ W.left.movedim(1, 0).flatten(1))
                own = inner.sum(1).unflatten(1, (self.count, -1)).sum(2).mT
            else:
                own = W.flatten(1) @ (g.mT @ h).flatten(1).mT
            found.append(own if b is None else own + b @ g.sum(1).mT)
        return torch.cat(found, 1)

    def _of_columns(self, block: Block, cases: ColumnBlock) -> Tensor:
        S = cases.S[:, 0].mT
        low = self._low.get(block.names)
        if low is None or len(cases.space.shapes) > 1:
            return cases.space.flatten(block.parts(self._whole(block.names))) @ S
        pairs = zip(low[1].left, low[1].right, strict=True)
        return torch.stack([(left @ right).flatten() @ S for left, right in pairs])  # one matrix at a time


def is_zero(cases: ExactBlock) -> TypeGuard[ColumnBlock]:
    """Whether these are the zeros of parameters that a batch does not use."""
    return isinstance(cases, ColumnBlock) and not cases.S.any()


def part_size(cases: ExactBlock, W: Tensor | LowRank | None) -> int:
    """How many numbers an example takes while it is scored."""
    if isinstance(W, LowRank):
        return 2 * cases.h.shape[1] * W.left.shape[0] * W.left.shape[2]
    return cases.h.shape[2] * cases.g.shape[3]


def _parts(cases: ExactBlock, size: int) -> list[tuple[int, ExactBlock]]:
    """Some examples at a time, each with the index of the first."""
    step = max(1, BUDGET // max(1, size))
    return [(start, cases.part(slice(start, start + step))) for start in range(0, len(cases.g), step)]
