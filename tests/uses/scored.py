"""What the tests of influence scores share: models, and every gradient by autograd."""

import torch
from torch import nn

from oracles import net, randn

DAMPING = 0.05


def problem(loss=None):
    torch.manual_seed(0)
    train, query = (randn(20, 4), torch.arange(20) % 3), (randn(5, 4, seed=7), torch.arange(5) % 3)
    return net(4, 6, 3).eval(), loss or nn.CrossEntropyLoss(), train, query


def gradients(model, loss, data, params=None):
    """`(n, size)`: of every example's own loss."""
    leaves = [p for n, p in model.named_parameters() if params is None or params(n)]
    x, y = data
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, leaves, strict=True)])
        )
    return torch.stack(rows)


def tagger():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.mid(self.embed(x)).tanh()).transpose(1, 2)

    y = torch.randint(3, (8, 6))
    y[2, :3] = -100
    return Tagger().double().eval(), (torch.randint(7, (8, 6)), y)
