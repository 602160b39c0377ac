"""The precision of matrix products in float32, for computations that need few digits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from natgrad.options import check_choice

PRECISIONS = {"highest": ("ieee", "ieee"), "high": ("ieee", "tf32"), "medium": ("bf16", "tf32")}
"""As `torch.set_float32_matmul_precision` has them, for CPUs and for CUDA."""


def check_precision(precision: str | None) -> None:
    """Raises ValueError unless it is one of torch's names, or None."""
    check_choice("matmul_precision", precision, PRECISIONS, optional=True)


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Within, products of float32 matrices may be computed in less; None: as torch is set."""
    if precision is None:
        yield
        return
    places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place, value in zip(places, PRECISIONS[precision], strict=True):
            place.fp32_precision = value
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
