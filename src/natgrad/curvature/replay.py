"""Products `J d` from the calls of a recorded forward pass: the model does not run again.

Each rule computes the tangent of one call from those of its arguments, with the values that the forward pass left. For
small models, this takes a fraction of the time of torch's forward mode, most of which is Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.one_at_a_time import ONE_AT_A_TIME
from natgrad.capture.tape import Tape
from natgrad.curvature.affine_tangents import tangent_of_convolution, tangent_of_linear
from natgrad.curvature.recurrence import has_tangent, tangent_of_network
from natgrad.linalg.precision import worth_lowering

aten = torch.ops.aten
Dot = Callable[[Any], Any]
"""The tangent of a tensor, or None: it is zero."""
Rule = Callable[..., Any]
"""From `Dot`, what a call returned, and its arguments, to the tangent of what it returned."""


class Replay:
    """One forward pass that can be differentiated again: with `push`, in the direction of the parameters."""

    def __init__(self, tape: Tape, rules: list[Rule]):
        self._tape, self._rules = tape, rules

    @classmethod
    def of(cls, tape: Tape | None) -> Replay | None:
        """None if the tape has not all of the forward pass, or a function has no rule."""
        if tape is None or not tape.whole or tape.output is None:
            return None
        dtype = tape.output.dtype
        rules: list[Rule] = []
        for function, args, kwargs, out in tape.entries:
            rule = RULES.get(function)
            if rule is None or not _takes(rule, args, kwargs, out):
                return None
            outs = (out,) if isinstance(out, Tensor) else out
            for t in (*args, *kwargs.values(), *outs):
                if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != dtype:
                    return None  # autocast
            rules.append(rule)
        return cls(tape, rules)

    @property
    def intact(self) -> bool:
        """Whether all values are as the forward pass left them. It cannot tell of the parameters."""
        return self._tape.intact

    @cached_property
    def is_heavy(self) -> bool:
        """Whether a lower precision of its matrix products saves time."""
        return any(
            worth_lowering(_multiplications(entry.args, entry.out), entry.out.device)
            for rule, entry in zip(self._rules, self._tape.entries, strict=True)
            if rule in PRODUCTS
        )

    def push(self, direction: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The output and `J d`, where `direction` has the parameters with their parts of `d`."""
        dots: dict[int, Any] = {id(p): d for p, d in direction}
        get = dots.get

        def dot(t: Any) -> Any:
            return get(id(t))

        for rule, (_, args, kwargs, out) in zip(self._rules, self._tape.entries, strict=True):
            found = rule(dot, out, *args, **kwargs)
            if isinstance(found, tuple):
                dots |= {id(t): its for t, its in zip(out, found, strict=True)}
            elif found is not None:
                dots[id(out)] = found if found.shape == out.shape else found.expand_as(out)
        output = self._tape.output
        assert output is not None
        Jd = dot(output)
        return output, torch.zeros_like(output) if Jd is None else Jd


# The rules. Each is called with `Dot`, what the call returned, and the call's arguments -----------------


def _takes(rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
    """Whether a rule is for a call with these arguments."""
    if rule in RECURRENT:
        return not kwargs and has_tangent(*args)
    if rule in OF_TWO:
        return len(args) == 2 and not kwargs
    return isinstance(out, Tensor) and len(args) >= (2 if rule in PRODUCTS else 1)


def _multiplications(args: Sequence[Any], out: Tensor) -> int:
    """How many a product of an input and a weight takes: each output is a sum over a weight's row."""
    return out.numel() * (args[1].numel() // args[1].shape[0])


def _linear(dot: Dot, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return tangent_of_linear(input, dot(input), weight, dot(weight), dot(bias))


def _convolution(
    function: Any, dot: Dot, out: Tensor, input: Tensor, weight: Tensor, bias: Any = None, *how: Any, **also: Any
) -> Tensor | None:
    return tangent_of_convolution(partial(function, **also), input, dot(input), weight, dot(weight), dot(bias), *how)


def _embedding(
    dot: Dot, out: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor | None:
    """The padding has no tangent, because it has no gradient."""
    W_dot = dot(weight)
    return None if W_dot is None else _padded(W_dot, padding_idx)[input]


def _padded(W_dot: Tensor, padding: int | None) -> Tensor:
    if padding is None:
        return W_dot
    W_dot = W_dot.clone()
    W_dot[padding] = 0
    return W_dot


def _same(function: Any, dot: Dot, out: Any, input: Tensor, *how: Any, **also: Any) -> Any:
    """Of a linear function, such as `flatten` or `mean`."""
    x_dot = dot(input)
    return None if x_dot is None else function(x_dot, *how, **also)


def _cat(dot: Dot, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    dots = [dot(t) for t in tensors]
    if all(t is None for t in dots):
        return None
    return torch.cat([torch.zeros_like(t) if d is None else d for t, d in zip(tensors, dots, strict=True)], dim)


def _sum(sign: int, dot: Dot, out: Tensor, x: Any, y: Any) -> Tensor | None:
    x_dot, y_dot = dot(x), dot(y)
    if y_dot is None:
        return x_dot
    if x_dot is None:
        return y_dot if sign == 1 else -y_dot
    return torch.add(x_dot, y_dot, alpha=sign)


def _product(dot: Dot, out: Tensor, x: Any, y: Any) -> Tensor | None:
    x_dot, y_dot = dot(x), dot(y)
    if y_dot is None:
        return None if x_dot is None else x_dot * y
    return y_dot * x if x_dot is None else torch.addcmul(x_dot * y, y_dot, x)


def _matrix_product(dot: Dot, out: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    x_dot, y_dot = dot(x), dot(y)
    if y_dot is None:
        return None if x_dot is None else x_dot @ y
    return x @ y_dot if x_dot is None else x_dot @ y + x @ y_dot


def _quotient(dot: Dot, out: Tensor, x: Any, y: Any) -> Tensor | None:
    x_dot, y_dot = dot(x), dot(y)
    if y_dot is None:
        return None if x_dot is None else x_dot / y
    return (-out * y_dot if x_dot is None else x_dot - out * y_dot) / y


def _by_output(slope: Callable[[Tensor, Tensor], Tensor], dot: Dot, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Any:
    """Of a function of each entry whose slope follows from its value: `slope(ẋ, y)`."""
    x_dot = dot(x)
    return None if x_dot is None else slope(x_dot, out)


def _by_input(slope: Callable[..., Tensor], dot: Dot, out: Tensor, x: Tensor, *how: Any, **also: Any) -> Any:
    """Of a function of each entry: `slope(ẋ, x)`, with the function's own options."""
    also.pop("inplace", None)
    x_dot = dot(x)
    return None if x_dot is None else slope(x_dot, x, *how, **also)


def _by_torch(function: Any, dot: Dot, out: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """By torch's forward mode, which computes the function again."""
    with ONE_AT_A_TIME, torch.no_grad(), forward_ad.dual_level():

        def dual(t: Any) -> Any:
            t_dot = dot(t)
            return t if t_dot is None else forward_ad.make_dual(t.detach(), t_dot)

        return forward_ad.unpack_dual(function(*map(dual, args), **{k: dual(v) for k, v in kwargs.items()})).tangent


def _all(rule: Rule, *functions: Any) -> dict[Any, Rule]:
    return dict.fromkeys(functions, rule)


def _each(rule: Rule, *functions: Any) -> dict[Any, Rule]:
    return {f: partial(rule, f) for f in functions}


_plus, _minus = partial(_sum, 1), partial(_sum, -1)
OF_TWO = (_plus, _minus, _product, _matrix_product, _quotient)
CONVOLUTIONS = _each(_convolution, torch.conv1d, torch.conv2d, torch.conv3d)
RECURRENT = tuple(_each(tangent_of_network, torch._VF.lstm, torch._VF.gru).values())
PRODUCTS = (_linear, *CONVOLUTIONS.values())
RULES: dict[Any, Rule] = {
    F.linear: _linear,
    **CONVOLUTIONS,
    **dict(zip((torch._VF.lstm, torch._VF.gru), RECURRENT, strict=True)),
    F.embedding: _embedding,
    torch.cat: _cat,
    **_all(_plus, Tensor.add, torch.add),
    **_all(_minus, Tensor.sub, torch.sub),
    **_all(_product, Tensor.mul, torch.mul),
    **_all(_quotient, Tensor.div, torch.div),
    **_all(_matrix_product, Tensor.matmul, torch.matmul),
    **_all(partial(_by_output, aten.tanh_backward), torch.tanh, Tensor.tanh),
    **_all(partial(_by_output, aten.sigmoid_backward), torch.sigmoid, Tensor.sigmoid),
    **_all(partial(_by_output, lambda v, y: aten.threshold_backward(v, y, 0)), F.relu, torch.relu, Tensor.relu),
    F.gelu: partial(_by_input, aten.gelu_backward),
    F.silu: partial(_by_input, aten.silu_backward),
    F.softplus: partial(_by_input, lambda v, x, beta=1, threshold=20: aten.softplus_backward(v, x, beta, threshold)),
    F.leaky_relu: partial(
        _by_input, lambda v, x, negative_slope=0.01: aten.leaky_relu_backward(v, x, negative_slope, False)
    ),
    F.elu: partial(_by_input, lambda v, x, alpha=1.0: aten.elu_backward(v, alpha, 1, 1, False, x)),
    **_all(partial(_by_input, lambda v, x: v * x.cos()), torch.sin, Tensor.sin),
    **_all(partial(_by_input, lambda v, x: -v * x.sin()), torch.cos, Tensor.cos),
    **_all(partial(_by_input, lambda v, x: 2 * v * x), torch.square, Tensor.square),
    **_all(partial(_by_output, torch.mul), torch.exp, Tensor.exp),
    **_each(
        _same,
        *(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, torch.unsqueeze, Tensor.unsqueeze),
        *(torch.squeeze, Tensor.squeeze, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute),
        *(Tensor.mT.__get__, Tensor.T.__get__, Tensor.__getitem__, Tensor.contiguous, torch.neg, Tensor.neg),  # type: ignore[attr-defined]
        *(torch.mean, Tensor.mean, torch.sum, Tensor.sum, F.avg_pool2d, F.adaptive_avg_pool2d),
    ),
    Tensor.view: partial(_same, Tensor.reshape),
    **_each(_by_torch, F.max_pool2d, F.layer_norm, F.softmax, F.log_softmax, Tensor.softmax, torch.conv_transpose2d),
}
"""What is differentiated. A function without a rule makes the optimizer run the model again."""
