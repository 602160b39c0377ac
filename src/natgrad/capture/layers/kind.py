"""The interface of all kinds of uses: how a call is read, and the cases that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.layers.inputs import Inputs
from natgrad.linalg.layout import Layout


class Kind(ABC):
    """Defines how one use of parameters is read."""

    name: str
    """Its name in the table of coverage."""
    layout = Layout()
    features = -1
    """The axis of the output along which the bias lies."""

    @abstractmethod
    def inputs(self, h: Tensor) -> Inputs:
        """The inputs that the weight's matrix multiplies."""

    @abstractmethod
    def gradients(self, h: Tensor, g: Tensor) -> Float[Tensor, "*grid t o"]:
        """The gradient at the output of the matrix, from the gradient `g` at the output of the use: for each row of the
        grid, and each position within a row."""

    def grid(self, a: Tensor) -> tuple[int, ...]:
        """The axes of the output that may hold different examples."""
        return tuple(a.shape[:-1])

    def positions(self, a: Tensor) -> int:
        """The number of positions within each row of the grid."""
        return 1

    def rows(self, a: Tensor) -> Tensor:
        """The entries of a tensor of the output's shape in each row of the grid, flattened: `(rows, numbers)`."""
        return a.reshape(-1, a.shape[-1])

    def width(self, a: Tensor) -> int:
        """The number of features of its gradients."""
        return a.shape[self.features]

    def kept(self, weight: bool, bias: bool) -> Kind:
        """This kind restricted to the weight, or to the bias."""
        return self

    def oriented(self, transposed: bool) -> Kind | None:
        """This kind for the transpose of its weight, or None if there is no such kind."""
        return None if transposed else self


@dataclass
class Call:
    """A torch call, read as one use `weight · input + bias`, possibly with only some rows of the weight and the
    bias."""

    kind: Kind
    h: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    rows: tuple[int, int] | None = None
    others: tuple[Tensor, ...] = ()
    """Other tensors that the output depends on, apart from input, weight and bias."""

    @property
    def is_dense(self) -> bool:
        """Whether the input is a plain tensor, and not a sparse or a nested one."""
        return self.h.layout is torch.strided and not self.h.is_nested


@dataclass(frozen=True)
class View:
    """What a torch call returned from a tensor: some of its rows (one entry for each returned tensor), its transpose,
    or the same entries in another shape."""

    of: Tensor
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
