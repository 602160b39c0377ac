"""Tangents where torch's own forward mode is missing or slow.

Torch has no forward mode for fused attention. Its forward mode of normalizations consists of many functions, on tensors
that the fused kernels never write to memory. For these functions, a product with the Jacobian can be written as a
product with its transpose, which reverse mode computes.

Torch gives the constant in `2 * x` or `x + noise` a tangent of zeros, and multiplies and adds those in Python, which
takes some hundred times as long as the product itself. The rules of `mul`, `div`, `add` and `sub` leave them out.

Each rule takes a function's arguments, with or without tangents, and returns its output with a tangent, or None if the
rule does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad.capture.layers.scale import PARSERS, Scale
from natgrad.capture.one_at_a_time import ONE_AT_A_TIME

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MANY_KEYS = 8
"""On a CPU, the rule of attention is faster if the number of keys is at least this many times the size of a key."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`O = P V`, `P = softmax(s Q Kᵀ + mask)`, with the tangent

        Ȯ = P V̇ + s dS V,    dS = P ∘ (G Uᵀ − rows of ⟨P, G Uᵀ⟩),    G = [Q̇, Q],  U = [K, K̇].

    If the gradient in the output is `G`, the gradient in `Q` of attention with the values `U` is `s dS K`. With the
    queries `[Q, 0]` and the keys `[K, V]`, `P` does not change, and this gradient is `s dS [K, V]`.
    """
    if dropout_p > 0 or _tangent(attn_mask) is not None or key.shape[:-1] != value.shape[:-1]:
        return None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    (Q, Q_dot), (K, K_dot), (V, V_dot) = (_with_zeros(t) for t in (query, key, value))
    attend = partial(
        F.scaled_dot_product_attention,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=Q.shape[-1] ** -0.5 if scale is None else scale,
        enable_gqa=enable_gqa,
    )
    queries = torch.cat([Q, Q.new_zeros(*Q.shape[:-1], V.shape[-1])], -1)
    keys = torch.cat([K, V], -1)
    with ONE_AT_A_TIME, sdpa_kernel(BACKENDS):
        O, O_dot = attend(queries, keys, torch.cat([V, V_dot], -1)).chunk(2, -1)
        with torch.enable_grad():
            inner = attend(queries.requires_grad_(), keys, torch.cat([K, K_dot], -1))
        (gradient,) = torch.autograd.grad(inner, queries, torch.cat([Q_dot, Q], -1))
    return forward_ad.make_dual(O.contiguous(), O_dot + gradient[..., Q.shape[-1] :])


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """The rule of `F.batch_norm` with the averages of the batch. The running averages do not change."""
    if not training:
        return None
    return normalization(F.batch_norm, input, None, None, weight, bias, training, eps=eps)


def normalization(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`w x̂ + b`, with the tangent `w S ẋ + ẇ x̂ + ḃ`: the Jacobian of `x̂ = (x − mean) / deviation`, which is
    `S = (I − 1 1ᵀ/n − x̂ x̂ᵀ/n) / deviation`, is symmetric, so reverse mode also gives the forward-mode product."""
    call = PARSERS[function](*args, **kwargs)
    assert call is not None
    kind = call.kind
    assert isinstance(kind, Scale)
    assert kind.normalize is not None
    x, x_dot = forward_ad.unpack_dual(call.h)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        normal = kind.normalize(leaf)
    y = normal.detach()
    y_dot = None if x_dot is None else torch.autograd.grad(normal, leaf, x_dot.to(normal.dtype))[0].to(y.dtype)
    (w, w_dot), (b, b_dot) = (_spread(t, kind.spread, y.dtype) for t in (call.weight, call.bias))
    y_dot = _affine(y_dot, w, b_dot)
    if w_dot is not None:
        y_dot = _affine(y, w_dot, y_dot)
    out = _affine(y, w, b)
    assert out is not None
    return out if y_dot is None else forward_ad.make_dual(out, y_dot.expand_as(out))


def _affine(x: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`w x + b`, where `w` or `b` may be missing."""
    if x is None:
        return b
    if w is None:
        return x if b is None else x + b
    return x * w if b is None else torch.addcmul(b, x, w)


def _spread(t: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A parameter in the shape in which it multiplies the input, in this precision, and its tangent likewise."""
    if t is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(t.view(shape))
    return primal.to(dtype), None if tangent is None else tangent.to(dtype)


def _tangent(t: Tensor | None) -> Tensor | None:
    return None if t is None else forward_ad.unpack_dual(t).tangent


def _with_zeros(t: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor and its tangent."""
    primal, tangent = forward_ad.unpack_dual(t)
    return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent


def with_constant(function: Any, x: Any, other: Any, *rest: Any, **options: Any) -> Tensor | None:
    """A product, quotient, sum or difference of a tensor that has a tangent and a constant: a number, or a tensor
    without one."""
    alpha = options.get("alpha", 1)
    if rest or options.keys() - {"alpha"} or not _plain(x, other):
        return None
    (x, x_dot), (other, other_dot) = (_apart(t) for t in (x, other))
    if (x_dot is None) == (other_dot is None):
        return None
    if function in QUOTIENTS and x_dot is None:
        return None
    out = function(x, other, **options)
    if function in PRODUCTS or function in QUOTIENTS:
        tangent = function(other_dot if x_dot is None else x_dot, other if x_dot is not None else x)
    elif x_dot is not None:
        tangent = x_dot.to(out.dtype).expand_as(out).clone()  # as either may be written to in place
    else:
        tangent = (-alpha if function in DIFFERENCES else alpha) * other_dot.to(out.dtype).expand_as(out)
    return forward_ad.make_dual(out, tangent)


def _plain(*values: Any) -> bool:
    """Whether these are numbers and tensors of torch's own type, outside of `torch.func`."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(not isinstance(v, Tensor) or type(v) in (Tensor, nn.Parameter) for v in values)


def _apart(value: Any) -> tuple[Any, Any]:
    """A tensor and its tangent, if it has one; anything else as it is."""
    return forward_ad.unpack_dual(value) if isinstance(value, Tensor) else (value, None)


def tangent_rule(function: Any, args: Sequence[Any]) -> Callable[..., Tensor | None] | None:
    """The function's rule, if it is faster. On CPUs, torch's own forward mode is as fast for normalizations, and faster
    for short attention."""
    rule = RULES.get(function)
    if rule is None or not args or not isinstance(args[0], Tensor):
        return None
    if args[0].device.type != "cpu" or function in WITH_CONSTANT:
        return rule
    is_long = rule is attention and len(args) > 1 and args[1].shape[-2] >= MANY_KEYS * args[1].shape[-1]
    return rule if is_long else None


PRODUCTS = (Tensor.mul, torch.mul, torch.multiply)
QUOTIENTS = (Tensor.div, torch.div, torch.true_divide)
SUMS = (Tensor.add, torch.add)
DIFFERENCES = (Tensor.sub, torch.sub)
WITH_CONSTANT = {*PRODUCTS, *QUOTIENTS, *SUMS, *DIFFERENCES}
RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: attention,
    F.layer_norm: partial(normalization, F.layer_norm),
    F.group_norm: partial(normalization, F.group_norm),
    F.batch_norm: batch_norm,
    **{function: partial(with_constant, function) for function in WITH_CONSTANT},
}
