"""The unrolled recurrent layers against torch's own."""

import itertools

import pytest
import torch
from torch import nn

import natgrad
from natgrad.capture.recorder import Recorder
from oracles import close, f64, randn


def recorded(layer, *args):
    with Recorder(dict(layer.named_parameters())) as recorder:
        out = layer(*args)
    recorder.check(out)
    return out, recorder.uses


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "bias"), list(itertools.product([1, 2], *[[False, True]] * 3))
)
def test_outputs_and_states_are_torchs(kind, layers, bidirectional, batch_first, bias):
    layer = kind(3, 4, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias, dtype=f64)
    for args in ([randn(5, 6, 3)], [randn(5, 6, 3), state(kind, layers, bidirectional, 5 if batch_first else 6)]):
        expected = layer(*args)
        out, uses = recorded(layer, *args)
        for a, b in zip(flat(out), flat(expected), strict=True):
            close(a.detach(), b.detach(), 1e-12)
        assert {n for use in uses for n in (use.weight, use.bias) if n} == set(dict(layer.named_parameters()))


def state(kind, layers, bidirectional, n):
    h = randn(layers * (1 + bidirectional), n, 4, seed=1)
    return (h, randn(*h.shape, seed=2)) if kind is nn.LSTM else h


def flat(out):
    return [t for part in out for t in (flat(part) if isinstance(part, tuple) else [part])]


def test_projections_and_rectified_units():
    for layer in (nn.LSTM(3, 4, proj_size=2, dtype=f64), nn.RNN(3, 4, nonlinearity="relu", dtype=f64)):
        x = randn(5, 6, 3)
        out, _ = recorded(layer, x)
        for a, b in zip(flat(out), flat(layer(x)), strict=True):
            close(a.detach(), b.detach(), 1e-12)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(cell):
    layer, x = cell(3, 4, dtype=f64), randn(6, 3)
    out, _ = recorded(layer, x)
    expected = layer(x)
    for a, b in zip(*([t] if torch.is_tensor(t) else t for t in (out, expected)), strict=True):
        close(a.detach(), b.detach(), 1e-12)


def test_dropout_between_layers_is_drawn():
    layer = nn.LSTM(3, 4, 2, dropout=0.5, dtype=f64)
    x = randn(5, 6, 3)
    first, second = (recorded(layer, x)[0][0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    close(recorded(layer, x)[0][0].detach(), layer(x)[0].detach(), 1e-12)


def test_packed_sequences_are_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
            return self.rnn(packed)[1][0]

    with pytest.raises(NotImplementedError, match=r"PackedSequence.*pad them.*ignore_index"):
        natgrad.fisher(Packed(), nn.MSELoss(), (torch.randn(2, 5, 3), torch.randn(2, 4)))


def test_an_LSTM_is_the_linear_maps_it_is_made_of():
    """The same network by hand, of two linear layers: the same matrices."""

    class ByHand(nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.ih, self.hh = nn.Linear(3, 16, dtype=f64), nn.Linear(4, 16, dtype=f64)
            for mine, its in zip((*self.ih.parameters(), *self.hh.parameters()), torchs_order(lstm), strict=True):
                mine.data.copy_(its)

        def forward(self, x):
            h = c = x.new_zeros(len(x), 4)
            a = self.ih(x)
            for t in range(x.shape[1]):
                i, f, g, o = (a[:, t] + self.hh(h)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            return h

    lstm = nn.LSTM(3, 4, batch_first=True, dtype=f64)
    data = (randn(6, 5, 3), torch.arange(6) % 4)
    loss, hand = nn.CrossEntropyLoss(), ByHand(lstm)
    for structure in ("kfac", "ekfac", "block", "diagonal"):
        by_hand = natgrad.fisher(hand, loss, data, structure).blocks
        own = natgrad.fisher(
            lstm, loss, [data], structure, forward=lambda model, batch: (model(batch[0])[1][0][0], batch[1])
        ).blocks
        assert len(own) == 2
        for mine, its in zip(by_hand.values(), own.values(), strict=True):
            close(its.to_dense(), mine.to_dense(), 1e-9)


def torchs_order(lstm):
    return lstm.weight_ih_l0, lstm.bias_ih_l0, lstm.weight_hh_l0, lstm.bias_hh_l0


OPTIONS = [
    {}, {"bidirectional": True, "batch_first": True}, {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]  # fmt: skip


def loss_of(out):
    return sum((t * randn(*t.shape, seed=i)).sum() for i, t in enumerate(flat(out)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gradients_are_torchs_also_in_inputs_and_initial_states_and_twice(kind, options):
    layer = kind(3, 4, dtype=f64, **options)
    x, first = randn(5, 6, 3), state(kind, layer.num_layers, layer.bidirectional, 5 if layer.batch_first else 6)
    leaves = [t.requires_grad_() for t in (x, *(first if kind is nn.LSTM else (first,)))] + list(layer.parameters())
    found = []
    for run in (lambda: layer(x, first), lambda: recorded(layer, x, first)[0]):
        once = torch.autograd.grad(loss_of(run()), leaves, create_graph=True)
        again = sum((g * randn(*g.shape, seed=i)).sum() for i, g in enumerate(once))
        found.append([*once, *torch.autograd.grad(again, leaves)])
        plain = torch.autograd.grad(loss_of(run()), leaves)
        for a, b in zip(plain, once, strict=True):
            close(a, b.detach(), 1e-12)
    for a, b in zip(*found, strict=True):
        close(a.detach(), b.detach(), 1e-10)
