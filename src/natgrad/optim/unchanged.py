"""Whether a model still has the parameters that its optimizer was made for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Unchanged:
    """What the parameters were at the first loss: the same tensors, of one dtype, on the device of the generator."""

    def __init__(self, device: torch.device):
        self._device = device
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
            if p.device.type != self._device.type:
                raise RuntimeError(
                    f"{n!r} is on {p.device} and was on {self._device} when this optimizer was made; move the model "
                    "first, and make the optimizer then"
                )
            if self._first.setdefault(n, p.dtype) != p.dtype:
                raise RuntimeError(
                    f"{n!r} is {p.dtype} and was {self._first[n]} at the first step; convert the model first, and make "
                    "the optimizer then"
                )
