"""Backward passes that find out which rows of every layer affect which rows of the output.

They use the columns `v`, `s ∘ v` and `s' ∘ v` with a random `v` and powers of two `s`, one for each row of the output.
If a row of a layer affects only row `i` of the output, its gradients are `g`, `s_i g` and `s'_i g`. This is exact to
the last bit, because multiplication by powers of two does not round. It does not hold for a row that affects several
rows of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.order import Grouping, Order, candidates, crossed, listed, together
from natgrad.capture.use import Use

SEED = 1729
"""Seed of the probe's own random numbers. Torch's random state does not change."""
PASSES = 3
"""The number of backward passes of a probe that runs in step with other processes."""
LISTED_DIGITS = 4
"""The number of digits that identify rows in an unusual order: they distinguish 16⁴ rows."""


def connected(uses: Sequence[Use]) -> list[list[int]]:
    """Groups of uses that share parameters, directly or through other uses: lists of their numbers."""
    group_of: dict[str, list[int]] = {}
    for i, use in enumerate(uses):
        joined = [i]
        for group in {id(g): g for n in use.names if (g := group_of.get(n))}.values():
            joined = group + joined
        names = {n for j in joined for n in uses[j].names}
        group_of |= dict.fromkeys(names, joined)
    return list({id(group): group for group in group_of.values()}.values())


def _forms(uses: Sequence[Use]) -> list[tuple[int, Use]]:
    """Every use with its number, in each of its forms."""
    return [(i, form) for i, use in enumerate(uses) for form in (use.narrow, use) if form is not None]


@dataclass(frozen=True)
class Signal:
    """The result of one backward pass in the rows of a use: the norms of the gradients, and their products with one
    random vector."""

    norms: Float[Tensor, " rows"]
    products: Float[Tensor, " rows"]


class Probe:
    """The backward passes through one batch, as many as are needed. If it runs `in_step` with other processes, it makes
    exactly `PASSES` of them, at once."""

    def __init__(self, uses: Sequence[Use], output: Tensor, in_step: bool = False):
        self.given, self.output, self.device = uses, output, output.device
        # A use that was spread over examples has two forms: before and after.
        self.forms = [[i for i, (j, _) in enumerate(_forms(uses)) if j == number] for number in range(len(uses))]
        self.uses = uses = [use for _, use in _forms(uses)]
        edges = {(u.edge.node, u.edge.output_nr): u.edge for u in uses}
        self._edges, self._places = list(edges.values()), {key: i for i, key in enumerate(edges)}
        halves = {torch.float16} & {output.dtype, *(u.a.dtype for u in uses)}
        self.base = 4 if halves else 16  # float16 has too small a range for large factors
        self._generator = torch.Generator(self.device).manual_seed(SEED)
        by_row = self._random(len(output)).view(-1, *[1] * (output.ndim - 1))
        self._v = by_row * self._random(*output.shape[1:])
        self._weights = [self._random(use.a.numel() // max(1, prod(use.grid))) for use in uses]
        self._in_step = in_step
        self._plain: list[Signal] | None = None
        self._passes: dict[tuple[Grouping, int], list[Signal]] = {}
        if in_step:
            for digit in range(PASSES - 1):
                self._signals()
                self._signals(Grouping(len(output)), digit)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    # What is found -------------------------------------------------------------------------------------

    def found(self) -> tuple[list[Grouping], list[Order | None], list[int]]:
        """For every use: the grouping of the output's rows into as many cases as possible; the order of its own rows,
        or None if they affect several cases in any grouping; and the form of the use for which this holds."""
        finest = Grouping(len(self.output))
        groupings: list[Grouping] = [finest] * len(self.given)
        orders: list[Order | None] = [None] * len(self.given)
        forms = [0] * len(self.given)
        left = connected(self.given)
        for grouping in [finest] if self._in_step else self._groupings():
            resolved = []
            for group in left:
                its = [self._in_some_form(i, grouping) for i in group]
                if all(order is not None for order, _ in its):
                    resolved.append(group)
                    for i, (order, form) in zip(group, its, strict=True):
                        groupings[i], orders[i], forms[i] = grouping, order, form
            left = [group for group in left if group not in resolved]
            if not left:
                break
        return groupings, orders, forms

    def confirms(self, i: int, grouping: Grouping, order: Order, narrow: bool) -> bool:
        """Whether each row of a use, in the narrow or the wide form, affects only its own case."""
        return grouping.cases == 1 or self._fits(self.forms[i][0 if narrow else -1], grouping, order)

    def _in_some_form(self, i: int, grouping: Grouping) -> tuple[Order | None, int]:
        for form, number in enumerate(self.forms[i]):
            order = self._order(number, grouping)
            if order is not None:
                return order, form
        return None, 0

    def _groupings(self) -> Iterator[Grouping]:
        """The groupings to try. First, each row of the output is a case. Then, in case the positions of sequences were
        flattened to rows, as many cases as the length of one of the first two axes of a use."""
        n = len(self.output)
        yield Grouping(n)
        flattened = [use.grid[:2] for use in self.uses if len(use.grid) > 1 and prod(use.grid[:2]) == n]
        for size in sorted({size for sizes in flattened for size in sizes if 1 < size < n}, reverse=True):
            yield Grouping(size, n // size)
            yield Grouping(size, n // size, interleaved=True)

    def _order(self, i: int, grouping: Grouping) -> Order | None:
        """The order in which each row of a use affects only its own case, or None if there is no such order."""
        use = self.uses[i]
        if prod(use.grid) == 0:  # this layer got no row, such as an expert without tokens
            return listed(use.grid, torch.empty(0, dtype=torch.long, device=self.device), grouping.cases)
        if grouping.cases == 1:
            return together(use.grid)
        for order in candidates(use.grid, grouping.cases):
            if self._fits(i, grouping, order):
                return order
        for lengths in self._axes(use, grouping):
            order = crossed(use.grid, lengths, self.device)
            if self._fits(i, grouping, order):
                return order
        return None if self._in_step else self._listed(i, grouping)

    def _axes(self, use: Use, grouping: Grouping) -> list[tuple[int, int]]:
        """The possible lengths of two axes on which the rows of a use may lie, in either order, if each row is a
        case."""
        if grouping.members > 1 or prod(use.grid) != grouping.cases:
            return []
        grids = dict.fromkeys(u.grid[:2] for u in self.uses if len(u.grid) > 1 and min(u.grid[:2]) > 1)
        found = [grid for grid in grids if prod(grid) == grouping.cases]
        return list(dict.fromkeys(pair for a, b in found for pair in ((a, b), (b, a))))

    def _fits(self, i: int, grouping: Grouping, order: Order) -> bool:
        case = order.case_of_row(self.device)
        return bool(self._in_proportion(i, grouping, case, self._digits(grouping)).all())

    def _listed(self, i: int, grouping: Grouping) -> Order | None:
        """The order that the norms of the gradients show."""
        plain, digits = self._signals()[i], self._digits(grouping, LISTED_DIGITS)
        if self.base**digits < grouping.cases:
            return None
        number = torch.zeros(len(plain.norms), dtype=torch.long, device=self.device)
        alive = self._alive(i)
        for digit in range(digits):
            ratio = torch.where(alive, self._signals(grouping, digit)[i].norms / plain.norms, 1.0)
            exponent = ratio.clamp(2.0**-1, 2.0**self.base).nan_to_num(1.0).log2().round().long()
            number += exponent.clamp(0, self.base - 1) * self.base**digit
        case_of_number = torch.full((self.base**digits,), -1, device=self.device)
        numbers = self._numbers(grouping)
        case_of_number[numbers] = torch.arange(len(numbers), device=self.device)
        case = torch.where(alive, case_of_number[number], -1)
        known = ~alive | ((case >= 0) & self._in_proportion(i, grouping, case.clamp_min(0), digits))
        return listed(self.uses[i].grid, case, grouping.cases) if bool(known.all()) else None

    @property
    def complete(self) -> bool:
        """Whether every row has shown on what it depends. A row without a gradient, as behind a ReLU that is zero, has
        not."""
        return all(prod(use.grid) > 0 and bool((self._signals()[i].norms > 0).all()) for i, use in enumerate(self.uses))

    # Passes --------------------------------------------------------------------------------------------

    def _digits(self, grouping: Grouping, most: int = 0) -> int:
        """The number of passes that distinguish the cases: two passes distinguish all of 256 cases, and nearly all of
        more."""
        needed = max(1, math.ceil(math.log(max(2, grouping.cases), self.base) - 1e-9))
        usual = 2 if self.base == 16 or self._in_step else 4
        return min(needed, most or usual)

    def _numbers(self, grouping: Grouping) -> Tensor:
        """A number for each case, in random order. Its digits give the exponents."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randperm(grouping.cases, generator=generator).to(self.device)

    def _exponents(self, grouping: Grouping, digit: int) -> Tensor:
        return self._numbers(grouping) // self.base**digit % self.base

    def _in_proportion(self, i: int, grouping: Grouping, case: Tensor, digits: int) -> Tensor:
        """Whether the gradients in each row are scaled by the factor of its case."""
        plain, alive, tolerance = self._signals()[i], self._alive(i), self._tolerance(i)
        fits = torch.ones_like(alive)
        for digit in range(digits):
            factor = torch.exp2(self._exponents(grouping, digit).to(plain.norms.dtype))[case]
            off = self._signals(grouping, digit)[i].products / factor - plain.products
            fits &= off.abs() <= tolerance * plain.norms
        return fits | ~alive

    def _alive(self, i: int) -> Tensor:
        """The rows whose gradient is not negligible compared with the largest."""
        norms = self._signals()[i].norms
        return norms > min(self._tolerance(i), 1e-3) * norms.max()

    def _tolerance(self, i: int) -> float:
        """The relative difference that counts as rounding. Powers of two are exact, so only sums that run in another
        order in each pass round differently. Derivatives may cancel in a parameter, so a small difference matters."""
        eps = torch.finfo(self.uses[i].a.dtype).eps
        return float(min(1000 * eps, eps**0.5))

    def _signals(self, grouping: Grouping | None = None, digit: int = 0) -> list[Signal]:
        """The signals of all uses in one pass."""
        if grouping is None:
            if self._plain is None:
                self._plain = self._pass(self._v)
            return self._plain
        if (grouping, digit) not in self._passes:
            factors = torch.exp2(self._exponents(grouping, digit).to(self._v.dtype))
            rows = torch.empty(len(self.output), device=self.device)
            members = grouping.of(torch.arange(len(rows), device=self.device))
            rows[members] = factors.unsqueeze(1).expand(members.shape)
            self._passes[grouping, digit] = self._pass(self._v * rows.view(-1, *[1] * (self._v.ndim - 1)))
        return self._passes[grouping, digit]

    def _pass(self, v: Tensor) -> list[Signal]:
        gradients = torch.autograd.grad(
            self.output, self._edges, v.to(self.output.dtype), retain_graph=True, allow_unused=True
        )
        signals = []
        for use, weight in zip(self.uses, self._weights, strict=True):
            g = gradients[self._places[use.edge.node, use.edge.output_nr]]
            if g is None or g.numel() == 0:
                zero = torch.zeros(prod(use.grid), device=self.device)
                signals.append(Signal(zero, zero))
                continue
            rows = use.kind.rows(g.reshape(use.a.shape))
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            norms = torch.linalg.vector_norm(rows, dim=1)
            signals.append(Signal(norms, rows @ weight.to(rows.dtype)))
        return signals
