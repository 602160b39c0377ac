"""The interface of all structures: what they do with the cases of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.distributed.world import World
from natgrad.linalg import Operator


class Structure(ABC):
    """The sums over batches from which a block-diagonal matrix is built, in `passes` passes over the data.

    In each pass, `add` is called for every batch and then `merge_ranks`; between two passes, `next_pass`. At the end,
    `build` is called.
    """

    passes = 1

    def __init__(self) -> None:
        self.mass: Tensor | None = None
        """The divisor of the loss's mean, summed over the batches; `add` must call `_add_mass`."""

    @abstractmethod
    def add(self, cases: Cases) -> None:
        """Adds one batch of the current pass."""

    def next_pass(self) -> None:  # noqa: B027
        """What is to be done between two passes."""

    @abstractmethod
    def merge_ranks(self, world: World) -> None:
        """Adds the sums of the other ranks in the current pass."""

    @abstractmethod
    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        """The operator of every layer, for an objective that is a mean or a sum. Its vectors are the layer's weight, as
        a matrix `(d_out, d_in)`, and its bias. `groups.py` joins layers that share parameters."""

    def _add_mass(self, cases: Cases) -> None:
        self.mass = cases.mass if self.mass is None else self.mass + cases.mass

    def _sum_mass(self, world: World) -> None:
        own = torch.zeros((), device=world.device) if self.mass is None else self.mass
        dtypes = [dtype for dtype in world.gather(None if self.mass is None else own.dtype, "the mass") if dtype]
        if not dtypes:
            raise ValueError("data is empty on all ranks: expected at least one (input, target) batch on one of them")
        self.mass = world.sum(own.to(dtypes[0]).clone(), "the mass")

    def _scale(self, is_mean: bool) -> Tensor | float:
        """The factor of the sums over the batches: one over the mass for a mean."""
        assert self.mass is not None
        return 1 / self.mass if is_mean else 1.0
