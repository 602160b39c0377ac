"""What every structure does with the cases of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.moments import MAX_DIM
from natgrad.distributed.world import World
from natgrad.linalg import Operator


class Structure(ABC):
    """What a block-diagonal matrix sums over batches, and the operators that it builds of the sums.

    `add` is called for each batch, `merge_ranks` after the last one, `build` at the end. A structure that needs several
    `passes` over the data has this done once for each, with `next_pass` in between.

    Args:
        centered: hold weight and bias apart, with the covariance of the inputs.
        sharing: of K-FAC's factors, `"expand"` or `"reduce"`.
        max_dim: the most rows of a factor that is not kept as its diagonal.
    """

    passes = 1

    def __init__(self, centered: bool = True, sharing: str = "expand", max_dim: int = MAX_DIM):
        self.centered, self.sharing, self.max_dim = centered, sharing, max_dim
        self.mass: Tensor | None = None
        """What the loss's mean divides by, summed over the batches: `add` calls `_add_mass`."""

    @abstractmethod
    def add(self, cases: Cases) -> None:
        """Takes in one batch of the current pass."""

    def next_pass(self) -> None:  # noqa: B027
        """What is to be done between two passes."""

    @abstractmethod
    def merge_ranks(self, world: World) -> None:
        """Takes in what the other ranks have summed in the current pass."""

    @abstractmethod
    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        """Every layer's operator: of the objective's mean, or of its sum. Its parts are the layer's weight, as the
        matrix `(d_out, d_in)`, and its bias; several layers that share parameters are joined (`groups.py`)."""

    def _add_mass(self, cases: Cases) -> None:
        self.mass = cases.mass if self.mass is None else self.mass + cases.mass

    def _sum_mass(self, world: World) -> None:
        own = torch.zeros((), device=world.device) if self.mass is None else self.mass
        dtypes = [dtype for dtype in world.gather(None if self.mass is None else own.dtype, "the mass") if dtype]
        if not dtypes:
            raise ValueError("data is empty on all ranks: expected at least one (input, target) batch on one of them")
        self.mass = world.sum(own.to(dtypes[0]).clone(), "the mass")

    def _scale(self, is_mean: bool) -> Tensor | float:
        """What sums over the batches are multiplied with: one over the mass for a mean."""
        assert self.mass is not None
        return 1 / self.mass if is_mean else 1.0
