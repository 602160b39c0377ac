"""Steps whose products with the Jacobian come from the recorded calls, and steps that run the model again, are one."""

import warnings

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature.replay import Replay
from oracles import close, f64, fit, net, randn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols = nn.Embedding(9, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.symbols(x))[0]).mT


def perceptron():
    return net(4, 6, 5, 3), nn.MSELoss(), randn(16, 4), randn(16, 3, seed=1)


def convolutional():
    modules = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*modules).double(), nn.CrossEntropyLoss(), randn(12, 1, 6, 6), torch.arange(12) % 3


def recurrent():
    lengths = torch.arange(1, 9)[:, None]
    x = (torch.arange(64).view(8, 8) % 8 + 1) * (torch.arange(8) < lengths)
    return Tagger().double(), nn.CrossEntropyLoss(ignore_index=-100), x, torch.where(x > 0, x % 3, -100)


def trained(make, monkeypatch, replays):
    torch.manual_seed(0)
    model, loss, x, y = make()
    opt = natgrad.KFAC(model, loss, generator=torch.Generator().manual_seed(0))
    count = []
    push = Replay.push
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Replay, "push", lambda self, d: (count.append(1), push(self, d))[1])
        if not replays:
            patch.setattr(Replay, "of", classmethod(lambda cls, tape: None))
        losses = fit(opt, model, x, y, 14)
    return torch.tensor(losses, dtype=f64), torch.cat([p.detach().flatten() for p in model.parameters()]), len(count)


@pytest.mark.parametrize("make", [perceptron, convolutional, recurrent])
def test_both_ways_take_the_same_steps(make, monkeypatch):
    (losses, end, count), (others, other_end, none) = (trained(make, monkeypatch, replays) for replays in (True, False))
    assert count > 10 > none == 0
    assert losses[-1] < losses[0]
    close(losses, others, 1e-8)
    close(end, other_end, 1e-7)
