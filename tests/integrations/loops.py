"""What the wrappers are compared with: a small network, data, and the loop that README shows."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad

D, C, N, BATCH = 5, 3, 72, 12
OPTIONS = {"all adaptive": {}, "given step size": {"lr": 0.1, "momentum": 0.9, "damping": 0.1}}


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())


def loader(batch=BATCH):
    return DataLoader(data(), batch)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).to(dtype)


def kfac(model, options):
    return natgrad.KFAC(model, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(3), **options)


def plain_loop(options, epochs=3, accumulate=1, clip=None, schedule=None, autocast=False, batch=BATCH):
    """The weights and losses of the loop itself."""
    model = network(torch.float32 if autocast else torch.float64)
    opt = kfac(model, options)
    scheduler = schedule(opt) if schedule else None
    losses = []
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader(batch)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                loss = opt.loss(model(x.to(model[0].weight.dtype)), y)
            losses.append(loss.item())
            if i % accumulate == 0:
                opt.zero_grad()
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                if scheduler:
                    scheduler.step()
    return weights(model), losses


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(own, expected, atol=0.0):
    assert own.keys() == expected.keys()
    for n, p in expected.items():
        assert torch.allclose(own[n].to(p.dtype), p, rtol=0, atol=atol), n
