"""Unlearning against training on the other data alone, and against other ways up."""

import copy

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, randn

LOSS = nn.MSELoss()


def regression(bias=True):
    x = randn(50, 4) + 0.5
    return x, x @ randn(4, 1, seed=9) + 0.3 * randn(50, 1, seed=1)


def fitted(x, y):
    model = nn.Linear(x.shape[1], 1, dtype=f64)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=f64)], 1), y).solution
    model.weight.data, model.bias.data = solution[:-1].mT.contiguous(), solution[-1]
    return model.eval()


def classes():
    torch.manual_seed(0)
    model, x, y = net(4, 8, 3), randn(60, 4), torch.arange(60) % 3
    opt = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-2)
    for _ in range(200):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return model.eval(), (x[:12], y[:12]), (x[12:], y[12:])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "implicit"])  # all exact for one output
def test_one_step_of_a_linear_model_is_training_without(structure, reduction):
    (x, y), loss = regression(), nn.MSELoss(reduction=reduction)
    model = fitted(x, y)
    F = natgrad.fisher(model, loss, (x[15:], y[15:]), structure)
    step_size = 15 / 35 if reduction == "mean" else 1.0
    before = loss(model(x[15:]), y[15:]).item()
    found = natgrad.unlearn(model, loss, (x[:15], y[:15]), F, steps=1, step_size=step_size, damping=0.0)
    expected = fitted(x[15:], y[15:])
    close(model.weight.detach(), expected.weight.detach(), 1e-7)
    close(model.bias.detach(), expected.bias.detach(), 1e-7)
    assert found.losses[1] == pytest.approx(loss(model(x[:15]), y[:15]).item())
    assert found.increase > 0
    assert loss(model(x[15:]), y[15:]).item() < before


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_increase_is_bounded(steps):
    model, forget, retain = classes()
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), retain)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = natgrad.unlearn(model, nn.CrossEntropyLoss(), forget, F, steps=steps, increase=0.05)
    change = torch.cat([p.detach().flatten() for p in model.parameters()]) - theta
    assert found.increase == pytest.approx(float(0.5 * change @ F.to_dense() @ change))
    assert 0.02 < found.increase <= 0.05 * (1 + 1e-9)
    assert len(found.losses) == steps + 1
    assert found.losses[-1] > found.losses[0]


def test_no_other_way_goes_up_more_at_the_same_price():
    model, forget, retain = classes()
    loss = nn.CrossEntropyLoss()
    F = natgrad.fisher(model, loss, retain, "dense")
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss(model(forget[0]), forget[1]), model.parameters())]
    )
    damped = F.to_dense() + 1e-3 * torch.eye(len(gradient), dtype=f64)
    start = copy.deepcopy(model)
    natgrad.unlearn(model, loss, forget, F, steps=1, increase=1e-4)
    ours = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
    assert 0.5 * ours @ damped @ ours == pytest.approx(1e-4)
    for seed in range(20):
        other = ours + 0.3 * ours.norm() * randn(len(ours), seed=seed) / len(ours) ** 0.5
        other = other * (ours @ damped @ ours / (other @ damped @ other)).sqrt()
        assert gradient @ other < gradient @ ours


def test_batches_change_nothing_and_ignored_targets_do_not_count():
    model, (x, y), retain = classes()
    y = y.clone()
    y[3:6] = -100
    loss, found = nn.CrossEntropyLoss(), []
    F = natgrad.fisher(model, loss, retain)
    kept = torch.tensor([0, 1, 2, *range(6, 12)])
    for data in ((x, y), [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])], (x[kept], y[kept])):
        own = copy.deepcopy(model)
        natgrad.unlearn(own, loss, data, F)
        found.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    close(found[1], found[0])
    close(found[2], found[0])


def test_only_the_parameters_of_the_matrix_are_changed():
    model, forget, retain = classes()
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), retain, params=["2.weight"])
    before = copy.deepcopy(model)
    natgrad.unlearn(model, nn.CrossEntropyLoss(), forget, F)
    for n, p in model.named_parameters():
        assert torch.equal(p, dict(before.named_parameters())[n]) == (n != "2.weight")
    low = before.to(torch.bfloat16)
    half = [(d[0].to(torch.bfloat16), d[1]) for d in (forget, retain)]
    F = natgrad.fisher(low, nn.CrossEntropyLoss(), half[1])
    found = natgrad.unlearn(low, nn.CrossEntropyLoss(), half[0], F)
    assert found.losses[-1] > found.losses[0]


def test_what_cannot_be_unlearned_is_said_and_changes_nothing():
    model, (x, y), retain = classes()
    loss, before = nn.CrossEntropyLoss(), copy.deepcopy(model.state_dict())
    F = natgrad.fisher(model, loss, retain)
    H = -1 * natgrad.hessian(model, loss, retain, "dense")
    with pytest.raises(ValueError, match="indefinite"):
        natgrad.unlearn(model, loss, (x, y), H)
    with pytest.raises(ValueError, match="every target is ignored"):
        natgrad.unlearn(model, loss, (x, torch.full_like(y, -100)), F)
    dead = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match="the data to forget have no gradient"):
        natgrad.unlearn(model, dead, (x, torch.full_like(y, -100)), F)
    with pytest.raises(ValueError, match="pass a smaller increase or step_size"):
        natgrad.unlearn(model, loss, (x, y), F, step_size=1e308)
    with pytest.raises(ValueError, match="F is of another model"):
        natgrad.unlearn(net(4, 9, 3), loss, (x, y), F)
    for options in ({"steps": 0}, {"increase": 0.0}, {"step_size": -1.0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match="is not usable"):
            natgrad.unlearn(model, loss, (x, y), F, **options)
    for n, p in model.state_dict().items():
        assert torch.equal(p, before[n])
