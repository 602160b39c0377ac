"""What every kind of use has in common: how a call is read, and what cases it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layers.inputs import Inputs
from natgrad.linalg.layout import Layout


class Kind(ABC):
    """How one use of parameters is read."""

    name: str
    """What a table of coverage calls it."""
    layout = Layout()
    features = -1
    """The axis of the output that the bias has an entry for each of."""

    @abstractmethod
    def inputs(self, h: Tensor) -> Inputs:
        """What the weight's matrix is multiplied with."""

    @abstractmethod
    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "n t o"]:
        """The gradient in what comes out of the matrix, from that in the output."""

    def positions(self, a: Tensor) -> tuple[int, int]:
        """How many examples and positions an output has."""
        return (len(a), prod(a.shape[1:-1])) if a.ndim > 1 else (1, 1)

    def width(self, a: Tensor) -> int:
        """How many features its gradients have."""
        return a.shape[self.features]

    def kept(self, weight: bool, bias: bool) -> Kind:
        """This kind where only the weight, or only the bias, is looked at."""
        return self

    def oriented(self, transposed: bool) -> Kind | None:
        """This kind for the transpose of its weight; None where there is none."""
        return None if transposed else self


@dataclass
class Call:
    """A torch call read as one use `weight · input + bias`, or of some rows of the weight and of the bias."""

    kind: Kind
    h: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    rows: tuple[int, int] | None = None
    others: tuple[Tensor, ...] = ()
    """What else the output depends on, beside input, weight and bias."""


@dataclass(frozen=True)
class View:
    """What a torch call gave of a tensor: some rows of it (one entry for each tensor that it returned), or its
    transpose, or the same entries in another shape."""

    of: Tensor
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
