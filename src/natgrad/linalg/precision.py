"""The precision of float32 matrix products, for computations that tolerate low precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.checks.values import check_choice

PRECISIONS = {"highest": ("ieee", "ieee"), "high": ("ieee", "tf32"), "medium": ("bf16", "tf32")}
"""The names of `torch.set_float32_matmul_precision`, as settings for CPUs and for CUDA."""
WORTH_CASTING = 2**23
"""From this number of multiplications on, a product is faster in bfloat16, including the casts of operands and
result."""


def check_precision(precision: str | None) -> None:
    """Raises ValueError unless it is one of torch's names, or None."""
    check_choice("matmul_precision", precision, PRECISIONS, optional=True)


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Within the context, products of float32 matrices may use lower precision; None: torch's own setting."""
    if precision is None:
        yield
        return
    places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    token = _CASTS.set(precision == "medium" and _multiplies_in_bfloat16())
    try:
        for place, value in zip(places, PRECISIONS[precision], strict=True):
            place.fp32_precision = value
        yield
    finally:
        _CASTS.reset(token)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


_CASTS = ContextVar("whether operands are cast", default=False)


@functools.cache
def _multiplies_in_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 fast, but torch's own setting hardly uses it, as with AMX."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 matrix products, so that they are faster than float32.

    Without them, a CPU may take a hundred times as long. The features of the processor are read, not timed: the same
    processor always gives the same answer, so a run resumes bit for bit.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def worth_lowering(multiplications: int, device: torch.device) -> bool:
    """Whether a matrix product of this size takes less time in a lower precision: not a small one on a CPU."""
    return device.type != "cpu" or multiplications >= WORTH_CASTING


def is_full(t: Tensor) -> bool:
    """Whether matrix products with this tensor are computed in the tensor's own precision."""
    if t.dtype != torch.float32:
        return t.dtype == torch.float64
    place = torch.backends.mkldnn if t.device.type == "cpu" else torch.backends.cuda
    return place.matmul.fp32_precision in ("none", "ieee")


COMPUTES = {
    *("_matmul", "_norm", "_diagonal", "_inverse_factor", "_dense"),
    *("inverse", "power", "logdet", "trace", "apart"),
}
"""The methods of an operator that compute."""


def compute_in_own_precision(kind: type) -> None:
    """From now on, `torch.autocast` does not lower what the operators of a class compute."""
    for name in COMPUTES & vars(kind).keys():
        setattr(kind, name, _in_own_precision(vars(kind)[name]))


def _in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(self.device.type):
            return method(self, *args, **kwargs)
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return computed


def matmul(first: Tensor, *others: Tensor) -> Tensor:
    """The product of matrices, from left to right, in the precision of the context."""
    if not _casts(first, others[0]):
        return functools.reduce(torch.matmul, others, first)
    return functools.reduce(torch.matmul, [t.bfloat16() for t in (first, *others)]).float()


def linear(terms: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """The sum of `h Wᵀ` over the terms `(h, W)`, in the precision of the context, plus the bias in full precision."""
    casts = _casts(*terms[0])
    (h, W), *others = ((t.bfloat16() for t in term) if casts else term for term in terms)
    total = F.linear(h, W, None if casts else bias)
    for h, W in others:
        rows = torch.addmm(total.view(-1, len(W)), h.reshape(-1, h.shape[-1]), W.mT)
        total = rows.view(total.shape)
    if not casts:
        return total
    return total.float() if bias is None else total + bias


def _casts(left: Tensor, right: Tensor) -> bool:
    """Whether matrices are cast: float32 on a CPU, if the product is large."""
    if not (_CASTS.get() and left.device.type == right.device.type == "cpu"):
        return False
    if not (left.dtype == right.dtype == torch.float32 and left.ndim > 1 < right.ndim):
        return False
    return worth_lowering(left.numel() * right.numel() // left.shape[-1], left.device)
