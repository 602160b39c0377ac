"""The source of random labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natgrad.optim.parameters import Parameters


class Labels:
    """The user's generator, or one seeded by `torch.initial_seed()` on the device to which the model may be moved."""

    def __init__(self, parameters: Parameters, given: torch.Generator | None):
        self._parameters, self._given = parameters, given
        self._own = torch.Generator(parameters.device).manual_seed(torch.initial_seed())

    @property
    def generator(self) -> torch.Generator:
        if self._given is not None:
            return self._given
        if self._own.device != self._parameters.device:
            self._own = torch.Generator(self._parameters.device).manual_seed(self._own.initial_seed())
        return self._own

    def of(self, step: int, draw: int) -> torch.Generator:
        """The source for one batch. On several ranks, its seed depends on the rank, the step and the batch. So the
        labels of one rank do not depend on what other ranks draw, and a checkpoint needs no state of it."""
        own, world = self.generator, self._parameters.place.world
        if world.size == 1:
            return own
        which = ((own.initial_seed() * 1_000_003 + step) * 4099 + world.rank) * 1_009
        return torch.Generator(own.device).manual_seed((which + draw) % 2**63)

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "seed": self.generator.initial_seed()}

    def load(self, state: Tensor, seed: int, step: int) -> None:
        """Continues the saved sequence of random numbers. A state from another kind of device does not fit; then a new
        sequence starts, from a seed that is made of the run's seed and the step."""
        if state.shape == self.generator.get_state().shape:
            self.generator.set_state(state)
        else:
            self.generator.manual_seed((seed * 1_000_003 + step) % 2**63)
