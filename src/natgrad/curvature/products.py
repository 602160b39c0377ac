"""Products with the exact matrix of a model on a batch, by forward and reverse mode; no matrix is formed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from natgrad.capture.layers import FUSED
from natgrad.capture.layers.embedding import embedding_bag
from natgrad.capture.one_at_a_time import ONE_AT_A_TIME
from natgrad.capture.use import Use
from natgrad.checks.replaced import call_with
from natgrad.curvature.affine_tangents import tangent_of_convolution, tangent_of_linear
from natgrad.curvature.jacobian import graph, same_numbers, through_graph
from natgrad.curvature.tangents import tangent_rule


@dataclass(frozen=True)
class Duals:
    """What to call instead of the model for a forward pass with tangents, and the parameter's name of each tensor (by
    its id)."""

    forward: Callable[..., Any]
    names: dict[int, str]


@contextlib.contextmanager
def duals_in_place(model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[Duals]:
    """The model with its parameters' tangents from `direction`."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    duals = {
        n: forward_ad.make_dual(p.detach(), direction[n]) if n in direction else p.detach()
        for n, p in model.named_parameters()
    }

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call_with(model, {**duals, **buffers}, args, kwargs)

    yield Duals(forward, {id(t): n for n, t in duals.items()})


def tangent(
    model: nn.Module,
    call: Callable[..., Tensor],
    direction: Mapping[str, Tensor],
    uses: Sequence[Use] = (),
    duals: Callable[[Mapping[str, Tensor]], AbstractContextManager[Duals]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and `J d`, by forward mode.

    Args:
        model: the module that owns the parameters.
        call: `call(forward)` runs `forward` (in place of `model`) on the batch and returns the output.
        direction: `d`, by parameter name.
        uses: what a recorder recorded in a forward pass on the same batch and parameters. The layers' outputs are taken
            from there, which leaves two products per layer instead of three.
        duals: how the model's parameters get their tangents, if they are not in their usual places.
    """
    (found,) = tangents(model, lambda forward: [call(forward)], direction, uses, duals)
    return found


def tangents(
    model: nn.Module,
    call: Callable[..., Sequence[Tensor]],
    direction: Mapping[str, Tensor],
    uses: Sequence[Use] = (),
    duals: Callable[[Mapping[str, Tensor]], AbstractContextManager[Duals]] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """As `tangent`, for several outputs of one forward, which `call` returns."""
    give = duals or partial(duals_in_place, model)
    # The fused attention kernels have no forward mode.
    with ONE_AT_A_TIME, torch.no_grad(), forward_ad.dual_level(), give(direction) as own:
        with _ForwardMode(own.names, uses), sdpa_kernel(SDPBackend.MATH), _without_savers():
            outputs = call(own.forward)
        pairs = [forward_ad.unpack_dual(output) for output in outputs]
        return [(primal, torch.zeros_like(primal) if Jd is None else Jd) for primal, Jd in pairs]


@contextlib.contextmanager
def _without_savers() -> Iterator[None]:
    """Before torch 2.12, checkpointed blocks save their inputs even without gradients, by a function that has no
    forward mode."""
    saver = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if saver is None:
        yield
        return
    torch.utils.checkpoint._NoopSaveInputs = _KeepNothing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.checkpoint._NoopSaveInputs = saver  # type: ignore[attr-defined]


class _KeepNothing:
    @staticmethod
    def apply(dummy: Tensor, *inputs: Any) -> Tensor:
        return dummy.detach()


REPLAYED = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class _ForwardMode(TorchFunctionMode):
    """Takes the outputs of linear maps and convolutions from recorded uses, and computes only their tangents."""

    def __init__(self, names: Mapping[int, str], uses: Sequence[Use]):
        super().__init__()
        self._names = names
        calls = {id(first.a): first for first in map(_first, uses)}  # one per call: each group of channels is a use
        self._left = [first for first in calls.values() if first.function in REPLAYED and first.direct]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUSED:  # fused functions have no forward mode
            with self:
                opened = FUSED[func](*args, **kwargs)
            if opened is not NotImplemented:
                return opened
        rule = tangent_rule(func, args)
        if rule is not None and (found := rule(*args, **kwargs)) is not None:
            return found
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func is F.embedding_bag:  # it has no forward mode
            return embedding_bag(*args, **kwargs)
        if func is torch._cudnn_rnn_flatten_weight:  # it has no forward mode, and is not needed
            return None
        if func in REPLAYED and self._left:
            out = self._replayed(func, *args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)

    def _replayed(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any, **also: Any
    ) -> Tensor | None:
        names = self._names.get(id(weight)), self._names.get(id(bias))
        if names == (None, None):
            return None
        use = self._left[0]
        if (use.function, use.weight, use.bias) != (func, *names) or use.h.shape != input.shape:
            self._left = []  # not the recorded path: compute everything
            return None
        del self._left[0]
        if not use.a_intact:  # an in-place function such as ReLU
            return None
        h, h_dot = forward_ad.unpack_dual(input)
        W, W_dot = forward_ad.unpack_dual(weight)
        b_dot = None if bias is None else forward_ad.unpack_dual(bias).tangent
        if func is F.linear:
            a_dot = tangent_of_linear(h, h_dot, W, W_dot, b_dot)
        else:
            a_dot = tangent_of_convolution(partial(func, **also), h, h_dot, W, W_dot, b_dot, *how)
        a = use.a.detach()
        return a if a_dot is None else forward_ad.make_dual(a, a_dot.expand_as(a))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *how: Any, **also: Any) -> Tensor:
    """`F.embedding` whose padding has no tangent, because it has no gradient."""
    W, W_dot = forward_ad.unpack_dual(weight)
    if padding_idx is not None and W_dot is not None:
        W_dot = W_dot.clone()
        W_dot[padding_idx] = 0
        weight = forward_ad.make_dual(W, W_dot)
    return F.embedding(input, weight, padding_idx, *how, **also)


def _first(use: Use) -> Use:
    """The use as it was after the first of its calls."""
    return use if use.before is None else _first(use.before)


def gauss_newton_product(
    model: nn.Module,
    call: Callable[..., Tensor],
    direction: Mapping[str, Tensor],
    curve: Callable[[Tensor, Tensor], Tensor],
    by_reverse: bool = False,
) -> dict[str, Tensor]:
    """`Jᵀ D J d` on one batch, where `curve(output, v)` is `D v`. It takes a forward-mode and a backward pass, or
    (`by_reverse`) three backward passes. All of them run with the same random numbers."""
    if by_reverse:
        out, leaves = graph(model, call, direction)
        DJd = curve(out.detach(), through_graph(out, leaves, direction))
    else:
        with same_numbers(next(iter(direction.values())).device) as again:
            output, Jd = tangent(model, call, direction)
            again()
            owned = dict(model.named_parameters())
            leaves = {n: owned[n] for n in direction}
            with torch.enable_grad():
                out = call(model)
        DJd = curve(output, Jd)
    grads = torch.autograd.grad(out, list(leaves.values()), DJd.to(out.dtype), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), grads, strict=True)}
