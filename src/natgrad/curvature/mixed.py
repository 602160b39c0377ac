"""A structure for each layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.checks.values import check_choice, described, did_you_mean
from natgrad.curvature.structure import Structure
from natgrad.distributed.world import World
from natgrad.linalg import Operator

REST = "*"


class MixedStructure(Structure):
    """Several structures, each for some of the layers. The first pattern that fits the name of a layer or of one of its
    parameters decides.

    Args:
        choice: a mapping from patterns (as for file names) to names of structures.
        make: makes a structure from its name.
        known: the structures that can be chosen.
    """

    def __init__(self, choice: Mapping[str, str], make: Callable[[str], Structure], known: Collection[str]):
        super().__init__()
        if not choice:
            raise ValueError("structure is an empty dict; expected a structure for each layer: {'*': 'kfac'}")
        for pattern, name in choice.items():
            if not isinstance(pattern, str):
                raise TypeError(f"structure has the key {described(pattern)}; expected names of layers, or patterns")
            check_choice(f"structure[{pattern!r}]", name, known)
        self.choice = dict(choice)
        self.parts = {name: make(name) for name in dict.fromkeys(choice.values())}
        self.passes = max(part.passes for part in self.parts.values())
        self._at = 0
        self._used: dict[str, None] = {}
        self._names: dict[str, None] = {}

    def add(self, cases: Cases) -> None:
        if not self._at:
            self._add_mass(cases)
        cases.kept()
        mine = {layer: self._structure_of(layer) for layer in cases.h}
        for name, part in self._active().items():
            part.add(only(cases, {layer for layer, its in mine.items() if its == name}))

    def next_pass(self) -> None:
        self._at += 1
        for part in self._active().values():
            part.next_pass()

    def merge_ranks(self, world: World) -> None:
        if not self._at:
            self._sum_mass(world)
        for part in self._active().values():
            part.merge_ranks(world)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        unused = [pattern for pattern in self.choice if pattern not in self._used and pattern != REST]
        if unused:
            raise ValueError(
                f"structure has {unused[0]!r}, which fits no layer; expected some of "
                f"{', '.join(list(self._names)[:6])}{did_you_mean(unused[0], self._names)}"
            )
        blocks: dict[Layer, Operator] = {}
        for part in self.parts.values():
            blocks |= part.build(is_mean)
        return blocks

    def _active(self) -> dict[str, Structure]:
        """The structures that use this pass."""
        return {name: part for name, part in self.parts.items() if part.passes > self._at}

    def _structure_of(self, layer: Layer) -> str:
        self._names[layer.name] = None
        for pattern, name in self.choice.items():
            if any(fits(own, pattern) for own in (layer.name, *layer.names)):
                self._used[pattern] = None
                return name
        raise ValueError(
            f"structure has no entry for layer {layer.name!r}; expected one, or '*': 'kfac' at the end for all others"
        )


def fits(name: str, pattern: str) -> bool:
    """Whether a name equals the pattern, is inside the module of that name, or matches it as a wildcard pattern.

    >>> fits("net.0.weight", "net"), fits("net.0", "net.*"), fits("network", "net")
    (True, True, False)
    """
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def only(cases: Cases, layers: Collection[Layer]) -> Cases:
    """The cases of some of the layers. The columns must be kept in memory."""

    def part(of: Mapping[Layer, Any]) -> dict[Layer, Any]:
        return {layer: its for layer, its in of.items() if layer in layers}

    columns = [{layer: column[layer] for layer in column if layer in layers} for column in cases.columns]
    names = {n for layer in layers for n in layer.names}
    return replace(
        cases,
        h=part(cases.h),
        columns=[column for column in columns if column],
        d_out=part(cases.d_out),
        ignored=part(cases.ignored),
        present=part(cases.present),
        shapes={n: shape for n, shape in cases.shapes.items() if n in names},
        together=tuple(its for its in cases.together if names & set(its)),
        mixed=tuple(layer for layer in cases.mixed if layer in layers),
    )
