"""Layers with statistics that are zero, or nothing but rounding: inverses stay within `1/λ`, steps stay finite."""

import warnings

import pytest
import torch
from torch import nn

import natgrad

LOSS = nn.CrossEntropyLoss()
STRUCTURES = ["kfac", "ekfac", "block", "diagonal"]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Head(nn.Module):
    """Attention, whose keys' bias has no gradient: softmax does not see it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        h = self.norm(x.flatten(2)[..., :4])
        return self.out(self.attention(h, h, h)[0].mean(1))


# A shift before a normalization has no gradient, and neither has a scale but for the normalization's ε.
NORMS = {
    "batch and instance norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ),
    "group and instance norm": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.GroupNorm(8, 32), nn.Conv2d(32, 16, 1), nn.InstanceNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 2),
    ),
    "two group norms": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.GroupNorm(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ),
    "batch norm before a convolution and a norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, groups=3), nn.InstanceNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 2),
    ),
    "two layer norms": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    ),
}  # fmt: skip


def images(dtype=torch.float32, n=32):
    x = torch.randn(n, 1, 6, 6, dtype=dtype)
    return x, (x.mean((1, 2, 3)) > 0).long()


def check(F, dtype):
    v = torch.randn(F.space.size, dtype=dtype)
    for damping in (1e-3, 0.1, 10.0):
        assert F.solve(v, damping).norm() <= 1.001 / damping * v.norm()
        assert (F.power(-0.5, damping) @ v).norm() <= 1.001 / damping**0.5 * v.norm()
        assert torch.isfinite(F.logdet(damping))
        assert all(torch.isfinite(draws).all() for draws in F.sample(2, damping).values())


@both_dtypes
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_before_a_norm(name, structure, dtype):
    model = NORMS[name]().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics of the batch
        F = natgrad.fisher(model, LOSS, images(dtype), structure)
    check(F, dtype)
    v = torch.randn(F.space.size, dtype=dtype)
    if structure in ("kfac", "ekfac"):  # a mean of an input to a norm is of the order of one
        assert F.solve(v, 0.1, damping_style="centered").norm() < 3e4 * v.norm()


@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "momentum": 0.9, "max_kl": 0.01}, {"damping_style": "exact"}])
@pytest.mark.parametrize("name", ["batch and instance norm", "group and instance norm", "two group norms"])
def test_a_shift_without_gradient_stays_where_it_is(name, options):
    model, (x, y) = NORMS[name](), images(n=64)
    opt = natgrad.KFAC(model, LOSS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(25):
            loss = opt.loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
    assert loss < 0.7
    # With momentum and a given step size, rounding adds up: to 9 at most, of several seeds and precisions of products.
    assert model[1].bias.abs().max() < (20 if options.get("max_kl") else 1)


def with_dead_units():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[1].bias[:3] = -100
    return model


def without_units():
    model = with_dead_units()
    with torch.no_grad():
        model[1].bias.fill_(-100)
    return model


def with_zero_head():
    model = with_dead_units()
    with torch.no_grad():
        model[3].weight.zero_()
    return model


def certain():
    """Its outputs are so far apart that their Fisher matrix is zero."""
    model = with_zero_head()
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([300.0, -300.0]))
    return model


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 2))


def constant(x):
    return torch.full_like(x, 3.7) + 100 * torch.arange(x[0].numel(), dtype=x.dtype).view_as(x[0])


def one_constant_pixel(x):
    x = x.clone()
    x[..., 0, 0] = 1234.5
    return x


CASES = {
    "dead units": (with_dead_units, lambda x: x),
    "no units": (without_units, lambda x: x),
    "a head of zeros": (with_zero_head, lambda x: x),
    "a certain output": (certain, lambda x: x),
    "constant inputs": (plain, constant),
    "one constant input": (plain, one_constant_pixel),
    "inputs of zeros": (plain, lambda x: 0 * x),
    "tiny inputs": (plain, lambda x: 1e-30 * x),
    "one example": (plain, lambda x: x[:1]),
    "keys of attention": (Head, lambda x: x.view(-1, 3, 12)),
}


@both_dtypes
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_inverses(name, structure, dtype):
    make, change = CASES[name]
    x, y = images(dtype)
    x = change(x)
    F = natgrad.fisher(make().to(dtype), LOSS, (x, y[: len(x)]), structure)
    check(F, dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"structure": "ekfac"}, {"damping_style": "exact"}, {"structure": "input", "lr": 0.02, "momentum": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("certain", "one constant input")])
def test_steps(name, options):
    """Nothing ends the run, and nothing is thrown far away."""
    make, change = CASES[name]
    x, y = images()
    model, x = make(), change(x)
    opt = natgrad.KFAC(model, LOSS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(15):
            loss = opt.loss(model(x), y[: len(x)])
            opt.zero_grad()
            loss.backward()
            opt.step()
    assert torch.isfinite(loss)
    assert all(p.abs().max() < 1e4 for p in model.parameters())
