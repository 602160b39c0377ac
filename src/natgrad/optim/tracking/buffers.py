"""Restores a model's buffers, such as the running averages of batch normalization, after a batch that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]


class Buffers:
    """Copies of the floating-point buffers, taken before a step's first forward. Only buffers that change are
    copied."""

    def __init__(self, model: nn.Module):
        self._places: list[Place] = [(m, n) for m in model.modules() for n, _ in m._buffers.items()]
        self._copies: dict[Place, Tensor] = {}
        self._seen: dict[Place, tuple[int, int]] = {}
        self._kept = False

    def keep(self) -> None:
        """Records the buffers, at most once for each step."""
        if self._kept:
            return
        self._kept = True
        for place, buffer in self._now():
            state = id(buffer), buffer._version
            if self._seen.get(place) != state:
                self._seen[place], self._copies[place] = state, buffer.clone()

    @torch.no_grad()
    def end_step(self, *, accepted: bool) -> None:
        """If the step was not accepted, restores every buffer that is not finite."""
        kept, self._kept = self._kept, False
        if accepted or not kept:
            return
        for place, buffer in self._now():
            copy = self._copies.get(place, buffer)
            if copy.shape == buffer.shape and not torch.isfinite(buffer).all() and torch.isfinite(copy).all():
                buffer.copy_(copy)

    def _now(self) -> list[tuple[Place, Tensor]]:
        found = [((m, n), dict(m._buffers.items()).get(n)) for m, n in self._places]
        return [(place, b) for place, b in found if b is not None and b.is_floating_point() and not b.is_inference()]
