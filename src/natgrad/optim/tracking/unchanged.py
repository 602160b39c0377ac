"""Whether a model still has the parameters that its optimizer was made for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad.checks.warning import warn


class Unchanged:
    """The parameters at the first loss: the same tensors, of the same dtype, on the device of the generator if one was
    given."""

    def __init__(self, model: nn.Module, generator: torch.Generator | None):
        self._frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        self._device = None if generator is None else generator.device
        self._first: dict[str, torch.dtype] = {}

    def check(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError if a parameter was replaced, moved to another kind of device, or has another dtype."""
        now = {n: p for n, p in model.named_parameters() if n in parameters}
        for n, p in parameters.items():
            if now.get(n) is not p:
                raise RuntimeError(
                    f"the model's {n!r} is another tensor than when this optimizer was made; make a new optimizer for "
                    "the model as it is"
                )
            if self._device is not None and p.device.type != self._device.type:
                raise RuntimeError(
                    f"{n!r} is on {p.device}, but the generator= is on {self._device}; move the model first, then "
                    "make the optimizer"
                )
            if self._first.setdefault(n, p.dtype) != p.dtype:
                raise RuntimeError(
                    f"{n!r} is {p.dtype}, but was {self._first[n]} at the first step; convert the model first, then "
                    "make the optimizer"
                )

    def tell_of_thawed(self, model: nn.Module, parameters: Mapping[str, Tensor], optimizer: str) -> None:
        """Warns once about parameters that were frozen when the optimizer was made and have a gradient now: they belong
        to no parameter group, so they do not move."""
        if not self._frozen:
            return
        own = dict(model.named_parameters())
        thawed = [n for n in self._frozen if n in own and n not in parameters and own[n].grad is not None]
        self._frozen.difference_update(thawed, parameters)
        if thawed:
            first = min(thawed)
            warn(
                f"{len(thawed)} parameters (such as {first!r}) were frozen when {optimizer} was made. They have a "
                "gradient now, but are in no parameter group, so they do not move; add them: "
                f"opt.add_param_group({{'params': [{first!r}, ...]}})"
            )
