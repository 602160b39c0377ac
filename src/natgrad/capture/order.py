"""Which rows make up a case: rows of the model's output, and rows of a layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """The rows of the output, split into `cases` of `members` rows each.

    The rows of a case are consecutive, or (`interleaved`) row `r` belongs to case `r % cases`.
    """

    cases: int
    members: int = 1
    interleaved: bool = False

    def of(self, t: Tensor) -> Tensor:
        """A tensor with the output's rows on axis 0 as `(cases, members, ...)`."""
        if self.interleaved:
            return t.unflatten(0, (self.members, self.cases)).transpose(0, 1)
        return t.unflatten(0, (self.cases, self.members))

    def parts(self, column: Tensor) -> Iterator[Tensor]:
        """Splits a column of the output into one column for each member of a case. Columns of zeros are left out."""
        if self.members == 1:
            yield column
            return
        own = self.of(torch.arange(len(column), device=column.device))
        for rows in own.unbind(1):
            if column[rows].any():
                part = torch.zeros_like(column)
                part[rows] = column[rows]
                yield part


@dataclass(frozen=True)
class Order:
    """How the rows of one use of a layer, which lie on a grid of axes, belong to cases.

    The cases are on one `axis` of the grid. Or (`axis=None`) the rows of a case are consecutive, or `interleaved`. Or
    they are listed: `index[c, i]` is the number in the grid of the i-th row of case `c`, and −1 is padding. `own` says
    which of the listed rows depend on their case: the others have no gradient. With `crossed`, every row is a case:
    rows and cases lie on the same two axes, in two orders; these are the lengths of the axes in the order of the rows.
    """

    grid: tuple[int, ...]
    cases: int
    axis: int | None = None
    interleaved: bool = False
    index: Int[Tensor, "cases rows"] | None = None
    own: Tensor | None = None
    crossed: tuple[int, int] | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the rows are already in this order."""
        return self.axis == 0 or self.cases == prod(self.grid) == 1

    @property
    def rows(self) -> int:
        """The number of rows of a case."""
        return self.index.shape[1] if self.index is not None else prod(self.grid) // max(1, self.cases)

    def of(self, t: Tensor) -> Tensor:
        """A tensor with the axes of the grid first, as `(cases, rows, ...)`. Padding is zero."""
        axes = len(self.grid)
        if axes == 0:  # a single row, without an axis
            t, axes = t.unsqueeze(0), 1
        if self.axis is not None:
            moved = t.movedim(self.axis, 0)
            return moved.flatten(1, axes - 1) if axes > 1 else moved.unsqueeze(1)
        flat = t.flatten(0, axes - 1)
        if self.index is not None:
            listed = flat[self.index.clamp_min(0)]
            return listed * (self.index >= 0).view(*self.index.shape, *[1] * (t.ndim - axes)).to(t.dtype)
        if self.interleaved:
            return flat.unflatten(0, (self.rows, self.cases)).transpose(0, 1)
        return flat.unflatten(0, (self.cases, self.rows))

    def numbers(self, device: torch.device) -> Int[Tensor, "cases rows"]:
        """The number in the grid of every row of a case; −1 for padding."""
        return self.of(torch.arange(1, prod(self.grid) + 1, device=device).view(self.grid)) - 1

    def case_of_row(self, device: torch.device) -> Int[Tensor, " rows"]:
        """The case of every row of the grid; −1 for a row that belongs to none."""
        found = torch.full((prod(self.grid),), -1, device=device)
        numbers = self.numbers(device)
        each = torch.arange(self.cases, device=device).unsqueeze(1).expand(numbers.shape)
        own = numbers >= 0 if self.own is None else self.own
        found[numbers[own]] = each[own]
        return found

    def present(self, reduced: bool) -> Tensor | None:
        """Which of the rows `(cases, rows)` are not padding, or (`reduced`) depend on their case. None: all."""
        if self.index is None:
            return None
        assert self.own is not None
        return self.own if reduced else self.index >= 0


def together(grid: tuple[int, ...]) -> Order:
    """All rows as one case."""
    return Order(grid, 1)


def rows_apart(grid: tuple[int, ...]) -> Order:
    """The first axis as the axis of cases."""
    return Order(grid, grid[0], axis=0) if grid else together(grid)


def apart(grids: Sequence[tuple[int, ...]], device: torch.device) -> list[Order]:
    """For several uses together: the first axis as the axis of cases, or every row as a case if the first axes
    differ."""
    if len({grid[:1] for grid in grids}) == 1:
        return [rows_apart(grid) for grid in grids]
    most = max(map(prod, grids))
    index = torch.arange(most, device=device).unsqueeze(1)
    owns = [index < prod(grid) for grid in grids]
    return [Order(grid, most, index=index.where(own, -1), own=own) for grid, own in zip(grids, owns, strict=True)]


def assumed(grid: tuple[int, ...], examples: int) -> Order:
    """A guess from the shape: the first axis whose length is the number of examples; else an axis that was flattened
    with the examples first; else the first axis, of any length."""
    for axis, size in enumerate(grid):
        if size == examples:
            return Order(grid, examples, axis=axis)
    if examples and len(grid) == 1 and grid[0] % examples == 0:
        return Order(grid, examples)
    return rows_apart(grid)


def candidates(grid: tuple[int, ...], cases: int) -> Iterator[Order]:
    """The orders without a list, the most common first."""
    for axis, size in enumerate(grid):
        if size == cases:
            yield Order(grid, cases, axis=axis)
    if prod(grid) % cases == 0:
        yield Order(grid, cases)
        yield Order(grid, cases, interleaved=True)


def crossed(grid: tuple[int, ...], lengths: tuple[int, int], device: torch.device) -> Order:
    """Rows on two axes of these lengths. Each row is a case, and the cases are in transposed order: in the rows,
    positions come first and were flattened, but the output has examples first."""
    rows = torch.arange(prod(lengths), device=device).view(lengths).T.reshape(-1, 1)
    return Order(grid, prod(lengths), index=rows, own=torch.ones_like(rows, dtype=torch.bool), crossed=lengths)


def listed(grid: tuple[int, ...], case_of_row: Int[Tensor, " rows"], cases: int) -> Order:
    """The order in which each row belongs to the case with this number. Rows without a case (−1) fill up free
    places."""
    rows = torch.arange(len(case_of_row), device=case_of_row.device)
    known = case_of_row >= 0
    counts = torch.bincount(case_of_row[known], minlength=cases)
    most = max(int(counts.max()), -(-len(rows) // cases))
    sorting = case_of_row[known].argsort(stable=True)
    its_rows, its_cases = rows[known][sorting], case_of_row[known][sorting]
    place = torch.arange(len(its_rows), device=rows.device) - (counts.cumsum(0) - counts)[its_cases]
    index = torch.full((cases, most), -1, device=rows.device)
    index[its_cases, place] = its_rows
    own = index >= 0
    free = (~own).nonzero()[: int((~known).sum())]
    index[free[:, 0], free[:, 1]] = rows[~known]
    return Order(grid, cases, index=index, own=own)


def coarsened(order: Order, fine: Grouping, coarse: Grouping) -> Order:
    """The order of rows for larger cases, from the order for the smaller cases that they consist of."""
    if coarse.cases == 1:
        return together(order.grid)
    device = torch.device("cpu") if order.index is None else order.index.device
    rows = torch.arange(fine.cases * fine.members, device=device)
    larger = torch.empty_like(rows)
    its = coarse.of(rows)
    larger[its] = torch.arange(coarse.cases, device=device).unsqueeze(1).expand(its.shape)
    small = order.case_of_row(device)
    case = torch.where(small >= 0, larger[fine.of(rows)[:, 0]][small], -1)
    for candidate in candidates(order.grid, coarse.cases):
        if torch.equal(candidate.case_of_row(device), case):
            return candidate
    return listed(order.grid, case, coarse.cases)
