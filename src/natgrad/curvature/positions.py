"""Which positions of the examples are cases, as the exact block keeps its inputs and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.exact import of_all_ranks
from natgrad.curvature.moments import kept_positions
from natgrad.distributed.world import World
from natgrad.linalg import ExactBlock


class Positions:
    """Which positions of an example are cases. If batches have different numbers of positions, the exact block fills
    shorter examples with zeros. These positions, and positions without a target, are not cases."""

    def __init__(self) -> None:
        self._own: dict[Layer, list[Tensor]] = {}

    def add(self, cases: Cases) -> None:
        for layer, uses in cases.h.items():
            kept = kept_positions(cases, layer)
            if kept is None:
                t = sum(use.shape[1] for use in uses)
                kept = [torch.ones(uses[0].shape[0], t, dtype=torch.bool, device=cases.mass.device)]
            self._own.setdefault(layer, []).append(torch.cat(kept, 1))

    def merge_ranks(self, world: World) -> None:
        """Adds the positions of the other ranks."""
        self._own = of_all_ranks(world.exchanged(self._own, "the positions"))

    def cases(
        self, layer: Layer, block: ExactBlock, sharing: str
    ) -> tuple[Float[Tensor, "cases i"], Float[Tensor, "cases k o"]]:
        """The inputs and gradients that K-FAC averages over."""
        t = block.h.shape[1]
        own = torch.cat([F.pad(part, (0, t - part.shape[1])) for part in self._own[layer]])
        if sharing == "reduce":
            some = own.any(1)
            own, h, g = own[some], block.h[some], block.g[some]
            return (own.unsqueeze(1).to(h.dtype) @ h).squeeze(1) / own.sum(1, keepdim=True), g.sum(2)
        return block.h[own], block.g.transpose(1, 2)[own]
