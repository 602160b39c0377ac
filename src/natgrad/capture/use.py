"""One use of parameters in a forward."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from natgrad.capture.layers import Kind


@dataclass(eq=False)
class Use:
    """One use of trainable parameters, named; `None` where there is none.

    `kind` says how `a` came of `h` and the parameters. `rows` are the rows of the weight's matrix that are in use, and
    `bias_rows` those of the bias (None: all).
    `edge` stands for `a` in the autograd graph: its gradient is that of the pre-activation even if an in-place
    function has since overwritten the tensor, with the entries of `a` in its own shape. `sources` are where the
    graph goes on from `a` beside these parameters. `shapes` are the parameters' own.
    `before` is the use as it was until a later call added the bias,
    or (`is_spread`) gave each example a copy of what is one for all. `direct`: the function was given the parameters
    themselves.
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
        """Lets go of the memory of `a`; its shape stays."""
        self.a = self.a.new_empty(()).expand(self.a.shape)
        if self.narrow is not None:
            self.narrow.forget_output()
        else:
            self.before = None

    @property
    def narrow(self) -> Use | None:
        """The use as it was before it was spread over examples, where it was."""
        return self.before if self.is_spread else None

    def check_input(self) -> None:
        """Raises RuntimeError if `h` was overwritten since the forward."""
        if self.h._version != self.versions[0]:
            raise RuntimeError(
                f"the input of {self.weight or self.bias!r} was changed in place after it was used; "
                "its statistics are lost. Replace the in-place operation by one that returns a new tensor"
            )

    @property
    def a_intact(self) -> bool:
        return self.a._version == self.versions[1]

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes of `a` on which different examples may lie."""
        return self.kind.grid(self.a)

    def parts(self, reached: Set[Node]) -> list[Use]:
        """The use itself; or, where the graph has reached what was `before`, that, and the bias added since with a
        pre-activation of its own."""
        if self.before is None or self.before.edge.node not in reached:
            return [self]
        if self.is_spread:
            return self.before.parts(reached)
        kind = self.kind.kept(False, True)
        sources = (self.before.edge.node,)
        return [self.before, replace(self, kind=kind, weight=None, function=torch.add, sources=sources, before=None)]
