"""Rounding against the same method entry by entry, and against all roundings that there are."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import natgrad
from natgrad.uses.quantize import Grid, _codes
from oracles import close, f64, net, randn, spd

LOSS = nn.MSELoss(reduction="sum")


def regression(n=60, d=6, outputs=3, bias=True):
    torch.manual_seed(0)
    x = randn(n, d) @ spd(d, seed=1, shift=0.01) + 1.0
    model = nn.Linear(d, outputs, bias=bias, dtype=f64)
    return model, (x, model(x).detach())


def one_by_one(W, C, B, grid, damping):
    """The nearest plane of the whole matrix `B ⊗ C`, one entry after the other."""

    def damped(M):
        return M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=f64)

    rows, columns = B.diagonal().argsort(), C.diagonal().argsort()
    order = [int(o) * W.shape[1] + int(i) for o in rows for i in columns]
    H = torch.kron(damped(B), damped(C))[order][:, order]
    root = torch.linalg.cholesky(H)
    L = root / root.diagonal()
    w, scale, zero = (t.expand_as(W).flatten()[order] for t in (W, grid.scale, grid.zero))
    e, codes = torch.zeros_like(w), torch.zeros_like(w)
    for k in reversed(range(len(w))):
        target = w[k] - L[k + 1 :, k] @ e[k + 1 :]
        codes[k] = ((target / scale[k]).round() + zero[k]).clamp(0, grid.largest)
        e[k] = scale[k] * (codes[k] - zero[k]) - w[k]
    found = torch.empty_like(w)
    found[order] = codes
    return found.view_as(W)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize("bits", [2, 4])
def test_antidiagonals_at_once_are_entries_one_by_one(shape, bits):
    o, i = shape
    W, C, B = randn(o, i), spd(i, seed=2, shift=0.05), spd(o, seed=3, shift=0.05)
    grid = Grid.of(W, bits)
    assert torch.equal(_codes("w", W, C, B, grid, 0.01), one_by_one(W, C, B, grid, 0.01))


def test_on_diagonal_factors_it_is_nearest_rounding():
    W, C, B = randn(4, 5), randn(5, seed=1).square(), randn(4, seed=2).square()
    grid = Grid.of(W, 3)
    for factors in ((C, B), (C.diag(), B.diag())):
        assert torch.equal(_codes("w", W, *factors, grid, 0.01), grid.codes(W))


@pytest.mark.parametrize("seed", range(5))
def test_no_rounding_is_better_than_the_best_and_none_is_worse_than_the_nearest(seed):
    torch.manual_seed(seed)
    x = randn(40, 5, seed=seed) @ spd(5, seed=seed, shift=0.01)
    model = nn.Linear(5, 1, bias=False, dtype=f64)
    W, data = model.weight.detach().clone(), (x, model(x).detach())
    F = natgrad.fisher(model, LOSS, data)
    grid = Grid.of(W, 2)

    def loss_at(weight):
        return float((x @ (weight - W).mT).square().sum())

    best = min(loss_at(grid.values(torch.tensor([codes], dtype=f64))) for codes in product(range(4), repeat=5))
    found = natgrad.quantize(model, F, 2)
    assert found.increase == pytest.approx(loss_at(model.weight.detach()))
    assert found.nearest == pytest.approx(loss_at(grid.values(grid.codes(W))))
    assert best * (1 - 1e-9) <= found.increase <= found.nearest


@pytest.mark.parametrize("sides", ["both", "input"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_increase_is_that_of_the_loss(sides, bias):
    model, (x, y) = regression(bias=bias)
    F = natgrad.fisher(model, LOSS, (x, y))
    before = copy.deepcopy(model)
    found = natgrad.quantize(model, F, 3, sides=sides)
    assert found.increase == pytest.approx(LOSS(model(x), y).item())  # for one linear map it is exact
    assert found.increase < found.nearest
    assert all(len(set(row.tolist())) <= 8 for row in model.weight)
    if bias:
        close(model(x).mean(0).detach(), before(x).mean(0).detach())  # the bias takes up the mean


def test_centered_or_not_the_roundings_are_the_same():
    model, data = regression()
    found = []
    for centered in (True, False):
        own = copy.deepcopy(model)
        natgrad.quantize(own, natgrad.fisher(own, LOSS, data, centered=centered), 3)
        found.append(torch.cat([own.weight, own.bias[:, None]], 1).detach())
    close(*found)


@pytest.mark.parametrize("structure", ["kfac", "kfoc"])
def test_a_network_loses_less_than_by_nearest_rounding(structure):
    torch.manual_seed(0)
    model, x = net(6, 16, 3), randn(200, 6) @ spd(6, seed=1, shift=0.01)
    y = (x[:, :3] * x[:, 3:]).tanh()
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    F = natgrad.fisher(model, nn.MSELoss(), (x, y), structure)
    nearest, before = copy.deepcopy(model), nn.functional.mse_loss(model(x), y).item()
    with torch.no_grad():
        for layer in (nearest[0], nearest[2]):
            grid = Grid.of(layer.weight, 4)
            layer.weight.copy_(grid.values(grid.codes(layer.weight)))
    found = natgrad.quantize(model, F, 4)
    assert list(found.codes) == ["0.weight", "2.weight"]
    for n, codes in found.codes.items():
        close(found.grids[n].values(codes), dict(model.named_parameters())[n].detach(), 1e-12)
    ours, theirs = (nn.functional.mse_loss(m(x), y).item() - before for m in (model, nearest))
    assert ours < 0.6 * theirs


def test_kernels_of_convolutions_and_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    data = torch.randn(20, 2, 3, 3), torch.arange(20) % 3
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data)
    found = natgrad.quantize(model, F, 2, params=["0.weight"])
    assert found.codes["0.weight"].shape == (3, 2, 2, 2)
    assert all(len(set(kernel.flatten().tolist())) <= 4 for kernel in model[0].weight)
    low = model.to(torch.bfloat16)
    F = natgrad.fisher(low, nn.CrossEntropyLoss(), (data[0].to(torch.bfloat16), data[1]))
    assert list(natgrad.quantize(low, F, 8).codes) == ["2.weight"]


def test_a_layer_without_inputs_or_weights_keeps_nearest_rounding():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[2].weight[1] = 0
    W, data = model[2].weight.detach().clone(), (randn(20, 4), torch.arange(20) % 3)
    found = natgrad.quantize(model, natgrad.fisher(model, nn.CrossEntropyLoss(), data), 3)
    grid = Grid.of(W, 3)
    close(model[2].weight.detach(), grid.values(grid.codes(W)))
    assert found.increase == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_rounded_is_said():
    torch.manual_seed(0)
    model, data, loss = net(4, 5, 3), (randn(20, 4), torch.arange(20) % 3), nn.CrossEntropyLoss()
    F = natgrad.fisher(model, loss, data)
    for structure in ("ekfac", "dense", "diagonal", "block"):
        with pytest.raises(TypeError, match=r"'0.weight' is .*no Kronecker product; use structure='kfac' or 'kfoc'"):
            natgrad.quantize(model, natgrad.fisher(model, loss, data, structure))
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits={bits} is not usable"):
            natgrad.quantize(model, F, bits)
    with pytest.raises(ValueError, match="F is of another model"):
        natgrad.quantize(net(4, 6, 3), F)
    with pytest.raises(ValueError, match="sides='output' is unknown"):
        natgrad.quantize(model, F, sides="output")
    with pytest.raises(ValueError, match="no weight is to be rounded"):
        natgrad.quantize(model, F, params=["0.bias"])
    one = natgrad.fisher(model, loss, (data[0][:2], data[1][:2]), centered=False)
    with pytest.raises(ValueError, match=r"a factor of '0.weight' with damping=0 is singular or indefinite"):
        natgrad.quantize(model, one, damping=0.0)
