"""From recorded uses and an output to each layer's cases: its inputs, and a gradient for each column of `D`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from natgrad.capture.layers import Inputs, Kind, Rows
from natgrad.capture.layers.scale import Scale
from natgrad.capture.use import Use
from natgrad.linalg.layout import PLAIN, Layout

FEW = 8
"""Fewer rows than this are not thinned out."""


@dataclass(frozen=True)
class Layer:
    """The parameters that share a block: a weight, a bias, or a weight with its bias.

    `layout` is that of the weight, and `rows` those of its matrix and of the bias that are meant (None: all). The
    coordinates of a `scale` have no matrix. `function` is what torch calls a use of it.
    """

    weight: str | None
    bias: str | None
    layout: Layout = PLAIN
    rows: tuple[int, int] | None = None
    scale: bool = False
    function: str = field(default="linear", compare=False)

    @property
    def name(self) -> str:
        """The module's name for its `weight`, else the parameter's own."""
        own = self.weight or self.bias or ""
        return own.removesuffix("weight").rstrip("._") if own.endswith((".weight", "_weight")) else own

    @property
    def label(self) -> str:
        """The name, with the rows that are meant."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n in (self.weight, self.bias) if n is not None)

    def key(self) -> str:
        """A text that `of_key` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of_key(cls, key: str) -> Layer:
        """Undoes `key`."""
        own = json.loads(key)
        return cls(**own | {"layout": Layout(**own["layout"]), "rows": own["rows"] and tuple(own["rows"])})


def layers_of(uses: Sequence[Use]) -> dict[Layer, list[Use]]:
    """The uses of each layer. A weight and a bias share a block if they are always used together."""
    partners: dict[str, set[str | None]] = {}
    for use in uses:
        same = use.rows == use.bias_rows
        if use.weight:
            partners.setdefault(use.weight, set()).add(use.bias if same else None)
        if use.bias:
            partners.setdefault(use.bias, set()).add(use.weight if same else None)
    layers: dict[Layer, list[Use]] = {}
    for use in uses:
        together = bool(use.weight and use.bias) and (
            partners[use.weight or ""] == {use.bias} and partners[use.bias or ""] == {use.weight}
        )
        pairs = [(use.weight, use.bias)] if together else [(use.weight, None), (None, use.bias)]
        for weight, bias in pairs:
            if weight or bias:
                rows = use.rows if weight else use.bias_rows
                layers.setdefault(_layer(use.kind, weight, bias, rows), []).append(use)
    return layers


def _layer(kind: Kind, weight: str | None, bias: str | None, rows: tuple[int, int] | None) -> Layer:
    return Layer(weight, bias, kind.layout if weight else PLAIN, rows, isinstance(kind, Scale), kind.name)


class Gradients(Mapping[Layer, list[Tensor]]):
    """The gradients of one column, `(n, t, o)` for every use of a layer. They are copied to `dtype` when they are read,
    one layer after the other: all at once, a half-precision model's would take more memory than its training."""

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
    """One batch: what went into every layer, and column by column the gradient in what came out of it.

    Each is a list with an entry for every use of the layer. A layer without a weight has inputs of width zero, and so
    has a scale: its gradients are those of its coordinates.
    """

    h: dict[Layer, list[Inputs]]
    columns: Iterable[Mapping[Layer, list[Tensor]]]
    """The gradients `g`, `(n, t, o)` each: a dictionary for each column `s_k` of the output, each a backward pass when
    it is read."""
    d_out: dict[Layer, int]
    mass: Tensor
    """What the loss's mean divides by."""
    examples: int
    ignored: Bool[Tensor, "n ..."] | None = None
    """Which of the targets take no part; None: all do."""

    def kept(self) -> Cases:
        """The same, with all columns in memory, so that they can be read again."""
        self.columns = list(self.columns)
        return self

    def rows(self) -> int:
        """The length of the axis that can be thinned out: that of the output's examples, or of what they were flattened
        from."""
        lengths = (use.shape[0] for uses in self.h.values() for use in uses)
        return min((n for n in lengths if n >= FEW and self.examples % n == 0), default=self.examples)

    def fewest(self) -> int:
        """How many cases the layer has that has the fewest, of those that are used on every row: a row at each of a
        layer's positions is one."""
        rows = self.rows()
        used = (sum(t for n, t, _ in (use.shape for use in uses) if n == rows) for uses in self.h.values())
        return rows * min((t for t in used if t), default=1)

    def every(self, step: int, start: int) -> Cases:
        """The cases of every `step`-th example alone, from `start` on: what is left of each sum is in proportion to
        what is left of `mass`, on average over `start`.

        Uses that have not one row for each example, as what all examples share, are kept whole, with that share of
        their gradients' squares.
        """
        whole = self.rows()
        left = len(range(start, whole, step))
        share = left / whole

        def thinned(g: Tensor) -> Tensor:
            return g[start::step] if len(g) == whole else share**0.5 * g

        def columns() -> Iterator[Mapping[Layer, list[Tensor]]]:
            for column in self.columns:
                own, dtype = (column.own, column.dtype) if isinstance(column, Gradients) else (column, None)
                yield Gradients({layer: [thinned(g) for g in uses] for layer, uses in own.items()}, dtype)
                del column, own  # before the next one is made

        h = {
            layer: [use.part(start, whole, step) if use.shape[0] == whole else use for use in uses]
            for layer, uses in self.h.items()
        }
        per_row = self.examples // whole
        ignored = (
            None if self.ignored is None else self.ignored.unflatten(0, (whole, per_row))[start::step].flatten(0, 1)
        )
        return Cases(h, columns(), self.d_out, share * self.mass, left * per_row, ignored)

    def by_example(self, layer: Layer, uses: Sequence[Tensor]) -> Tensor:
        """The uses one after the other along the positions: `(example, all positions, features)`."""
        self.check_examples(layer, [len(use) for use in uses])
        return torch.cat(list(uses), 1)

    def check_examples(self, layer: Layer, lengths: Iterable[int]) -> None:
        """Raises ValueError if axis 0 of a use is not that of the output's examples."""
        for n in lengths:
            if n != self.examples:
                raise ValueError(
                    f"layer {layer.name!r} was used on {n} rows where the output has {self.examples} examples: "
                    "which rows belong together cannot be told. Keep examples on axis 0 and positions on the axes "
                    "after it, or use structure='kfac' with sharing='expand'"
                )

    def without_target(self, sizes: Sequence[tuple[int, int]]) -> list[Bool[Tensor, "n t"]]:
        """Which positions have an ignored target, for uses of `n` examples and `t` positions each.

        A position's target is its own where a use has as many positions as targets, or all uses together have (the
        time steps of a recurrent layer); else those of its example are all ignored.
        """
        assert self.ignored is not None
        ignored, (n, _) = self.ignored, sizes[0]
        together = [t for _, t in sizes]
        if len(sizes) > 1 and {m for m, _ in sizes} == {n} and ignored.numel() == n * sum(together):
            return list(ignored.reshape(n, -1).split(together, 1))
        return [self._without_target(*size) for size in sizes]

    def _without_target(self, n: int, t: int) -> Bool[Tensor, "n t"]:
        assert self.ignored is not None
        if self.ignored.numel() == n * t:
            return self.ignored.reshape(n, t)
        if len(self.ignored) == n:
            return self.ignored.reshape(n, -1).all(1, keepdim=True).expand(n, t)
        return torch.zeros(n, t, dtype=torch.bool, device=self.ignored.device)


def read_cases(
    uses: Sequence[Use],
    output: Tensor,
    columns: Iterable[Tensor],
    mass: Tensor,
    dtype: torch.dtype | None = None,
    *,
    ignored: Tensor | None = None,
    sampled: bool = True,
) -> Cases:
    """The cases of every layer on one batch. Each column takes one backward pass, to the layers' outputs alone.

    No weight gradient is computed. The graph behind `output` is kept. `sampled`: the columns of different examples
    are independent and have mean zero, so that a sum of their gradients is no worse than each alone.

    Raises:
        RuntimeError: if an input was changed in place after its use.
        ValueError: if an input has no axis of examples.
    """
    layers = layers_of(uses)
    h: dict[Layer, list[Inputs]] = {}
    d_out: dict[Layer, int] = {}
    with torch.no_grad():
        for layer, its_uses in layers.items():
            for use in its_uses:
                use.check_input()
                _check_examples(use, output)
            h[layer] = [_inputs(layer, use, len(output)).to(dtype or use.a.dtype) for use in its_uses]
            d_out[layer] = _kind(layer, its_uses[0]).width(its_uses[0].a)
    if not sampled:
        _check_apart(uses, output)
    gradients = _gradients(uses, layers, output, columns, dtype)
    return Cases(h, gradients, d_out, mass.to(dtype or mass.dtype), len(output), ignored)


def read_inputs(layer: Layer, uses: Sequence[Use], dtype: torch.dtype) -> list[Inputs]:
    """The inputs of a layer's uses alone, each row a case.

    Raises:
        RuntimeError: if an input was changed in place after its use.
    """
    for use in uses:
        use.check_input()
    return [_inputs(layer, use, len(use.a)).to(dtype) for use in uses]


def _kind(layer: Layer, use: Use) -> Kind:
    """A use's kind, of the layer's part of its parameters."""
    return use.kind.kept(layer.weight is not None, layer.bias is not None)


def _inputs(layer: Layer, use: Use, examples: int) -> Inputs:
    if layer.weight and not layer.scale:
        return use.kind.inputs(use.by_example(use.h, examples))
    a = use.by_example(use.a.detach(), examples)
    return Rows(a.new_empty(*use.kind.positions(a), 0))


def _gradients(
    uses: Sequence[Use],
    layers: dict[Layer, list[Use]],
    output: Tensor,
    columns: Iterable[Tensor],
    dtype: torch.dtype | None,
) -> Iterator[Mapping[Layer, list[Tensor]]]:
    places: dict[tuple[object, int], int] = {}
    for use in uses:  # the groups of a convolution have one edge
        places.setdefault((use.edge.node, use.edge.output_nr), len(places))
    edges = list({(u.edge.node, u.edge.output_nr): u.edge for u in uses}.values())
    for column in columns if edges else ():
        gradients = torch.autograd.grad(output, edges, column.to(output.dtype), retain_graph=True, allow_unused=True)
        by_layer: dict[Layer, list[Tensor]] = {}
        for layer, its_uses in layers.items():
            by_layer[layer] = []
            for use in its_uses:
                g = gradients[places[use.edge.node, use.edge.output_nr]]
                g = torch.zeros_like(use.a) if g is None else g.reshape(use.a.shape)
                g = use.by_example(g, len(output))
                by_layer[layer].append(_kind(layer, use).gradients(use.by_example(use.h, len(output)), g))
        del gradients, g
        yield Gradients(by_layer, dtype)
        del by_layer


def _check_examples(use: Use, output: Tensor) -> None:
    name = use.weight or use.bias
    if use.kind.features == -1 and use.a.ndim < 2 and len(output) != 1:
        raise ValueError(
            f"the input of {name!r} has shape {tuple(use.h.shape)}, and the output "
            f"{tuple(output.shape)} counts {len(output)} examples; expected an axis of examples first, in both: "
            "model(x.unsqueeze(0)) for a single one"
        )


def _check_apart(uses: Sequence[Use], output: Tensor) -> None:
    """Raises ValueError if several of the output's examples depend on one position of a use, as where positions that
    see one another are flattened to examples: a column, which is of all examples at once, would mix them.

    It is seen from the last and the first example that share a row.
    """
    shared = [u for u in uses if u.kind.positions(u.by_example(u.a.detach(), len(output)))[0] < len(output)]
    for use in shared:
        n, t = use.kind.positions(use.by_example(use.a.detach(), len(output)))
        for row in {len(output) // n - 1, 0}:
            (g,) = torch.autograd.grad(output[row].sum(), use.edge, retain_graph=True, allow_unused=True)
            g = use.a.new_zeros(use.a.shape) if g is None else g.reshape(use.a.shape)
            touched = use.kind.gradients(use.h, g).abs().sum(-1) > 0
            if n * t < len(output) or int(touched.sum()) > 1:
                raise ValueError(
                    f"{use.weight or use.bias!r} was used on {n} examples of {t} positions where the output has "
                    f"{len(output)} examples, which see one another: a column would mix them. Give the loss outputs "
                    "with examples on axis 0 and positions after the classes, (N, C, T) in place of (N·T, C), or use "
                    "estimator='mc'"
                )
