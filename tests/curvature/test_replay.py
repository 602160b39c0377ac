"""`J d` from the calls of one forward pass, compared with torch's forward mode of the whole model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

from natgrad.capture.tape import Tape
from natgrad.curvature.replay import Replay
from oracles import close, f64, net, randn

X = randn(6, 5, seed=3)


class Made(nn.Module):
    """A model of one function of a linear layer's output and of the input."""

    def __init__(self, of, inputs=5, outputs=4):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.of = nn.Linear(inputs, outputs, dtype=f64), of

    def forward(self, x):
        return self.of(self.layer(x), x)


class Twice(torch.autograd.Function):
    """A function that torch's function modes do not see."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g

    @staticmethod
    def jvp(ctx, g):
        return 2 * g


def replayed(model, x):
    tape = Tape()
    with tape:
        output = model(x)
    tape.end(output)
    return Replay.of(tape)


def check(model, x):
    replay = replayed(model, x)
    assert replay is not None
    assert replay.intact
    own = dict(model.named_parameters())
    d = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(own.items())}
    expected = jvp(lambda p: functional_call(model, p, (x,)), ({n: p.detach() for n, p in own.items()},), (d,))
    with torch.no_grad():
        found = replay.push((own[n], d[n]) for n in d)
    for a, b in zip(found, expected, strict=True):
        close(a, b.detach(), 1e-12)


ACTIVATIONS = [
    nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(2.0, 1.0), nn.ELU(0.7),
    nn.LeakyReLU(0.2), nn.Softmax(-1), nn.LogSoftmax(-1), nn.LayerNorm(4, dtype=f64),
]  # fmt: skip
FUNCTIONS = {
    "sine": lambda a, x: a.sin() + torch.cos(a),
    "square": lambda a, x: torch.square(a).mean(1),
    "sum and difference": lambda a, x: (a + x[:, :4] - a * a - 1).sum(-1),
    "product with a constant": lambda a, x: 2 * a * x[:, :4],
    "quotients": lambda a, x: a / x[:, :4].exp() + torch.exp(x[:, :4]) / a.exp(),
    "broadcast": lambda a, x: a + a[:, :1],
    "matrix products": lambda a, x: a @ a.T + torch.matmul(x, x.T) @ (a @ a.mT),
    "cat": lambda a, x: torch.cat([a, x, -a], 1),
    "forms": lambda a, x: a.view(2, 3, 4).transpose(0, 1).reshape(3, -1).unsqueeze(1).squeeze(1).flatten(),
    "without a gradient": lambda a, x: a * (a.detach() > 0),
    "a constant that is changed before": lambda a, x: a + torch.zeros(4, dtype=f64).add_(1),
    "nothing of it": lambda a, x: a.detach() + a[:, :1] * 0,
    "branch": lambda a, x: a.tanh() if a.sum() > 100 else a.exp(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(activation):
    check(Made(lambda a, x: activation(a)), X)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(Made(FUNCTIONS[name]), X)


def test_networks():
    check(net(5, 4, 3, 2), X)
    shared = nn.Linear(5, 5, dtype=f64)
    check(nn.Sequential(shared, nn.Tanh(), shared), X)
    check(nn.Sequential(nn.Linear(5, 4, bias=False, dtype=f64), nn.Dropout(0.0).eval(), nn.Identity()), randn(2, 3, 5))
    images = randn(2, 3, 8, 8)
    modules = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.AvgPool2d(2),
    ]
    check(nn.Sequential(*modules, nn.Flatten(), nn.Linear(4, 3)).double(), images)
    check(nn.Sequential(nn.ConvTranspose2d(3, 2, 2, 2), nn.AdaptiveAvgPool2d(2)).double(), images)
    check(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)).double(), torch.tensor([[0, 1, 5], [6, 6, 0]]))


def test_padding_has_no_tangent_because_it_has_no_gradient():
    table = nn.Embedding(7, 4, padding_idx=0, dtype=f64)
    replay = replayed(table, torch.tensor([[0, 1], [5, 0]]))
    d = randn(7, 4)
    with torch.no_grad():
        _, found = replay.push([(table.weight, d)])
    close(found, torch.stack([torch.stack([0 * d[0], d[1]]), torch.stack([d[5], 0 * d[0]])]))


class Recurrent(nn.Module):
    """All that a recurrent layer returns, for an input and initial states that depend on parameters."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.layer = nn.Linear(5, 3, dtype=f64), kind(3, 4, dtype=f64, **options)
        many = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        self.first = nn.Parameter(randn(many, 6 if self.layer.batch_first else 2, 4))

    def forward(self, x):
        first = torch.sin(self.first)
        states = (first, torch.cos(self.first)) if isinstance(self.layer, nn.LSTM) else first
        y, ends = self.layer(self.before(x), states)
        ends = ends if isinstance(ends, tuple) else (ends,)
        return torch.cat([y.reshape(-1), *(t.reshape(-1) for t in ends)])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "batch_first": True}, {"num_layers": 2, "bias": False}]
)
def test_recurrent_layers(kind, options):
    model, x = Recurrent(kind, **options), randn(6, 2, 5, seed=1)
    replay = replayed(model, x)
    assert replay is not None
    d = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    with torch.no_grad():
        output, found = replay.push((p, d[n]) for n, p in model.named_parameters())
        ends = []
        for sign in (1, -1):
            moved = {n: p + sign * 1e-5 * d[n] for n, p in model.named_parameters()}
            ends.append(functional_call(model, moved, (x,)))
    close(output, model(x).detach(), 1e-12)
    close(found, (ends[0] - ends[1]) / 2e-5, 1e-7)


NOT_REPLAYED = {
    "random": lambda a, x: F.dropout(a, 0.5),
    "in place": lambda a, x: a.mul(1.0).relu_(),
    "in place, of the output": lambda a, x: F.relu(a, inplace=True),
    "written to": lambda a, x: _written(a.mul(1.0)),
    "of a function that is not seen": lambda a, x: Twice.apply(a).tanh(),
    "without a rule": lambda a, x: a.cumsum(1),
    "several": lambda a, x: (a, a),
    "a derivative": lambda a, x: torch.autograd.grad(a.square().sum(), a, create_graph=True)[0] + a,
    "a transform": lambda a, x: torch.func.vmap(torch.tanh)(a) + a,
    "lower precision": lambda a, x: a.float().tanh(),
}


def _written(a):
    b = a.tanh()
    a[:, 0] = 0
    return b + a


@pytest.mark.parametrize("name", NOT_REPLAYED)
def test_what_cannot_be_replayed(name):
    replay = replayed(Made(NOT_REPLAYED[name]), X)
    assert replay is None or not replay.intact


def test_values_that_were_written_to_afterwards():
    constant = torch.ones(4, dtype=f64)
    replay = replayed(Made(lambda a, x: a * constant), X)
    assert replay.intact
    constant.add_(1)
    assert not replay.intact


def test_a_large_tape_is_given_up(monkeypatch):
    monkeypatch.setattr("natgrad.capture.tape.LIMIT", 40)
    assert replayed(net(5, 4), X) is not None
    assert replayed(net(5, 4, 4), X) is None
