"""What every kind of use has in common: how a call is read, and what cases it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid t o"]:
        """The gradient in what comes out of the matrix, from that in the output: for each row of the grid, and
        each position that a row has by itself."""

    def grid(self, a: Tensor) -> tuple[int, ...]:
        """The axes of the output on which different examples may lie."""
        return tuple(a.shape[:-1])

    def positions(self, a: Tensor) -> int:
        """How many positions each row of the grid has by itself."""
        return 1

    def rows(self, a: Tensor) -> Tensor:
        """What a tensor of the output's shape has in each row of the grid, flat: `(rows, numbers)`."""
        return a.reshape(-1, a.shape[-1])

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
