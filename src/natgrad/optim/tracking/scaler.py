"""The factor by which a GradScaler scaled the loss and divided the gradients."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp import GradScaler


def scale_taken_out() -> float:
    """The scale of the `GradScaler` that calls the optimizer's `step`; 1 if there is none.

    A `GradScaler` does not tell the optimizer its scale, so the scale is looked up in the stack frames. Optimizers may
    ask for scaled gradients (`_step_supports_amp_scaling`), but then Lightning refuses to clip them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, GradScaler):
            return scaler.get_scale()
        frame = frame.f_back
    return 1.0
