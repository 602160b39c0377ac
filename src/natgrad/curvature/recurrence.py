"""Tangents of recurrent layers, by one loop over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.recurrence import is_linearized, layers_of, values
from natgrad.curvature.affine_tangents import tangent_of_linear


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
    dot: Callable[[Any], Tensor | None],
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
            a_x, a_h = F.linear(x, own.W_ih, own.b_ih), F.linear(before, own.W_hh, own.b_hh)
            ax_dot = tangent_of_linear(x, x_dot, own.W_ih, dot(own.W_ih), dot(own.b_ih))
            ah_dot = tangent_of_linear(before, None, own.W_hh, dot(own.W_hh), dot(own.b_hh))
            ax_dot, ah_dot = _filled(a_x, ax_dot), _filled(a_h, ah_dot)
            linearized = own.linearized(a_x, a_h, before, states)
            h_dot, ends_dot = linearized.push(ax_dot, ah_dot, states_dot, own.W_hh)
            last.append((h_dot[:, 0 if own.backwards else -1], *ends_dot))
            outputs.append(y)
            outputs_dot.append(h_dot)
        x, x_dot = torch.cat(outputs, -1), torch.cat(outputs_dot, -1)
    assert x_dot is not None
    ends = tuple(torch.stack(s) for s in zip(*last, strict=True))
    return (x_dot if batch_first else x_dot.transpose(0, 1), *ends)


def _filled(a: Tensor, a_dot: Tensor | None) -> Tensor:
    return torch.zeros_like(a) if a_dot is None else a_dot.expand_as(a)
