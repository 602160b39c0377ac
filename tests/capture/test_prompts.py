"""A parameter that every example gets a copy of, for batches of several examples and of one."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, fit, randn

LOSS = nn.CrossEntropyLoss()
COPIES = {
    "expand": lambda p, n: p.expand(n, -1, -1),
    "unsqueeze, expand": lambda p, n: p.unsqueeze(0).expand(n, -1, -1),
    "broadcast_to": lambda p, n: torch.broadcast_to(p[None], (n, 3, 6)),
    "repeat": lambda p, n: p.repeat(n, 1, 1),
    "tile": lambda p, n: p.tile(n, 1, 1),
    "torch.tile": lambda p, n: torch.tile(p.unsqueeze(0), (n, 1, 1)),
    "stack": lambda p, n: torch.stack([p] * n),
    "cat": lambda p, n: torch.cat([p.unsqueeze(0)] * n),
    "sum": lambda p, n: p + torch.zeros(n, 1, 1, dtype=p.dtype),
    "embedding": lambda p, n: nn.functional.embedding(torch.arange(3).repeat(n, 1), p),
}


class Prompted(nn.Module):
    def __init__(self, copy):
        super().__init__()
        self.copy, self.prompt = copy, nn.Parameter(randn(3, 6))
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.to(f64)

    def forward(self, x):
        h = torch.cat([self.copy(self.prompt, len(x)), x], 1)
        return self.out(self.inner(h).tanh().mean(1))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("name", COPIES)
def test_every_way_to_copy(name, n):
    model, data = Prompted(COPIES[name]), (randn(n, 7, 6), torch.arange(n) % 3)
    dense = natgrad.fisher(model, LOSS, data, "dense")["prompt"].to_dense()
    diagonal = natgrad.fisher(model, LOSS, data, "diagonal")["prompt"].diagonal()
    close(torch.cat([v.flatten() for v in diagonal.values()]), dense.diagonal(), 1e-10)
    if name != "embedding":
        close(natgrad.fisher(model, LOSS, data, "block")["prompt"].to_dense(), dense, 1e-10)


@pytest.mark.parametrize("name", ["expand", "tile", "stack"])
def test_the_last_batch_may_have_one_example(name):
    model = Prompted(COPIES[name])
    opt = natgrad.KFAC(model, LOSS, statistics_every=1)
    for n in (5, 5, 1, 5):
        fit(opt, model, randn(n, 7, 6), torch.arange(n) % 3, 1)
        assert opt.diagnostics["accepted"]


@pytest.mark.parametrize("tensors", [lambda p: torch.stack([p, 2 * p]), lambda p: torch.stack([p, p.detach()])])
def test_several_tensors_are_no_copies(tensors):
    model = Prompted(lambda p, n: tensors(p).repeat(n, 1, 1)[:n])
    with pytest.raises(NotImplementedError, match="'prompt'"):
        natgrad.fisher(model, LOSS, (randn(4, 7, 6), torch.arange(4) % 3), "block")


@pytest.mark.parametrize("name", ["tile", "stack", "cat"])
@pytest.mark.parametrize("structure", ["block", "implicit"])
def test_a_copy_may_be_written_to(name, structure):
    """As torch's own copies may: each example has memory of its own."""

    def copy(p, n):
        h = COPIES[name](p, n)
        h[:, 0] += 1.0
        return h

    model, data = Prompted(copy), (randn(3, 7, 6), torch.arange(3))
    dense = natgrad.fisher(model, LOSS, data, "dense")["prompt"].to_dense()
    F = natgrad.fisher(model, LOSS, data, structure, params=["prompt"])
    close(F @ torch.eye(18, dtype=f64), dense, 1e-10)
