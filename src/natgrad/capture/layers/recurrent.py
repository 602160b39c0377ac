"""Recurrent networks step by step: the computation of torch's fused functions, as affine maps that can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.recurrence import fused

State = tuple[Tensor, ...]
Weights = Sequence[Tensor | None]


def _elman(nonlinearity: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def step(a_x: Tensor, a_h: Tensor, state: State) -> State:
        return (nonlinearity(a_x + a_h),)

    return step


def _lstm(a_x: Tensor, a_h: Tensor, state: State) -> State:
    i, f, g, o = (a_x + a_h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(a_x: Tensor, a_h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = a_x.chunk(3, -1), a_h.chunk(3, -1)
    reset, update = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    new = (x_n + reset * h_n).tanh()
    return (new + update * (state[0] - new),)


def _stepped(step: Callable[..., State], a_x: Tensor, state: State, weights: Weights) -> State:
    """The next states, from the pre-activations of an input."""
    h, *others = step(a_x, F.linear(state[0], weights[1], weights[3]), state)  # type: ignore[arg-type]
    if len(weights) == 5 and weights[4] is not None:  # a projection
        h = F.linear(h, weights[4])
    return h, *others


def _network(step: Callable[..., State]) -> Callable[..., Any]:
    """`torch._VF.lstm` and similar functions for padded sequences: all layers and directions, one time step at a
    time."""

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
        if isinstance(hidden, Tensor) and not hidden.is_floating_point():  # the sizes of a packed sequence's batches
            raise NotImplementedError(
                "a recurrent layer was given a PackedSequence, which is not supported; expected padded sequences: pad "
                "them, and leave the padding out of the loss with ignore_index"
            )
        states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        x = input if batch_first else input.transpose(0, 1)
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        last: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                own: list[Tensor | None] = list(params[k * each : (k + 1) * each])
                if not has_biases:
                    own[2:2] = [None, None]
                out, state = _layer(step, x, tuple(s[k] for s in states), own, backwards=direction == 1)
                outputs.append(out)
                last.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout)
        ends = tuple(torch.stack(s) for s in zip(*last, strict=True))
        return (x if batch_first else x.transpose(0, 1), *ends)

    return run


def _layer(
    step: Callable[..., State], x: Tensor, state: State, weights: Weights, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction, `x` of shape `(N, T, d)`."""
    a = F.linear(x, weights[0], weights[2])  # type: ignore[arg-type]
    outputs = []
    for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        state = _stepped(step, a[:, t], state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state


def _cell(step: Callable[..., State]) -> Callable[..., Any]:
    """`torch._VF.lstm_cell` and similar functions."""

    def run(input: Tensor, hidden: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        single = isinstance(hidden, Tensor)
        a = F.linear(input, w_ih, b_ih)
        state = _stepped(step, a, (hidden,) if single else tuple(hidden), (w_ih, w_hh, b_ih, b_hh))
        return state[0] if single else state

    return run


UNROLLED: dict[Any, Callable[..., Any]] = {
    torch._VF.rnn_tanh: _network(_elman(torch.tanh)),
    torch._VF.rnn_relu: _network(_elman(torch.relu)),
    torch._VF.lstm: _network(_lstm),
    torch._VF.gru: _network(_gru),
    torch._VF.rnn_tanh_cell: _cell(_elman(torch.tanh)),
    torch._VF.rnn_relu_cell: _cell(_elman(torch.relu)),
    torch._VF.lstm_cell: _cell(_lstm),
    torch._VF.gru_cell: _cell(_gru),
}
RECURRENCES: dict[Any, Callable[..., Any]] = {
    torch._VF.lstm: fused(torch._VF.lstm, _lstm),
    torch._VF.gru: fused(torch._VF.gru, _gru),
}
"""The same where gradients are all that is computed from it: the fused function, and one loop over time backward."""
