"""Tangents of recurrent layers, by one loop over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.recurrence import Direction, is_linearized, layers_of, values
from natgrad.curvature.affine_tangents import tangent_of_linear

Dot = Callable[[Any], Tensor | None]


def has_tangent(
    input: Any,
    hidden: Any,
    params: Any,
    has_biases: Any = None,
    num_layers: Any = None,
    dropout: Any = None,
    train: Any = None,
    bidirectional: Any = None,
    batch_first: Any = None,
) -> bool:
    """Whether `tangent_of_network` is for a call with these arguments: there is no dropout, and no packed sequence."""
    if batch_first is None or not (isinstance(hidden, Tensor) or isinstance(params, (list, tuple))):
        return False
    if isinstance(hidden, Tensor) and not hidden.is_floating_point():  # of a packed sequence
        return False
    random = dropout and train and num_layers > 1
    return not random and is_linearized(input, hidden, params, has_biases, num_layers, bidirectional)


def tangent_of_network(
    function: Any,
    dot: Dot,
    out: tuple[Tensor, ...],
    input: Tensor,
    hidden: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The tangents of what `torch._VF.lstm` or `gru` returned, by those of its arguments. Earlier layers than the last
    are computed again."""
    initial = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    initial_dot = [torch.zeros_like(s) if (s_dot := dot(s)) is None else s_dot for s in initial]
    x, x_dot, known = input, dot(input), out[0]
    if not batch_first:
        x, x_dot, known = x.transpose(0, 1), None if x_dot is None else x_dot.transpose(0, 1), known.transpose(0, 1)
    last: list[tuple[Tensor, ...]] = []
    for layer, directions in enumerate(layers_of(function, params, has_biases, num_layers, bidirectional)):
        outputs, outputs_dot = [], []
        for own, its in zip(directions, known.chunk(len(directions), -1), strict=True):
            k = len(last)
            states, states_dot = tuple(s[k] for s in initial), tuple(s[k] for s in initial_dot)
            y = its if layer == num_layers - 1 else values(own, x, states)[0]
            before = own.before(y, states[0])
            a_x = F.linear(x, own.W_ih, own.b_ih)
            ax_dot = _filled(a_x, tangent_of_linear(x, x_dot, own.W_ih, dot(own.W_ih), dot(own.b_ih)))
            a_h, ah_dot = _of_hidden(own, before, dot, a_x, ax_dot)
            linearized = own.linearized(a_x, a_h, before, states)
            h_dot, ends_dot = linearized.push(ax_dot, ah_dot, states_dot, own.W_hh)
            last.append((h_dot[:, 0 if own.backwards else -1], *ends_dot))
            outputs.append(y)
            outputs_dot.append(h_dot)
        x, x_dot = torch.cat(outputs, -1), torch.cat(outputs_dot, -1)
    assert x_dot is not None
    ends = tuple(torch.stack(s) for s in zip(*last, strict=True))
    return (x_dot if batch_first else x_dot.transpose(0, 1), *ends)


def _of_hidden(
    own: Direction, before: Tensor, dot: Dot, a_x: Tensor, ax_dot: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The pre-activations of the hidden states, and their tangents as long as the hidden states have none; None if they
    are added to those of the inputs."""
    ah_dot = tangent_of_linear(before, None, own.W_hh, dot(own.W_hh), dot(own.b_hh))
    if not own.kind.adds:
        a_h = F.linear(before, own.W_hh, own.b_hh)
        return a_h, _filled(a_h, ah_dot)
    a_x.view(-1, a_x.shape[-1]).addmm_(before.reshape(-1, before.shape[-1]), own.W_hh.mT)
    if own.b_hh is not None:
        a_x.add_(own.b_hh)
    if ah_dot is not None:
        ax_dot.add_(ah_dot)
    return None, None


def _filled(a: Tensor, a_dot: Tensor | None) -> Tensor:
    """A tangent in full, that can be written to."""
    if a_dot is None or a_dot.shape != a.shape:
        return torch.zeros_like(a) if a_dot is None else a_dot.expand_as(a).clone()
    return a_dot
