"""Whether the rows of a batch are independent, and which rows of every layer belong to which row of the output."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from natgrad.capture.order import Grouping, Order, apart, assumed, coarsened, together
from natgrad.capture.probe import Probe, connected
from natgrad.capture.use import Use

TRUSTED = 4
"""After this many shapes that differ only in lengths, with the same result, further lengths are not checked."""


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
        return any(order.index is not None and not mixed for order, mixed in both)

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
    """Checks each batch shape once, and remembers the result. Keep one object for repeated checks."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Separation] = {}
        self._begun: set[Hashable] = set()
        self._alike: dict[Hashable, list[tuple[Way, ...]]] = {}

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
        exact = _signature(uses, output, mode)
        if exact in self._found:
            return self._found[exact]
        alike = _pattern(uses, output, mode)
        seen = self._alike.setdefault(alike, [])
        if len(seen) >= TRUSTED and len(set(seen)) == 1:
            known = _of_ways(uses, len(output), seen[0])
            if known is not None:
                return known
        found = _found(Probe(uses, output))
        if found.is_listed:  # depends on the data
            return found
        self._found[exact] = found
        if all(grouping.members == 1 for grouping in found.groupings):
            seen.append(_ways(found))
        return found

    def begin(self, of: Hashable = None) -> bool:
        """Whether this is the first call with this key `of`, for several processes in step."""
        first = of not in self._begun
        self._begun.add(of)
        return first

    def in_step(self, uses: Sequence[Use], output: Tensor, mode: Hashable = None, *, of: Hashable = None) -> Separation:
        """The same, if other processes have to make the same number of passes at the same time: `PASSES` at the first
        call with a key `of`, and none later. Anything not found then is guessed from the shapes."""
        if self.begin(of):
            self._found[_signature(uses, output, mode)] = found = _found(Probe(uses, output, in_step=True))
            self._alike[_pattern(uses, output, mode)] = [_ways(found)]
            return found
        known = self._found.get(_signature(uses, output, mode))
        ways = self._alike.get(_pattern(uses, output, mode))
        if known is None and ways:
            known = _of_ways(uses, len(output), ways[0])
        return known or assumed_of(uses, output)


def _as(use: Use, narrow: bool) -> Use:
    return use.narrow if narrow and use.narrow is not None else use


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


Way = tuple[str | int, bool]
"""The axis of the cases of a use, or the order of its rows; and whether it is narrow."""


def _ways(found: Separation) -> tuple[Way, ...]:
    def way(order: Order, mixed: bool) -> str | int:
        if mixed:
            return "mixed"
        return order.axis if order.axis is not None else "in turns" if order.interleaved else "in a row"

    each = zip(found.orders, found.mixed, found.narrow, strict=True)
    return tuple((way(order, mixed), narrow) for order, mixed, narrow in each)


def _of_ways(uses: Sequence[Use], examples: int, ways: Sequence[Way]) -> Separation | None:
    """The result for these lengths, from that for other lengths; None if they do not match."""
    uses = [_as(use, narrow) for use, (_, narrow) in zip(uses, ways, strict=True)]
    mixed = {i for i, (way, _) in enumerate(ways) if way == "mixed"}
    own = apart_orders(uses, mixed)
    orders = []
    for i, (use, (way, _)) in enumerate(zip(uses, ways, strict=True)):
        if i not in mixed and isinstance(way, str) and prod(use.grid) % examples:
            return None
        axis = way if isinstance(way, int) else None
        orders.append(own.get(i) or Order(use.grid, examples, axis=axis, interleaved=way == "in turns"))
    return Separation(
        (Grouping(examples),) * len(uses),
        tuple(orders),
        tuple(i in mixed for i in range(len(uses))),
        tuple(narrow for _, narrow in ways),
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
