"""Batches that do not fit to a model: of another dtype, or on another device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

OF_A_MISFIT = re.compile(r"dtype|scalar type|type \(|device")
"""What torch's errors about them contain."""


def misfit(error: RuntimeError, batch: Any, parameter: Tensor) -> ValueError | None:
    """The error to raise in the place of torch's, if a tensor of the batch has another device or dtype than the model's
    parameters and torch's error is about that."""
    if not OF_A_MISFIT.search(str(error)):
        return None
    tensors = list(_tensors(batch))
    for t in tensors:
        if t.device != parameter.device:
            return ValueError(
                f"a batch is on {t.device} and the model on {parameter.device}; expected both on one device: "
                f"x.to({str(parameter.device)!r})"
            )
    for i, t in enumerate(tensors):
        if t.dtype != parameter.dtype and (i == 0 or t.is_floating_point()):
            return ValueError(
                f"a batch has a tensor of dtype {t.dtype}, and the model's parameters have {parameter.dtype}; expected "
                f"the same: x.to({parameter.dtype}), or model.to({t.dtype})"
                if t.is_floating_point()
                else f"a batch has a tensor of dtype {t.dtype} where the model takes {parameter.dtype}; expected "
                f"x.to({parameter.dtype})"
            )
    return None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
