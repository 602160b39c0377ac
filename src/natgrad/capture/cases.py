"""The cases of a batch: the inputs of every layer, and the gradients at its outputs, column by column."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, Rows

FEW = 8
"""Batches with fewer rows than this are not subsampled."""
Present = tuple[Bool[Tensor, "_n _t"], Bool[Tensor, "_n _t"]]
"""Which positions are not padding, and which depend on their case."""


class Gradients(Mapping[Layer, list[Tensor]]):
    """The gradients of one column, `(n, t, o)` for every use of a layer. They are copied to `dtype` when they are read,
    one layer at a time. Copying all at once would take more memory than the training of a half-precision model."""

    def __init__(self, own: Mapping[Layer, list[Tensor]], dtype: torch.dtype | None):
        self.own, self.dtype = own, dtype

    def __getitem__(self, layer: Layer) -> list[Tensor]:
        uses = self.own[layer]
        return uses if self.dtype is None else [g.to(self.dtype) for g in uses]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


@dataclass
class Cases:
    """One batch: the inputs of every layer, and the gradients at its outputs, column by column.

    A case is a row of the output, or several rows that depend on one another. Each value is a list with an entry for
    every use of the layer, `(n, t, ...)` for `n` cases with `t` positions. A layer without a weight has inputs of width
    zero. So has a scale, whose gradients are those of its coordinates.
    """

    h: dict[Layer, list[Inputs]]
    columns: Iterable[Mapping[Layer, list[Tensor]]]
    """The gradients `g`, `(n, t, o)` each: a dictionary for each column `s_k` of the output. Reading one takes a
    backward pass. If layers have different cases, a dictionary has the gradients of some of the layers."""
    d_out: dict[Layer, int]
    mass: Tensor
    """The divisor of the loss's mean."""
    examples: int
    """The number of rows of the output."""
    ignored: Mapping[Layer, Bool[Tensor, "_n _targets"]] = field(default_factory=dict)
    """Which targets of every case are ignored. Without an entry, none are."""
    present: Mapping[Layer, list[Present | None]] = field(default_factory=dict)
    """For layers with padded positions: which positions are not padding."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of the parameters, by name."""
    together: tuple[tuple[str, ...], ...] = ()
    """The parameters of every use. Parameters of one use belong to one exact block."""
    mixed: tuple[Layer, ...] = ()
    """The layers in which a row depends on several rows of the output, but is still treated as a case."""
    data: frozenset[Layer] = frozenset()
    """The layers whose inputs come from outside, such as features or images, at every use."""
    term: str = ""
    """The term of the objective, if it has several."""

    def scaled(self, factor: float, term: str) -> Cases:
        """The cases of a term of an objective, with `factor` times its matrix."""
        own = ({layer: [factor**0.5 * g for g in its] for layer, its in c.items()} for c in self.columns)
        return replace(self, columns=own, term=term)

    def kept(self) -> Cases:
        """The same, with all columns in memory, so that they can be read again."""
        self.columns = list(self.columns)
        return self

    def rows(self) -> int:
        """The length of the axis that can be subsampled: the output's examples, or the sequences from which its rows
        were flattened."""
        lengths = (use.shape[0] for uses in self.h.values() for use in uses)
        return min((n for n in lengths if n >= FEW and self.examples % n == 0), default=self.examples)

    def fewest(self) -> int:
        """The smallest number of cases of a layer, among the layers that are used on every row. Each position of a row
        counts as a case."""
        rows = self.rows()
        used = (sum(t for n, t, _ in (use.shape for use in uses) if n == rows) for uses in self.h.values())
        return rows * min((t for t in used if t), default=1)

    def every(self, step: int, start: int) -> Cases:
        """Only the cases of every `step`-th example, from `start` on. On average over `start`, each sum shrinks in
        proportion to `mass`.

        Layers that do not have one case for each example, such as parameters that all examples share, keep all cases,
        and the squares of their gradients are scaled by the same share.
        """
        whole = self.rows()
        left = len(range(start, whole, step))
        share = left / whole
        thin = {
            layer
            for layer, uses in self.h.items()
            if layer not in self.present and all(use.shape[0] == whole for use in uses)
        }

        def thinned(layer: Layer, g: Tensor) -> Tensor:
            return g[start::step] if layer in thin else share**0.5 * g

        def columns() -> Iterator[Mapping[Layer, list[Tensor]]]:
            for column in self.columns:
                own, dtype = (column.own, column.dtype) if isinstance(column, Gradients) else (column, None)
                yield Gradients({layer: [thinned(layer, g) for g in uses] for layer, uses in own.items()}, dtype)
                del column, own  # frees memory before the next one is made

        h = {
            layer: [use.part(start, whole, step) for use in uses] if layer in thin else uses
            for layer, uses in self.h.items()
        }
        ignored = {layer: t[start::step] if layer in thin else t for layer, t in self.ignored.items()}
        examples = left * (self.examples // whole)
        mass = share * self.mass
        return replace(self, h=h, columns=columns(), mass=mass, examples=examples, ignored=ignored)

    def parted(self, known: Collection[Layer]) -> Cases:
        """The same, but layers that are not known are split into one layer for each of their parameters."""
        parts = {layer: layer.apart() for layer in self.h if layer not in known and len(layer.names) > 1}
        if not parts:
            return self

        def inputs(layer: Layer, uses: list[Inputs]) -> list[Inputs]:
            return uses if layer.weight else [Rows(use.dense()[..., :0]) for use in uses]

        def columns() -> Iterator[Mapping[Layer, list[Tensor]]]:
            for column in self.columns:
                own = {}
                for layer, uses in column.items():
                    for i, part in enumerate(parts.get(layer, (layer,))):
                        own[part] = [g.chunk(2, -1)[i] if layer.scale and layer in parts else g for g in uses]
                yield own

        h = {part: inputs(part, uses) for layer, uses in self.h.items() for part in parts.get(layer, (layer,))}
        d_out = {
            part: d // (2 if layer.scale and layer in parts else 1)
            for layer, d in self.d_out.items()
            for part in parts.get(layer, (layer,))
        }
        ignored = {part: t for layer, t in self.ignored.items() for part in parts.get(layer, (layer,))}
        present = {part: its for layer, its in self.present.items() for part in parts.get(layer, (layer,))}
        data = frozenset(part for layer in self.data for part in parts.get(layer, (layer,)))
        return replace(self, h=h, columns=columns(), d_out=d_out, ignored=ignored, present=present, data=data)

    def present_in(self, layer: Layer, reduced: bool) -> list[Bool[Tensor, "n t"]] | None:
        """Which positions of every use are not padding, or (`reduced`) depend on their case. None: all."""
        if layer not in self.present:
            return None
        both = zip(self.h[layer], self.present[layer], strict=True)
        return [
            torch.ones(use.shape[:2], dtype=torch.bool, device=self.mass.device) if its is None else its[int(reduced)]
            for use, its in both
        ]

    def without_target(self, layer: Layer) -> list[Bool[Tensor, "n t"]] | None:
        """Which positions of every use have an ignored target. None: no position.

        If a use has as many positions as there are targets, each position has its own target. The same holds if all
        uses together do (the time steps of a recurrent layer). Otherwise a position counts as ignored if all targets
        of its case are ignored.
        """
        ignored = self.ignored.get(layer)
        if ignored is None:
            return None
        sizes = [use.shape[:2] for use in self.h[layer]]
        n, together = sizes[0][0], [t for _, t in sizes]
        if len(sizes) > 1 and ignored.numel() == n * sum(together):
            return list(ignored.reshape(n, -1).split(together, 1))
        return [_without_target(ignored, *size) for size in sizes]


def _without_target(ignored: Bool[Tensor, "cases targets"], n: int, t: int) -> Bool[Tensor, "n t"]:
    if ignored.numel() == n * t:
        return ignored.reshape(n, t)
    if len(ignored) == n:
        return ignored.all(1, keepdim=True).expand(n, t)
    return torch.zeros(n, t, dtype=torch.bool, device=ignored.device)
