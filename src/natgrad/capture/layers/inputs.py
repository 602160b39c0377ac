"""The inputs of a layer, for each example and position, in the cheapest form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from natgrad.capture.order import Order

DENSE_BUDGET = 1 << 28
"""The largest number of entries of sparse inputs that are written out as a dense tensor."""


@dataclass
class InputSums:
    """Count, mean and scatter around the mean of inputs, or only the diagonal of the scatter."""

    count: Tensor
    mean: Float[Tensor, " i"]
    scatter: Float[Tensor, "*square"]


class Inputs(ABC):
    """The inputs of one use of a layer: `n` examples with `t` positions each, of width `d`."""

    shape: tuple[int, int, int]
    diagonal = False
    """Whether only the diagonal of the second moment is kept, for any size."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "n t i"]:
        """The inputs as a dense tensor."""

    @abstractmethod
    def sums(self, kept: Bool[Tensor, "n t"] | None = None, diagonal: bool = False) -> InputSums:
        """The sums over all cases, or over those that are kept."""

    @abstractmethod
    def averaged(self, kept: Bool[Tensor, "n t"] | None = None) -> Inputs:
        """The mean over the positions of each example, `t = 1`."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Inputs:
        """The same in another precision. Large copies are made only when they are needed, and are not kept."""

    @abstractmethod
    def part(self, start: int, stop: int, step: int = 1) -> Inputs:
        """Some of the examples, as a view if possible."""

    def sample(self, count: int, order: Int[Tensor, " cases"]) -> Inputs:
        """At least `count` of the cases, those that come first in `order`, a permutation of all. Here all of them."""
        return self

    @abstractmethod
    def arranged(self, order: Order) -> Inputs:
        """The inputs of cases, from the inputs of the rows of a grid. Padding is zero."""

    def place(self) -> tuple[Any, ...] | None:
        """An identifier of the inputs' memory, equal for another layer with the same inputs. None if it is not
        known."""
        return None

    @abstractmethod
    def blank(self, n: int) -> Inputs:
        """Inputs of `n` examples that are all zero, in the same form."""


@dataclass
class Rows(Inputs):
    """Plain inputs, converted to `dtype` if one is given."""

    x: Float[Tensor, "n t i"]
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        n, t, d = self.x.shape
        return n, t, d

    def dense(self) -> Tensor:
        return self.x if self.dtype is None else self.x.to(self.dtype)

    def sums(self, kept: Tensor | None = None, diagonal: bool = False) -> InputSums:
        x = self.dense().flatten(0, 1)
        if kept is None and len(x):
            count = x.new_tensor(float(len(x)))
            mean = x.mean(0)
            d = x - mean
        else:
            weight = x.new_ones(len(x)) if kept is None else kept.flatten().to(x.dtype)
            count = weight.sum()
            mean = weight @ x / count.clamp_min(1)
            d = (x - mean) * weight.unsqueeze(1)
        return InputSums(count, mean, d.square().sum(0) if diagonal else d.mT @ d)

    def averaged(self, kept: Tensor | None = None) -> Rows:
        x = self.dense()
        if kept is None and x.shape[1]:
            return Rows(x.mean(1, keepdim=True))
        weight = x.new_ones(x.shape[:2]) if kept is None else kept.to(x.dtype)
        return Rows((weight.unsqueeze(1) @ x) / weight.sum(1).clamp_min(1)[:, None, None])

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows(self.x, dtype)

    def place(self) -> tuple[Any, ...] | None:
        return self.x.data_ptr(), self.x.dtype, self.dtype, self.x.shape, self.x.stride()

    def part(self, start: int, stop: int, step: int = 1) -> Rows:
        return Rows(self.x[start:stop:step], self.dtype)

    def sample(self, count: int, order: Tensor) -> Rows:
        which, positions = order[:count], self.x.shape[1]
        return Rows(self.x[which // positions, which % positions].unsqueeze(1), self.dtype)

    def arranged(self, order: Order) -> Rows:
        return self if order.is_identity else Rows(order.of(_on_grid(self.x, order.grid)).flatten(1, 2), self.dtype)

    def blank(self, n: int) -> Rows:
        return Rows(self.x.new_zeros(n, 1, self.x.shape[2]), self.dtype)


@dataclass
class Sparse(Inputs):
    """Inputs with few nonzero entries: entry `e` adds `value[e]` at `column[e]` of case `row[e]`.

    Rows are cases, counted example by example. Only the diagonal of their second moment is kept. For one-hot inputs
    this is exact; for others the off-diagonal entries are left out.
    """

    row: Int[Tensor, " e"]
    column: Int[Tensor, " e"]
    value: Float[Tensor, " e"]
    shape: tuple[int, int, int]

    diagonal = True

    def dense(self) -> Tensor:
        n, t, d = self.shape
        if n * t * d > DENSE_BUDGET:
            raise ValueError(
                f"{n} x {t} inputs over {d} columns of an embedding are too many to write out, which this structure "
                "needs; use structure='kfac', or fewer examples"
            )
        out = self.value.new_zeros(n * t, d)
        out.index_put_((self.row, self.column), self.value, accumulate=True)
        return out.view(n, t, d)

    def merged(self) -> Sparse:
        """The same with at most one entry for each row and column."""
        place, which = torch.unique(self.row * self.shape[2] + self.column, return_inverse=True)
        value = self.value.new_zeros(len(place)).index_add_(0, which, self.value)
        return Sparse(place // self.shape[2], place % self.shape[2], value, self.shape)

    def sums(self, kept: Tensor | None = None, diagonal: bool = True) -> InputSums:
        n, t, d = self.shape
        its = self.merged()
        weight = None if kept is None else kept.flatten().to(self.value.dtype)
        share = its.value if weight is None else its.value * weight[its.row]
        count = self.value.new_tensor(float(n * t)) if weight is None else weight.sum()
        total = self.value.new_zeros(d).index_add_(0, its.column, share)
        second = self.value.new_zeros(d).index_add_(0, its.column, share * its.value)
        mean = total / count.clamp_min(1)
        return InputSums(count, mean, second - count * mean.square())

    def averaged(self, kept: Tensor | None = None) -> Sparse:
        n, t, d = self.shape
        if kept is None:
            weight = self.value.new_full((n, t), 1 / max(1, t))
        else:
            weight = kept.to(self.value.dtype)
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        return Sparse(self.row // t, self.column, self.value * weight.flatten()[self.row], (n, 1, d))

    def to(self, dtype: torch.dtype) -> Sparse:
        return Sparse(self.row, self.column, self.value.to(dtype), self.shape)

    def part(self, start: int, stop: int, step: int = 1) -> Sparse:
        n, t, d = self.shape
        examples = range(start, min(stop, n), step)
        example, place = self.row // t - start, self.row % t
        own = (example >= 0) & (example < len(examples) * step) & (example % step == 0)
        row = (example // step * t + place)[own]
        return Sparse(row, self.column[own], self.value[own], (len(examples), t, d))

    def arranged(self, order: Order) -> Sparse:
        if order.is_identity:
            return self
        n, t, d = self.shape
        numbers = torch.arange(1, n * t + 1, device=self.row.device).view(n, t, 1)
        rows = order.of(_on_grid(numbers, order.grid)).flatten(1)  # the rows of every case, counted from 1
        place = torch.zeros(n * t + 1, dtype=torch.long, device=self.row.device)
        place[rows.flatten()] = torch.arange(rows.numel(), device=self.row.device)
        return Sparse(place[self.row + 1], self.column, self.value, (*rows.shape, d))

    def blank(self, n: int) -> Sparse:
        return Sparse(self.row[:0], self.column[:0], self.value[:0], (n, 1, self.shape[2]))

    def squares(self, p: Float[Tensor, "n k t o"]) -> Float[Tensor, "o i"]:
        """`Σ_nk (Σ_t p_nkto x_nti)²`."""
        _, t, d = self.shape
        terms = p.movedim(2, 1).flatten(0, 1)[self.row] * self.value[:, None, None]
        place, which = torch.unique(self.row // t * d + self.column, return_inverse=True)
        sums = terms.new_zeros(len(place), *terms.shape[1:]).index_add_(0, which, terms)
        return p.new_zeros(d, p.shape[-1]).index_add_(0, place % d, sums.square().sum(1)).mT


def _on_grid(t: Tensor, grid: tuple[int, ...]) -> Tensor:
    """`(n, t, d)` as `(*grid, positions of a row, d)`."""
    return t.unflatten(1, (*grid[1:], t.shape[1] // prod(grid[1:]))) if grid else t[0]


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """Several uses on the same examples, concatenated along the positions."""
    if len(inputs) == 1:
        return inputs[0]
    if all(isinstance(i, Sparse) for i in inputs):
        return _joined_sparse([i for i in inputs if isinstance(i, Sparse)])
    return Rows(torch.cat([i.dense() for i in inputs], 1))


def _joined_sparse(inputs: Sequence[Sparse]) -> Sparse:
    n, _, d = inputs[0].shape
    t = sum(i.shape[1] for i in inputs)
    rows, before = [], 0
    for i in inputs:
        its = i.shape[1]
        rows.append(i.row // its * t + i.row % its + before)
        before += its
    column, value = torch.cat([i.column for i in inputs]), torch.cat([i.value for i in inputs])
    return Sparse(torch.cat(rows), column, value, (n, t, d))


def stacked(inputs: Sequence[Inputs]) -> list[Inputs]:
    """Several uses as separate cases. Plain inputs are put into one tensor."""
    plain = [i for i in inputs if isinstance(i, Rows)]
    rest: list[Inputs] = [i for i in inputs if not isinstance(i, Rows)]
    if not plain:
        return rest
    if len(plain) == 1:
        return [Rows(plain[0].x.flatten(0, 1).unsqueeze(1), plain[0].dtype), *rest]
    return [Rows(torch.cat([i.dense().flatten(0, 1) for i in plain]).unsqueeze(1)), *rest]
