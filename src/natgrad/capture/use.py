"""One use of parameters in a forward pass."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.capture.layers import Kind

OUTSIDE, EMBEDDING = "outside", "an embedding"
RESHAPING = (
    "CatBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "UnsqueezeBackward",
)


@dataclass(eq=False)
class Use:
    """One use of trainable parameters, by their names; `None` if there is no weight or no bias.

    `kind` says how `a` was computed from `h` and the parameters. `rows` are the rows of the weight's matrix that are
    used, and `bias_rows` those of the bias (None: all). `edge` represents `a` in the autograd graph. Its gradient is
    that of the pre-activation, even if an in-place function overwrote the tensor later. `sources` are the other inputs
    of `a` in the graph, apart from these parameters. `shapes` are the shapes of the parameters. `before` is the use
    before a later call added the bias, or (`is_spread`) copied a shared output for each example. `direct`: the function
    received the parameters themselves, not views of them.
    """

    weight: str | None
    bias: str | None
    kind: Kind
    rows: tuple[int, int] | None
    bias_rows: tuple[int, int] | None
    function: Any
    h: Tensor
    a: Tensor
    edge: GradientEdge
    sources: tuple[Any, ...]
    versions: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    direct: bool = True
    before: Use | None = None
    is_spread: bool = False

    def forget_output(self) -> None:
        """Frees the memory of `a`. Its shape is kept."""
        self.a = self.a.new_empty(()).expand(self.a.shape)
        if self.narrow is not None:
            self.narrow.forget_output()
        else:
            self.before = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return tuple(n for n in (self.weight, self.bias) if n is not None)

    @property
    def narrow(self) -> Use | None:
        """The use before it was spread over examples, if it was."""
        return self.before if self.is_spread else None

    @property
    def is_intact(self) -> bool:
        """Whether `h` was not overwritten since the forward."""
        return self.h._version == self.versions[0]

    def check_input(self) -> None:
        """Raises RuntimeError if `h` was overwritten since the forward."""
        if not self.is_intact:
            raise RuntimeError(
                f"the input of {self.weight or self.bias!r} was changed in place after it was used; "
                "its statistics are lost. Replace the in-place operation by one that returns a new tensor"
            )

    @property
    def a_intact(self) -> bool:
        return self.a._version == self.versions[1]

    @property
    def is_of_data(self) -> bool:
        """Whether its input comes from outside: no trainable parameter has a part in it, except for embeddings that
        numbers were joined with."""
        return all(OUTSIDE in _origins(node) <= {OUTSIDE, EMBEDDING} for node in self.sources)

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes of `a` on which different examples may lie."""
        return self.kind.grid(self.a)

    def parts(self, reached: Set[Any]) -> list[Use]:
        """The use itself; or, if the graph also reaches its form `before`, that form and, as a second use with its own
        pre-activation, the bias that was added later."""
        if self.before is None or self.before.edge.node not in reached:
            return [self]
        if self.is_spread:
            return self.before.parts(reached)
        kind = self.kind.kept(False, True)
        sources = (self.before.edge.node,)
        return [self.before, replace(self, kind=kind, weight=None, function=torch.add, sources=sources, before=None)]


def _origins(node: Any) -> set[str]:
    """What the values of a node of the graph come from, by joining and reshaping alone."""
    found, seen, ahead = set(), {node}, [node]
    while ahead:
        node = ahead.pop()
        name = "" if node is None else node.name().removesuffix("0")
        if not name or name.endswith("AccumulateGrad"):
            found.add(OUTSIDE)
        elif name in RESHAPING:
            before = {n for n, _ in node.next_functions} - seen
            seen |= before
            ahead += before
        else:
            found.add(EMBEDDING if name in ("EmbeddingBackward", "EmbeddingBagBackward") else name)
    return found
