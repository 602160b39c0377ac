"""The parameters that share a block, and their uses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from natgrad.capture.layers import Kind
from natgrad.capture.layers.scale import Scale
from natgrad.capture.use import Use
from natgrad.linalg.layout import PLAIN, Layout


@dataclass(frozen=True)
class Layer:
    """The parameters that share a block: a weight, a bias, or a weight with its bias.

    `layout` is the layout of the weight. `rows` are the rows of its matrix and of the bias that belong to the layer
    (None: all). The coordinates of a `scale` have no matrix. If there is one parameter only, scale or shift, it is the
    `weight`. `more` are further parameters, if layers share some. `function` is torch's name of its use.
    """

    weight: str | None
    bias: str | None
    layout: Layout = PLAIN
    rows: tuple[int, int] | None = None
    scale: bool = False
    more: tuple[str, ...] = ()
    function: str = field(default="linear", compare=False)

    @property
    def name(self) -> str:
        """The module's name for its `weight`, else the parameter's own."""
        own = self.weight or self.bias or ""
        return own.removesuffix("weight").rstrip("._") if own.endswith((".weight", "_weight")) else own

    @property
    def label(self) -> str:
        """The name, with the rows."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def names(self) -> tuple[str, ...]:
        return (*(n for n in (self.weight, self.bias) if n is not None), *self.more)

    def apart(self) -> tuple[Layer, ...]:
        """A separate layer for each of its parameters."""
        if len(self.names) == 1:
            return (self,)
        bias = replace(self, weight=self.bias, bias=None) if self.scale else replace(self, weight=None, layout=PLAIN)
        return replace(self, bias=None), bias

    def key(self) -> str:
        """A text that `of_key` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of_key(cls, key: str) -> Layer:
        """Undoes `key`."""
        own = json.loads(key)
        rows, more = own["rows"] and tuple(own["rows"]), tuple(own.get("more", ()))
        return cls(**own | {"layout": Layout(**own["layout"]), "rows": rows, "more": more})


def layers_of(uses: Sequence[Use]) -> dict[Layer, list[Use]]:
    """The uses of each layer. A weight and a bias share a block if they are always used together."""
    partners: dict[str, set[tuple[str, str | None]]] = {}
    for use in uses:
        same = use.rows == use.bias_rows
        if use.weight:
            partners.setdefault(use.weight, set()).add(("bias", use.bias if same else None))
        if use.bias:
            partners.setdefault(use.bias, set()).add(("weight", use.weight if same else None))
    layers: dict[Layer, list[Use]] = {}
    for use in uses:
        together = bool(use.weight and use.bias) and (
            partners[use.weight or ""] == {("bias", use.bias)} and partners[use.bias or ""] == {("weight", use.weight)}
        )
        pairs = [(use.weight, use.bias)] if together else [(use.weight, None), (None, use.bias)]
        for weight, bias in pairs:
            if weight or bias:
                rows = use.rows if weight else use.bias_rows
                layers.setdefault(_layer(use.kind, weight, bias, rows), []).append(use)
    return layers


def parted(layers: Iterable[Layer]) -> set[Layer]:
    """The layers of a weight and a bias of which one is also used together with another parameter, or alone."""
    layers = list(layers)
    partners: dict[str, set[tuple[str, ...]]] = {}
    for layer in layers:
        for n in layer.names:
            partners.setdefault(n, set()).add(layer.names)
    return {layer for layer in layers if len(layer.names) > 1 and any(len(partners[n]) > 1 for n in layer.names)}


def _layer(kind: Kind, weight: str | None, bias: str | None, rows: tuple[int, int] | None) -> Layer:
    if isinstance(kind, Scale) and not weight:
        weight, bias = bias, None
    scale = isinstance(kind, Scale)
    return Layer(weight, bias, PLAIN if scale or not weight else kind.layout, rows, scale, function=kind.name)
