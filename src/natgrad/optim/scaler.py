"""Which GradScaler is at work."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp import GradScaler


def scaler_in_charge() -> GradScaler:
    """The scaler whose `step` has called the optimizer's.

    It tells the optimizer whether gradients were unscaled by hand (`unscale_`, to clip them), not by how much; the
    scale is found on the scaler itself, further up the stack.

    Raises:
        RuntimeError: if there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler):
            return scaler
        frame = frame.f_back
    raise RuntimeError("found_inf was set on the optimizer, but no GradScaler has called step; call scaler.step(opt)")
