"""Recurrent networks step by step: the computation of torch's fused functions, as affine maps that can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture.layers.recurrence import Direction, fused, layers_of, through_layers

State = tuple[Tensor, ...]


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


def _stepped(
    step: Callable[..., State], a_x: Tensor, state: State, W_hh: Tensor, b_hh: Tensor | None, W_hr: Tensor | None
) -> State:
    """The next states, from the pre-activations of an input."""
    h, *others = step(a_x, F.linear(state[0], W_hh, b_hh), state)
    return h if W_hr is None else F.linear(h, W_hr), *others


def is_packed(func: Any, args: Sequence[Any]) -> bool:
    """Whether a call is that of a recurrent layer on a PackedSequence, with the sizes of its batches."""
    sizes = args[1] if func in PACKABLE and len(args) > 1 else None
    return isinstance(sizes, Tensor) and not sizes.is_floating_point()


PACKABLE = torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu
PACKED = (
    " of a PackedSequence, where padded sequences are expected: pad them, and leave the padding out of the loss with "
    "ignore_index"
)


def _network(function: Any, step: Callable[..., State]) -> Callable[..., Any]:
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
        layers = layers_of(function, params, has_biases, num_layers, bidirectional)
        one = partial(_unrolled, step)
        return through_layers(one, layers, input, hidden, dropout if train else 0.0, batch_first)

    return run


def _unrolled(step: Callable[..., State], own: Direction, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One layer in one direction, `x` of shape `(N, T, d)`."""
    a = F.linear(x, own.W_ih, own.b_ih)
    outputs = []
    for t in reversed(range(x.shape[1])) if own.backwards else range(x.shape[1]):
        state = _stepped(step, a[:, t], state, own.W_hh, own.b_hh, own.W_hr)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if own.backwards else outputs, 1), state


def _cell(step: Callable[..., State]) -> Callable[..., Any]:
    """`torch._VF.lstm_cell` and similar functions."""

    def run(input: Tensor, hidden: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        single = isinstance(hidden, Tensor)
        a = F.linear(input, w_ih, b_ih)
        state = _stepped(step, a, (hidden,) if single else tuple(hidden), w_hh, b_hh, None)
        return state[0] if single else state

    return run


NETWORKS: dict[Any, Callable[..., State]] = {
    torch._VF.rnn_tanh: _elman(torch.tanh),
    torch._VF.rnn_relu: _elman(torch.relu),
    torch._VF.lstm: _lstm,
    torch._VF.gru: _gru,
}
UNROLLED: dict[Any, Callable[..., Any]] = {
    **{function: _network(function, step) for function, step in NETWORKS.items()},
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
GATES: dict[Any, int] = {torch._VF.lstm: 4, torch._VF.lstm_cell: 4, torch._VF.gru: 3, torch._VF.gru_cell: 3}
"""How many gates a recurrent layer has. Their matrices are stored one below the other, as one weight."""


def weights_of_gates(params: Sequence[Tensor]) -> list[Tensor]:
    """Those of the parameters of a recurrent layer that have a matrix for each gate. The others are biases, and
    projections, which have fewer rows."""
    matrices = [p for p in params if p.ndim == 2]
    most = max((len(p) for p in matrices), default=0)
    return [p for p in matrices if len(p) == most]
