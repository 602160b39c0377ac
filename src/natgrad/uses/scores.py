"""Inner products of preconditioned query gradients with the gradients of a batch, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import Block, ColumnBlock, ExactBlock
from natgrad.uses.rows import Rows

BUDGET = 1 << 26
"""About how many numbers are held at a time beside the queries."""


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
    """Vectors `(q, *shape)` by parameter, held as the layers of a first batch have them; of low rank, if asked for."""

    def __init__(self, vectors: Mapping[str, Tensor], rank: int | None):
        self.vectors, self.rank = dict(vectors), rank
        self.count = len(next(iter(vectors.values())))
        self._held: dict[str, tuple[Tensor | LowRank | None, Tensor | None]] = {}

    def scores(self, rows: Rows) -> Float[Tensor, "q n"]:
        """The inner products with every row of a batch."""
        return torch.stack([self._of_layer(name, block, cases) for name, block, cases in rows.blocks()]).sum(0)

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
        for name, block, cases in used:
            W, b = self._weights(name, block, cases)
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

    def _weights(self, name: str, block: Block, cases: ExactBlock) -> tuple[Tensor | LowRank | None, Tensor | None]:
        """The queries' weight and bias of a layer, in the form of its cases."""
        if name not in self._held:
            parts = block.parts({n: self.vectors.pop(n) for n in block.names})
            if isinstance(cases, ColumnBlock):
                self._held[name] = None, cases.space.flatten(parts)
            else:
                W = parts[0] if cases.h.shape[-1] else None
                low = self.rank is not None and W is not None and self.rank < min(W.shape[1:])
                held = reduced(W, self.rank) if low and W is not None and self.rank is not None else W
                self._held[name] = held, parts[-1] if cases.bias else None
        return self._held[name]

    def _of_layer(self, name: str, block: Block, cases: ExactBlock) -> Tensor:
        W, b = self._weights(name, block, cases)
        if isinstance(cases, ColumnBlock):
            assert b is not None
            return b @ cases.S[:, 0].mT
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


def is_zero(cases: ExactBlock) -> bool:
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
