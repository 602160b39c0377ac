"""Warnings that point at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import jaxtyping
import torch

BETWEEN = (Path(__file__).parent.parent, *(Path(module.__file__ or "").parent for module in (torch, jaxtyping)))
# Code knows its file by the path that it was imported from, which may contain a link, as in a linked environment.
PASSED_OVER = tuple(f"{folder}{os.sep}" for path in BETWEEN for folder in (path, path.resolve()))


def warn(message: str) -> None:
    """A RuntimeWarning at the nearest line outside this library, and outside modules that wrap its functions."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
