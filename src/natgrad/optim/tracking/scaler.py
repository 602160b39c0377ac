"""The factor by which a GradScaler has scaled the loss, and which it has taken out of the gradients."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp import GradScaler


def scale_taken_out() -> float:
    """The scale of the `GradScaler` whose `step` has called the optimizer's; 1 if there is none.

    It calls a step as if nothing had been scaled, so that it is found up the stack. Optimizers may also ask for scaled
    gradients (`_step_supports_amp_scaling`), but then Lightning refuses to clip these.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, GradScaler):
            return scaler.get_scale()
        frame = frame.f_back
    return 1.0
