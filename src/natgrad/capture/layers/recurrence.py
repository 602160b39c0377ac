"""Recurrent layers linearized around a forward pass that torch's fused function has computed.

The fused function returns every hidden state. So the inputs of all time steps are known, and two matrix products give
the pre-activations of all of them:

    a_x = W_ih x + b_ih,    a_h = W_hh h₋ + b_hh,    h₋ the hidden state of the step before.

What is left is one loop over time, forward for tangents and backward for gradients, of a few products of entries and
one matrix product with `W_hh` per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]
aten = torch.ops.aten


class Linearized:
    """One layer in one direction. All tensors have the shape `(N, T, ...)`, in the order of time.

    Args:
        a_x: pre-activations of the inputs.
        a_h: pre-activations of the hidden states.
        before: the hidden states before each step.
        states: the initial states, `(h,)` or `(h, c)`, each `(N, d)`.
        backwards: whether the steps go back in time.
    """

    ends: States
    """The last states, apart from `h`."""
    adds = False
    """Whether only `a_x + a_h` matters. It may then come as `a_x`, to be written to, with None for `a_h`."""

    def __init__(self, a_x: Tensor, a_h: Tensor | None, before: Tensor, states: States, backwards: bool):
        raise NotImplementedError

    def push(self, ax_dot: Tensor, ah_dot: Tensor | None, states_dot: States, W: Tensor) -> tuple[Tensor, States]:
        """Tangents of all `h`, and of the other last states. `ah_dot` is without what comes from the tangent of
        `h₋`."""
        raise NotImplementedError

    def pull(self, g: Tensor, ends: States, W: Tensor) -> tuple[Tensor, Tensor, States]:
        """Gradients in `a_x`, `a_h` and the initial states, from those of all `h` and of the other last states."""
        raise NotImplementedError


def _steps(t: Tensor, backwards: bool) -> Sequence[Tensor]:
    """The parts of every step, in the order of the steps."""
    parts = t.unbind(1)
    return parts[::-1] if backwards else parts


def _joined(parts: list[Tensor], backwards: bool) -> Tensor:
    """Undoes `_steps`."""
    return torch.stack(parts[::-1] if backwards else parts, 1)


class LinearizedLSTM(Linearized):
    """`c = f c₋ + i u`, `h = o tanh c`, with `(i, f, u, o) = (σ, σ, tanh, σ)(a_x + a_h)`.

    With `ȧ` the tangent of the pre-activations, `ċ = f ċ₋ + k_i ȧ_i + k_f ȧ_f + k_u ȧ_u` and `ḣ = k_o ȧ_o + p ċ`, where
    `k_i = i (1 − i) u`, `k_f = f (1 − f) c₋`, `k_u = i (1 − u²)`, `k_o = o (1 − o) tanh c` and `p = o (1 − tanh² c)`.
    """

    adds = True

    def __init__(self, a_x: Tensor, a_h: Tensor | None, before: Tensor, states: States, backwards: bool):
        i, f, u, o = (a_x if a_h is None else a_x + a_h).chunk(4, -1)
        i, f, u, o = i.sigmoid_(), f.sigmoid_(), u.tanh_(), o.sigmoid_()
        cells, c = [states[1]], states[1]
        for new, kept in zip(_steps(i * u, backwards), _steps(f, backwards), strict=True):
            c = torch.addcmul(new, kept, c)
            cells.append(c)
        c_before, tanh = _joined(cells[:-1], backwards), _joined(cells[1:], backwards).tanh()
        # The slope of the logistic function is y (1 − y), that of tanh is 1 − y².
        slopes = [
            aten.sigmoid_backward(u, i),
            aten.sigmoid_backward(c_before, f),
            aten.tanh_backward(i, u),
            aten.sigmoid_backward(tanh, o),
        ]
        own = torch.stack(slopes, -2), f, aten.tanh_backward(o, tanh)
        self._own, self._backwards, self.ends = [_steps(t, backwards) for t in own], backwards, (c,)

    def push(self, ax_dot: Tensor, ah_dot: Tensor | None, states_dot: States, W: Tensor) -> tuple[Tensor, States]:
        (h, c), out, W_T = states_dot, [], W.mT
        a_dot = ax_dot if ah_dot is None else ax_dot + ah_dot
        for a, k, f, p in zip(_steps(a_dot, self._backwards), *self._own, strict=True):
            i, f_, u, o = (torch.addmm(a, h, W_T).view_as(k) * k).unbind(1)
            c = torch.addcmul(i.add_(f_).add_(u), f, c)
            h = torch.addcmul(o, p, c)
            out.append(h)
        return _joined(out, self._backwards), (c,)

    def pull(self, g: Tensor, ends: States, W: Tensor) -> tuple[Tensor, Tensor, States]:
        (c,), out = ends, list[Tensor]()
        for its, k, f, p in reversed(list(zip(_steps(g, self._backwards), *self._own, strict=True))):
            h = torch.addmm(its, out[-1], W) if out else its
            c = torch.addcmul(c, h, p)
            out.append((torch.stack([c, c, c, h], 1) * k).flatten(1))
            c = c * f
        a = _joined(out[::-1], self._backwards)
        return a, a, (out[-1] @ W, c)


class LinearizedGRU(Linearized):
    """`h = n + z (h₋ − n)`, with `(r, z) = σ(a_x + a_h)` and `n = tanh(a_x + r a_h)`.

    `ḣ = z ḣ₋ + k_x ȧ_x + k_h ȧ_h`, summed over the three parts of the pre-activations.
    """

    ends = ()

    def __init__(self, a_x: Tensor, a_h: Tensor | None, before: Tensor, states: States, backwards: bool):
        assert a_h is not None
        (x_r, x_z, x_n), (h_r, h_z, h_n) = a_x.chunk(3, -1), a_h.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = torch.addcmul(x_n, r, h_n).tanh()
        k_n, k_z = (1 - z) * (1 - n * n), (before - n) * z * (1 - z)
        k_r = k_n * h_n * r * (1 - r)
        self._k_x, self._k_h = torch.stack([k_r, k_z, k_n], -2), torch.stack([k_r, k_z, k_n * r], -2)
        self._own, self._backwards = [_steps(t, backwards) for t in (self._k_h, z)], backwards

    def push(self, ax_dot: Tensor, ah_dot: Tensor | None, states_dot: States, W: Tensor) -> tuple[Tensor, States]:
        assert ah_dot is not None
        (h,), out, W_T = states_dot, [], W.mT
        known = (ax_dot.view_as(self._k_x) * self._k_x + ah_dot.view_as(self._k_h) * self._k_h).sum(-2)
        for s, k, z in zip(_steps(known, self._backwards), *self._own, strict=True):
            h = torch.addcmul(s, z, h) + ((h @ W_T).view_as(k) * k).sum(1)
            out.append(h)
        return _joined(out, self._backwards), ()

    def pull(self, g: Tensor, ends: States, W: Tensor) -> tuple[Tensor, Tensor, States]:
        h = torch.zeros_like(g[:, 0])
        total, out = list[Tensor](), list[Tensor]()
        for its, k, z in reversed(list(zip(_steps(g, self._backwards), *self._own, strict=True))):
            h = its + h
            a = (h.unsqueeze(1) * k).flatten(1)
            total.append(h)
            out.append(a)
            h = torch.addmm(h * z, a, W)
        every = _joined(total[::-1], self._backwards)
        return (every.unsqueeze(-2) * self._k_x).flatten(-2), _joined(out[::-1], self._backwards), (h,)


KINDS: dict[Any, type[Linearized]] = {torch._VF.lstm: LinearizedLSTM, torch._VF.gru: LinearizedGRU}


@dataclass(frozen=True, eq=False)
class Direction:
    """A layer in one direction: its weights, and the order of its steps."""

    function: Any
    W_ih: Tensor
    W_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    W_hr: Tensor | None
    """The projection of the hidden states, if there is one."""
    backwards: bool

    @property
    def kind(self) -> type[Linearized]:
        return KINDS[self.function]

    def turned(self, t: Tensor) -> Tensor:
        """From the order of time to the order of the steps, or back."""
        return t.flip(1) if self.backwards else t

    def before(self, y: Tensor, h: Tensor) -> Tensor:
        """The hidden states before every step, in the order of time."""
        first = h.unsqueeze(1)
        return torch.cat([y[:, 1:], first], 1) if self.backwards else torch.cat([first, y[:, :-1]], 1)

    def linearized(self, a_x: Tensor, a_h: Tensor | None, before: Tensor, states: States) -> Linearized:
        return self.kind(a_x, a_h, before, states, self.backwards)


class Recurrence(torch.autograd.Function):
    """The hidden states, as a function of the pre-activations of all steps and the initial states: their gradients
    contain what goes on from step to step."""

    @staticmethod
    def forward(
        ctx: Any, own: Direction, step: Callable[..., States], known: list[Tensor], W: Tensor, a_x: Tensor,
        a_h: Tensor, *states: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`known`: the hidden states, and those before every step."""
        hidden, before = known
        ctx.own, ctx.step, ctx.before = own, step, before
        ctx.is_recurrence = True
        ctx.save_for_backward(W, a_x, a_h, *states)
        ctx.linearized = own.linearized(a_x, a_h, before, states)
        return hidden, *(t.clone() for t in ctx.linearized.ends)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *ends: Tensor) -> tuple[Any, ...]:
        W, a_x, a_h, *states = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return None, None, None, *_twice(ctx, g, ends, W, a_x, a_h, states)
        in_x, in_h, initial = ctx.linearized.pull(g, ends, W)
        return None, None, None, None, in_x, in_h, *initial


def _twice(
    ctx: Any, g: Tensor, ends: Sequence[Tensor], W: Tensor, a_x: Tensor, a_h: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated: of the same steps one after the other. `a_h` is of hidden states that are
    constant; how they depend on one another comes through `W`."""
    # As views, so that gradients in one input do not come through another.
    inputs = W, a_x, a_h, *states = [t.view_as(t) for t in (W, a_x, a_h, *states)]
    state, out = tuple(states), []
    order = range(a_x.shape[1])
    for t in reversed(order) if ctx.own.backwards else order:
        moved = a_h[:, t] + F.linear(state[0] - ctx.before[:, t], W)
        state = ctx.step(a_x[:, t], moved, state)
        out.append(state[0])
    hidden = torch.stack(out[::-1] if ctx.own.backwards else out, 1)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad((hidden, *state[1:]), wanted, (g, *ends), create_graph=True, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def fused(function: Any, step: Callable[..., States]) -> Callable[..., Any]:
    """The fused function of a padded sequence, with all of its affine maps as calls of `linear` that can be recorded.

    It returns NotImplemented for what is not linearized here: projections, packed sequences, autocast, transforms.
    """

    def one(own: Direction, x: Tensor, initial: States) -> tuple[Tensor, States]:
        y, _ = values(own, x, initial)
        before = own.before(y, initial[0].detach())
        a_x, a_h = F.linear(x, own.W_ih, own.b_ih), F.linear(before, own.W_hh, own.b_hh)
        out, *ends = Recurrence.apply(own, step, [y, before], own.W_hh, a_x, a_h, *initial)
        return out, (out[:, 0 if own.backwards else -1], *ends)

    def run(
        input: Tensor,
        hidden: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: Any,
        batch_first: Any,
    ) -> Any:
        if not is_linearized(input, hidden, params, has_biases, num_layers, bidirectional):
            return NotImplemented
        layers = layers_of(function, params, has_biases, num_layers, bidirectional)
        return through_layers(one, layers, input, hidden, dropout if train else 0.0, batch_first)

    return run


def is_linearized(input: Any, hidden: Any, params: Any, has_biases: Any, num_layers: Any, bidirectional: Any) -> bool:
    """Whether the layer is one of those here: of a padded sequence, without projections."""
    states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    each = len(params) / (num_layers * (2 if bidirectional else 1))
    plain = input.ndim == 3 and input.shape[0] * input.shape[1] > 0 and all(s.is_floating_point() for s in states)
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (input, *states, *params))
    return (
        plain and each == (4 if has_biases else 2) and not wrapped and not torch.is_autocast_enabled(input.device.type)
    )


def layers_of(
    function: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool
) -> list[list[Direction]]:
    """Every layer's directions."""
    many = 2 if bidirectional else 1
    each = len(params) // (num_layers * many)

    def direction(k: int) -> Direction:
        W_ih, W_hh, *others = params[k * each : (k + 1) * each]
        b_ih, b_hh = (others.pop(0), others.pop(0)) if has_biases else (None, None)
        return Direction(function, W_ih, W_hh, b_ih, b_hh, others[0] if others else None, backwards=k % many == 1)

    return [[direction(layer * many + k) for k in range(many)] for layer in range(num_layers)]


def through_layers(
    one: Callable[[Direction, Tensor, States], tuple[Tensor, States]],
    layers: Sequence[Sequence[Direction]],
    input: Tensor,
    hidden: Any,
    dropout: float,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What torch's function returns, where `one(direction, x, states)` gives the hidden states of one layer in one
    direction, and its last states."""
    states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    x = input if batch_first else input.transpose(0, 1)
    last: list[States] = []
    for layer, directions in enumerate(layers):
        outputs = []
        for own in directions:
            out, ends = one(own, x, tuple(s[len(last)] for s in states))
            outputs.append(out)
            last.append(ends)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if dropout and layer < len(layers) - 1:
            x = F.dropout(x, dropout)
    return (x if batch_first else x.transpose(0, 1), *(torch.stack(s) for s in zip(*last, strict=True)))


def values(own: Direction, x: Tensor, states: States) -> tuple[Tensor, States]:
    """All hidden states in the order of time, and the last states, by torch's fused function."""
    weights = [t.detach() for t in (own.W_ih, own.W_hh, own.b_ih, own.b_hh) if t is not None]
    initial = tuple(s.detach().unsqueeze(0) for s in states)
    with torch.no_grad(), torch._C.DisableTorchFunction():
        y, *ends = own.function(
            own.turned(x.detach()).contiguous(), initial if len(initial) > 1 else initial[0], weights,
            own.b_ih is not None, 1, 0.0, False, False, True,
        )  # fmt: skip
    return own.turned(y), tuple(t[0] for t in ends)
