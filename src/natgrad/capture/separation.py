"""Whether the rows of a batch are independent, and which rows of every layer belong to which row of the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from natgrad.capture.order import Grouping, Order, apart, assumed, coarsened, crossed, together
from natgrad.capture.probe import Probe, connected
from natgrad.capture.settled import is_settled
from natgrad.capture.use import Use

AGAIN = 10
"""What is known is checked again at call 10, 100, 1000, ...: values may change what depends on what, as those of a gate
that is zero at first."""


@dataclass(frozen=True)
class Separation:
    """The result for one batch: for every use, the grouping of the output's rows into cases, and the order of its own
    rows.

    `mixed` are the uses in which a row affects several cases in any grouping. `narrow` are the uses that have to be
    read in the form that they had before they were spread over examples.
    """

    groupings: tuple[Grouping, ...]
    orders: tuple[Order, ...]
    mixed: tuple[bool, ...]
    narrow: tuple[bool, ...]

    def chosen(self, uses: Sequence[Use]) -> list[Use]:
        """The uses in the form that the orders belong to."""
        return [_as(use, narrow) for use, narrow in zip(uses, self.narrow, strict=True)]

    @property
    def is_listed(self) -> bool:
        """Whether the case of a row depends on the data, and not only on shapes."""
        both = zip(self.orders, self.mixed, strict=True)
        return any(order.index is not None and order.crossed is None and not mixed for order, mixed in both)

    @property
    def form(self) -> Hashable:
        """The result without its tensors."""
        orders = [(order.cases, order.axis, order.interleaved, order.crossed) for order in self.orders]
        return self.groupings, tuple(orders), self.mixed, self.narrow

    def whole(self) -> Separation:
        """The same, but for uses whose rows cannot be separated the whole batch is one case."""
        examples = _examples(self.groupings)
        groupings = [Grouping(1, examples) if m else g for g, m in zip(self.groupings, self.mixed, strict=True)]
        orders = [together(order.grid) if m else order for order, m in zip(self.orders, self.mixed, strict=True)]
        return replace(self, groupings=tuple(groupings), orders=tuple(orders))

    def in_common(self) -> Separation:
        """The same with one grouping for all uses: the coarsest of their groupings."""
        parted = self.whole()
        coarsest = min(parted.groupings, key=lambda g: g.cases)
        both = zip(parted.groupings, parted.orders, strict=True)
        orders = [order if g == coarsest else coarsened(order, g, coarsest) for g, order in both]
        return replace(parted, groupings=(coarsest,) * len(orders), orders=tuple(orders))


class SeparationCheck:
    """Checks each batch shape once, and a few times later, and remembers the result. Keep one for repeated checks.

    Shapes that differ only in lengths are not checked any more after several of them gave the same result. If a batch
    has rows without a gradient, its shape is checked until several batches of the shape gave the same result.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Separation] = {}  # by shape
        self._incomplete: dict[Hashable, list[Hashable]] = {}  # by shape, from batches with rows without a gradient
        self._ways: dict[Hashable, list[Ways]] = {}  # by shape without lengths
        self._calls = Counter[Hashable]()

    def of(self, uses: Sequence[Use], output: Tensor, mode: Hashable = None) -> Separation:
        """Which rows belong together.

        Args:
            uses: the uses recorded in the forward pass.
            output: the output of the forward pass, with its graph, which is kept.
            mode: other things that the result may depend on, such as which modules are in training mode.

        Raises:
            RuntimeError: if an input was changed in place after its use.
        """
        for use in uses:
            use.check_input()
        exact, alike = _signature(uses, output, mode), _pattern(uses, output, mode)
        seen = self._ways.setdefault(alike, [])
        guess = self._found.get(exact) or (_of_ways(uses, len(output), seen[0]) if seen else None)
        known = exact in self._found or (guess is not None and is_settled(seen))
        again = self.begin() and known
        if guess is not None and known and not again:
            return guess
        probe = Probe(uses, output)
        found = _confirmed(probe, guess) or _found(probe)
        if again:
            if found is guess:
                return found
            self._forget()
        if found.is_listed:  # depends on the data
            return found
        ways = _ways(found, uses)
        if ways is not None:
            self._ways.setdefault(alike, []).append(ways)
        if not probe.complete:
            results = self._incomplete.setdefault(exact, [])
            results.append(found.form)
            if not is_settled(results):
                return found
        self._found[exact] = found
        return found

    def _forget(self) -> None:
        for known in (self._found, self._incomplete, self._ways):
            known.clear()

    def begin(self, of: Hashable = None) -> bool:
        """Whether passes are due at this call with the key `of`: at call 1, 10, 100, ..."""
        self._calls[of] += 1
        left = self._calls[of]
        while left % AGAIN == 0:
            left //= AGAIN
        return left == 1

    def in_step(self, uses: Sequence[Use], output: Tensor, mode: Hashable = None, *, of: Hashable = None) -> Separation:
        """The same, if other processes have to make the same number of passes at the same time: `PASSES` whenever
        passes are due at a call with a key `of`. Anything not found then is guessed from the shapes."""
        exact, alike = _signature(uses, output, mode), _pattern(uses, output, mode)
        seen = self._ways.get(alike)
        known = self._found.get(exact) or (_of_ways(uses, len(output), seen[0]) if seen else None)
        if self.begin(of):
            probe = Probe(uses, output, in_step=True)
            found = _confirmed(probe, known)
            if found is None:
                found = _found(probe)
                ways = _ways(found, uses)
                self._found[exact], self._ways[alike] = found, [] if ways is None else [ways]
            return found
        return known or assumed_of(uses, output)


def _as(use: Use, narrow: bool) -> Use:
    return use.narrow if narrow and use.narrow is not None else use


def _confirmed(probe: Probe, guess: Separation | None) -> Separation | None:
    """The guess, if it holds of this batch."""
    if guess is None:
        return None
    each = zip(guess.groupings, guess.orders, guess.mixed, guess.narrow, strict=True)
    held = (
        mixed or probe.confirms(i, grouping, order, narrow) for i, (grouping, order, mixed, narrow) in enumerate(each)
    )
    return guess if all(held) else None


def _found(probe: Probe) -> Separation:
    groupings, orders, forms = probe.found()
    mixed = {i for i, order in enumerate(orders) if order is None}
    narrow = [form == 0 and use.narrow is not None for form, use in zip(forms, probe.given, strict=True)]
    own = apart_orders([_as(*both) for both in zip(probe.given, narrow, strict=True)], mixed)
    return Separation(
        tuple(groupings),
        tuple(order or own[i] for i, order in enumerate(orders)),
        tuple(i in mixed for i in range(len(orders))),
        tuple(narrow),
    )


def assumed_of(uses: Sequence[Use], output: Tensor) -> Separation:
    """A guess from the shapes, without backward passes."""
    orders = tuple(assumed(use.grid, len(output)) for use in uses)
    none = (False,) * len(uses)
    return Separation((Grouping(len(output)),) * len(uses), orders, none, none)


def _signature(uses: Sequence[Use], output: Tensor, mode: Hashable) -> Hashable:
    return mode, output.shape, tuple((u.weight, u.bias, u.rows, u.kind.name, u.a.shape) for u in uses)


def _pattern(uses: Sequence[Use], output: Tensor, mode: Hashable) -> Hashable:
    """The same without lengths, except that it marks which lengths are the number of examples."""
    n = len(output)
    return (
        mode,
        output.ndim,
        n == 1,
        tuple(
            (u.weight, u.bias, u.rows, u.kind.name, _lengths(u, n), u.narrow and _lengths(u.narrow, n)) for u in uses
        ),
    )


def _lengths(use: Use, examples: int) -> tuple[bool, ...]:
    return tuple(size == examples for size in use.grid)


@dataclass(frozen=True)
class Way:
    """How the rows of a use belong to cases, without the lengths.

    `cases`: the number of cases is the length of an axis, given by the number of a use and the axis of its grid. None:
    each row of the output is a case. `order` is the axis of the cases, or a word for the order of the rows. For
    `"crossed"` and `"crossed back"`, `axes` is the number of the use whose axes are meant.
    """

    order: str | int
    cases: tuple[int, int] | None
    interleaved: bool
    narrow: bool
    axes: int = -1


Ways = tuple[Way, ...]


def _ways(found: Separation, uses: Sequence[Use]) -> Ways | None:
    """The way of each use; None if the lengths do not determine an axis."""
    ways = []
    each = zip(found.orders, found.groupings, found.mixed, found.narrow, strict=True)
    for order, grouping, mixed, narrow in each:
        kind: str | int = "in turns" if order.interleaved else "in a row"
        cases, axes = None, -1
        if mixed:
            kind = "mixed"
        elif order.crossed is not None:
            axes = next((i for i, use in enumerate(uses) if set(use.grid[:2]) == set(order.crossed)), -1)
            if axes < 0 or len(set(order.crossed)) == 1:
                return None
            kind = "crossed" if uses[axes].grid[:2] == order.crossed else "crossed back"
        elif order.axis is not None:
            kind = order.axis
        if grouping.members > 1 and not mixed:
            cases = _axis_of(grouping, uses)
            if cases is None:
                return None
        ways.append(Way(kind, cases, grouping.interleaved, narrow, axes))
    return tuple(ways)


def _axis_of(grouping: Grouping, uses: Sequence[Use]) -> tuple[int, int] | None:
    """The use, and which of its first two axes, that has the cases."""
    lengths = {grouping.cases, grouping.members}
    for i, use in enumerate(uses):
        if len(lengths) == 2 and len(use.grid) > 1 and set(use.grid[:2]) == lengths:
            return i, use.grid.index(grouping.cases)
    return None


def _of_ways(uses: Sequence[Use], rows: int, ways: Ways) -> Separation | None:
    """What was found of other lengths, of these; None where they do not go into one another."""
    given, uses = uses, [_as(use, way.narrow) for use, way in zip(uses, ways, strict=True)]
    mixed = {i for i, way in enumerate(ways) if way.order == "mixed"}
    own = apart_orders(uses, mixed)
    orders, groupings = [], []
    for i, (use, way) in enumerate(zip(uses, ways, strict=True)):
        cases = rows
        if way.cases is not None:
            number, axis = way.cases
            cases = given[number].grid[axis]
        fits = use.grid[way.order] == cases if isinstance(way.order, int) else prod(use.grid) % max(1, cases) == 0
        if rows % max(1, cases) or not (fits or i in mixed):
            return None
        groupings.append(Grouping(cases, rows // max(1, cases), way.interleaved))
        if way.axes >= 0:
            a, b = given[way.axes].grid[:2]
            if prod(use.grid) != rows or a * b != rows:
                return None
            orders.append(crossed(use.grid, (a, b) if way.order == "crossed" else (b, a), use.a.device))
            continue
        on_axis = way.order if isinstance(way.order, int) else None
        orders.append(own.get(i) or Order(use.grid, cases, axis=on_axis, interleaved=way.order == "in turns"))
    return Separation(
        tuple(groupings),
        tuple(orders),
        tuple(i in mixed for i in range(len(uses))),
        tuple(way.narrow for way in ways),
    )


def apart_orders(uses: Sequence[Use], mixed: Collection[int]) -> dict[int, Order]:
    """For uses whose rows are mixed: the first axis as the axis of cases, or every row as a case if shared parameters
    are used on different numbers of rows."""
    found: dict[int, Order] = {}
    for group in connected(uses):
        own = [i for i in group if i in mixed]
        orders = apart([uses[i].grid for i in own], uses[0].a.device) if own else []
        found |= dict(zip(own, orders, strict=True))
    return found


def _examples(groupings: Sequence[Grouping]) -> int:
    return groupings[0].cases * groupings[0].members
