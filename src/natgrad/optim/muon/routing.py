"""Which step each parameter takes: by what it does in the model's forward, or as the user says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from natgrad.capture.layer import Layer
from natgrad.capture.layers.embedding import Embedding, EmbeddingBag
from natgrad.capture.layers.recurrent import PACKABLE, PACKED
from natgrad.capture.layers.scale import Scale
from natgrad.capture.recorder import WITHOUT_GRADIENTS
from natgrad.capture.use import Use
from natgrad.checks.parameters import some_of
from natgrad.checks.values import check_choice, described, did_you_mean
from natgrad.linalg.layout import Layout

WHITENED, ORTHOGONAL, ADAMW = "whitened", "orthogonal", "adamw"
STEPS = {
    WHITENED: "orthogonalized after whitening",
    ORTHOGONAL: "orthogonalized, as Muon's",
    ADAMW: "that of AdamW",
}
Steps = Mapping[str, str] | Callable[[str], str | None] | None
"""The user's choice of steps: by names or patterns such as `"blocks.*.out.weight"`, or by a function of the name."""

NOT_SEEN = "a gradient came, and no use of it was seen in a forward of the model"
NOT_SEEN_YET = "not used yet in a forward of the model in training mode"
BY_USER = "chosen with steps="
PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum", "tensordot", "inner", "linear"}
PRODUCTS |= {func.__name__ for func in PACKABLE}
"""Functions that multiply by matrices."""


@dataclass(frozen=True)
class Route:
    """The step that a parameter takes, `"whitened"`, `"orthogonal"` or `"adamw"`, and why. `units` are its matrices:
    one, or some rows each. `columns` are those of the matrices, as the forward multiplies with them. If there are
    `gates`, a matrix is that of several gates, one below the other, and each is orthogonalized alone."""

    step: str
    why: str
    units: tuple[Layer, ...] = ()
    gates: int = 1
    columns: int | None = None

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """The rows and columns of the matrix that a parameter of this shape is, with all of its rows."""
        layout = self.units[0].layout
        return matrix_shape(layout, shape) if self.columns is None else (prod(shape) // self.columns, self.columns)

    def is_as_chosen(self, wanted: str | None) -> bool:
        """Whether the user's choice of a step would give the same route."""
        return (BY_USER in self.why) == (wanted is not None) and wanted in (None, self.step)

    def unwhitened(self) -> Route:
        """The same without whitening."""
        return replace(self, step=ORTHOGONAL) if self.step == WHITENED else self

    def sharing(self, unit: Layer, columns: int) -> list[Layer]:
        """The matrices that share rows with a use of the weight."""
        if columns != self.columns:
            return []
        start, stop = unit.rows or (0, math.inf)
        near = (own for own in self.units if own.layout == unit.layout)
        return [own for own in near if own.rows is None or (own.rows[0] < stop and start < own.rows[1])]

    def state(self) -> dict[str, Any]:
        """Plain values, which `of_state` reads."""
        units = [unit.key() for unit in self.units]
        return {"step": self.step, "why": self.why, "units": units, "gates": self.gates, "columns": self.columns}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Route:
        """Undoes `state`."""
        units = tuple(map(Layer.of_key, state.get("units", ())))
        return cls(state["step"], state["why"], units, state.get("gates", 1), state.get("columns"))


@dataclass(frozen=True)
class Seen:
    """One use of a weight or bias in a forward, without the values."""

    name: str
    unit: Layer | None
    """The matrix that it multiplies with; None where it is no matrix."""
    function: str
    is_embedding: bool
    nodes: tuple[Node, ...]
    """What stands for its output in the autograd graph."""
    sources: tuple[Node, ...]
    """Where the graph goes on from its output, beside the parameters."""
    gates: int = 1
    """How many gates of a recurrent layer the rows of the weight are for."""
    columns: int | None = None
    """Those of the matrix."""
    is_inner: bool = False
    """Whether other matrices are known to come after it, also without its nodes."""


def unit_of(use: Use) -> Layer | None:
    """The matrix that a use multiplies its inputs with; None where there is none."""
    if use.weight is None or isinstance(use.kind, (Scale, Embedding, EmbeddingBag)):
        return None
    rows = use.rows
    if rows is not None and rows == (0, prod(use.shapes[use.weight]) // columns_of(use)):
        rows = None
    return Layer(use.weight, None, use.kind.layout, rows, function=use.kind.name)


def named(units: Iterable[Layer]) -> str:
    """The weights of matrices, for messages."""
    return ", ".join(dict.fromkeys(repr(unit.weight) for unit in units))


def columns_of(use: Use) -> int:
    """Those of the matrix that a use multiplies its inputs with."""
    return use.kind.kept(True, False).inputs(use.h).shape[2]


def seen_in(uses: Iterable[Use], gates: Mapping[str, int]) -> Iterator[Seen]:
    """What the recorded uses say about the parameters' roles. `gates`: how many gates' matrices a weight has."""
    for use in uses:
        nodes, part = [use.edge.node], use.before
        while part is not None:
            nodes.append(part.edge.node)
            part = part.before
        sources = use.sources if use.before is None else use.sources + use.before.sources
        embeds = isinstance(use.kind, (Embedding, EmbeddingBag))
        for name in (use.weight, use.bias):
            if name is not None:
                unit = unit_of(use) if name == use.weight else None
                embedded = embeds and name == use.weight
                columns = None if unit is None else columns_of(use)
                yield Seen(name, unit, use.kind.name, embedded, tuple(nodes), sources, gates.get(name, 1), columns)


def routes_of(
    seen: Sequence[Seen], shapes: Mapping[str, Sequence[int]], chosen: Callable[[str], str | None]
) -> dict[str, Route]:
    """The route of every parameter that was seen, of which `shapes` has the shape.

    A weight that multiplies inputs takes the whitened step. Embeddings take AdamW's, and so does an output layer, after
    which no other matrix comes; and all that is no matrix.

    Raises:
        ValueError: if the user has chosen a step that a parameter cannot take.
    """
    inner = followed_by_matrices(seen)
    by_name: dict[str, list[Seen]] = {}
    for s in seen:
        if s.name in shapes:
            by_name.setdefault(s.name, []).append(s)
    found = {}
    for name, its in by_name.items():
        route, wanted = _route(name, shapes[name], its, inner), chosen(name)
        found[name] = route if wanted is None else _as_chosen(name, shapes[name], wanted, route, its)
    return found


def _route(name: str, shape: Sequence[int], seen: Sequence[Seen], inner: set[Node]) -> Route:
    functions = " and ".join(dict.fromkeys(s.function for s in seen))
    if any(s.is_embedding for s in seen):
        also = ", and multiplies inputs elsewhere" if any(s.unit for s in seen) else ""
        return Route(ADAMW, f"an embedding{also}")
    if all(s.unit is None for s in seen):
        return Route(ADAMW, f"no matrix: a scale, shift or bias, used by {functions}")
    if not any(s.is_inner or not inner.isdisjoint(s.nodes) for s in seen if s.unit is not None):
        return Route(ADAMW, f"an output layer: no matrix comes after it, used by {functions}")
    route, (gates, *others) = (
        _matrices(name, shape, seen, f"a hidden matrix, used by {functions}"),
        {s.gates for s in seen},
    )
    if gates == 1 or others or route.units != (Layer(name, None),):  # a part of the rows, or no matrix
        return route
    return replace(route, gates=gates, why=f"{gates} gates' hidden matrices, used by {functions}")


def _matrices(name: str, shape: Sequence[int], seen: Sequence[Seen], why: str) -> Route:
    """The matrices that a parameter is; not whitened where these have no one input."""
    units = sorted({s.unit: None for s in seen if s.unit is not None}, key=lambda unit: unit.rows or (0, 0))
    columns, *others = {s.columns for s in seen if s.unit is not None}
    if others:
        return Route(ORTHOGONAL, f"{why}, as matrices of several shapes", (Layer(name, None),))
    assert columns is not None
    rows = prod(shape) // columns
    heights = [rows if unit.rows is None else unit.rows[1] - unit.rows[0] for unit in units]
    if min(max(heights), columns) == 1:
        return Route(ADAMW, f"{why}, of a single row or column")
    alone = Layer(name, None, units[0].layout)
    if len({unit.layout for unit in units}) > 1:
        return Route(ORTHOGONAL, f"{why}, as W and as its transpose", (Layer(name, None),))
    if len(units) == 1 and units[0].rows in (None, (0, rows)):
        return Route(WHITENED, why, (alone,), columns=columns)
    ends = [unit.rows or (0, rows) for unit in units]
    if [0, *(stop for _, stop in ends)] != [*(start for start, _ in ends), rows]:
        return Route(
            ORTHOGONAL, f"{why}, of which rows that overlap or a part are used at a time", (alone,), 1, columns
        )
    return Route(WHITENED, f"{why}, {len(units)} times some of its rows", tuple(units), columns=columns)


def _as_chosen(name: str, shape: Sequence[int], wanted: str, by_use: Route, seen: Sequence[Seen]) -> Route:
    """The user's choice for a parameter, of which `by_use` is what its uses say."""
    if wanted == ADAMW:
        return Route(ADAMW, BY_USER)
    multiplies = any(s.unit is not None for s in seen)
    route = by_use if by_use.units or not multiplies else _matrices(name, shape, seen, "")
    if wanted == ORTHOGONAL:
        return replace(route, step=ORTHOGONAL, why=BY_USER, units=route.units or (Layer(name, None),))
    if route.step != WHITENED:
        raise ValueError(
            f"steps gives {name!r} the step 'whitened', and it has no inputs to whiten: it is {by_use.why}. Expected "
            "'orthogonal' or 'adamw' for it"
        )
    return replace(route, why=BY_USER)


def multiplies(function: str) -> bool:
    """Whether one of `Recorder.others` is a function that multiplies by matrices."""
    return function.removesuffix(PACKED) in PRODUCTS or function.endswith(WITHOUT_GRADIENTS)


def unseen(name: str, wanted: str | None, function: str | None) -> Route:
    """The route of a parameter that has a gradient, and was not used as in a layer, but by `function` if that is known.
    It has no inputs to whiten."""
    why = NOT_SEEN if function is None else f"used by {function}, which is not read as a layer"
    if wanted in (WHITENED, ORTHOGONAL):
        return Route(ORTHOGONAL, f"{BY_USER}; {why}", (Layer(name, None),))
    return Route(ADAMW, why if wanted is None else BY_USER)


def followed_by_matrices(seen: Sequence[Seen]) -> set[Node]:
    """The outputs of matrices on which the inputs of other matrices depend."""
    outputs = {node for s in seen if s.unit is not None for node in s.nodes}
    left = [node for s in seen if s.unit is not None for node in s.sources]
    reached, inner = set[Node](), set[Node]()
    while left:
        node = left.pop()
        if node in reached:
            continue
        reached.add(node)
        if node in outputs:
            inner.add(node)  # what is behind it is among the sources
        else:
            left += [n for n, _ in node.next_functions if n is not None]
    return inner


def matrix_shape(layout: Layout, shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of the matrix that a parameter of this shape is."""
    if layout.form == "transposed":
        return prod(shape[1:]), shape[0]
    rows = shape[0] if layout.form == "plain" else layout.groups * shape[1]
    return rows, prod(shape) // rows


def chooser(steps: Steps, shapes: Mapping[str, Sequence[int]]) -> Callable[[str], str | None]:
    """The user's choice of a step by the parameter's name; None: by its use.

    Raises:
        TypeError, ValueError: if it is no such choice, or a pattern is of no parameter.
    """
    if steps is None:
        return lambda name: None
    if not callable(steps) and not isinstance(steps, Mapping):
        raise TypeError(
            f"steps is {described(steps)}; expected a dictionary of names and steps, or a function of a name"
        )
    found: dict[str, str | None] = {}
    if callable(steps):
        found = {name: steps(name) for name in shapes}
    else:
        for pattern, wanted in steps.items():
            names = [name for name in shapes if fnmatchcase(name, pattern)]
            if not names:
                raise ValueError(
                    f"steps has {pattern!r}, which is no parameter's name; expected some of {some_of(shapes)}"
                    f"{did_you_mean(pattern, shapes)}"
                )
            found.update(dict.fromkeys(names, wanted))
    for name, step in found.items():
        check_choice(f"steps[{name!r}]", step, STEPS, meanings=STEPS, optional=True)
        if step in (WHITENED, ORTHOGONAL) and len(shapes[name]) < 2:
            raise ValueError(
                f"steps gives {name!r} the step {step!r}, and it is no matrix: its shape is {tuple(shapes[name])}; "
                "expected 'adamw'"
            )
    return found.get


class Routing(Mapping[str, Route]):
    """Every parameter's route by name; `print` shows a table."""

    def __init__(self, routes: Mapping[str, Route], parameters: Mapping[str, Tensor]):
        self._routes = {n: routes.get(n) or Route(ADAMW, _why_not(p)) for n, p in parameters.items()}
        self._shapes = {n: tuple(p.shape) for n, p in parameters.items()}

    def __getitem__(self, name: str) -> Route:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, shape, step and reason; those that differ in numbers of their names alone are one row."""
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for name, route in self.items():
            shape = " x ".join(map(str, self._shapes[name])) or "scalar"
            groups.setdefault((re.sub(r"\d+", "*", name), shape, route.step, route.why), []).append(name)
        return [
            (names[0] if len(names) == 1 else f"{pattern} ({len(names)})", shape, step, why)
            for (pattern, shape, step, why), names in groups.items()
        ]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "step", "why"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        cells = (([cell.ljust(w) for cell, w in zip(row, widths, strict=False)], row[3]) for row in rows)
        return "\n".join("  ".join([*first, why]) for first, why in cells)

    __repr__ = __str__


def _why_not(p: Tensor) -> str:
    """Why there is no route yet."""
    return NOT_SEEN_YET if p.requires_grad else "frozen"
