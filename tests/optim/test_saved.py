"""States: refused as a whole or taken as a whole; torch's own checkpoint functions lose nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import natgrad
from oracles import f64

X = torch.randn(40, 5, dtype=f64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CE = nn.CrossEntropyLoss()


def net(width=8, dtype=f64, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width, bias=bias), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


MAKE = {
    "KFAC": lambda m: natgrad.KFAC(m, CE),
    "numbers": lambda m: natgrad.KFAC(m, CE, lr=0.05, momentum=0.9, max_kl=0.01),
    "EKFAC": lambda m: natgrad.KFAC(m, CE, structure="ekfac", statistics_every=2),
    "identity": lambda m: natgrad.KFAC(m, CE, structure="identity", lr=0.05, momentum=0.9),
    "NaturalGradient": lambda m: natgrad.NaturalGradient(m, CE, momentum=None),
    "PRONG": lambda m: natgrad.PRONG(m, lr=0.05, momentum=0.9),
}


def train(model, opt, steps):
    x, loss_of = X.to(model[0].weight.dtype), getattr(opt, "loss", CE)
    for _ in range(steps):
        loss = loss_of(model(x), Y)
        opt.zero_grad()
        loss.backward()
        opt.step()


def everything(model, opt):
    return copy.deepcopy([model.state_dict(), opt.state_dict()])


def alike(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


OTHERS = {
    "another width": lambda: net(9),
    "float64 into float32": lambda: net(dtype=torch.float32),
    "a missing bias": lambda: net(bias=False),
    "a layer more": lambda: nn.Sequential(*net(), nn.Linear(3, 3).double()),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", MAKE)
def test_a_state_of_other_parameters_is_refused_and_changes_nothing(name, other):
    source = net()
    saved = MAKE[name](source)
    train(source, saved, 4)
    model = OTHERS[other]()
    opt = MAKE[name](model)
    train(model, opt, 2)
    before = everything(model, opt)
    with pytest.raises(ValueError, match=r"the state|load"):
        opt.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert alike(everything(model, opt), before)
    train(model, opt, 3)


@pytest.mark.parametrize("name", [n for n in MAKE if n != "PRONG"])
def test_a_state_that_lacks_something_is_refused_and_changes_nothing(name):
    model = net()
    opt = MAKE[name](model)
    train(model, opt, 4)
    whole = copy.deepcopy(opt.state_dict())
    key = next(k for k in whole if k not in ("state", "param_groups"))
    other = net(seed=1)
    fresh = MAKE[name](other)
    train(other, fresh, 2)
    before = everything(other, fresh)
    for missing in whole[key]:
        broken = copy.deepcopy(whole)
        del broken[key][missing]
        with pytest.raises(ValueError, match=f"the state has no '{missing}'"):
            fresh.load_state_dict(broken)
        assert alike(everything(other, fresh), before)


@pytest.mark.parametrize("options", [{"centered": False}, {"structure": "ekfac"}, {"structure": "diagonal"}], ids=str)
def test_a_state_of_another_curvature_is_refused(options):
    model = net()
    opt = natgrad.KFAC(model, CE)
    train(model, opt, 3)
    other = natgrad.KFAC(net(), CE, **options)
    with pytest.raises(ValueError, match="make it with the same"):
        other.load_state_dict(opt.state_dict())


def test_the_order_of_the_parameters_counts():
    class Two(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            for name in ("b", "a") if swapped else ("a", "b"):
                setattr(self, name, nn.Linear(5, 5, dtype=f64))

        def forward(self, x):
            return self.b(self.a(x).tanh())

    opt = natgrad.KFAC(Two(False), CE)
    with pytest.raises(ValueError, match=r"the first that differs is 'a\.weight' there and 'b\.weight' here"):
        natgrad.KFAC(Two(True), CE).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", [n for n in MAKE if n != "PRONG"])
@pytest.mark.parametrize("alone", [False, True])
def test_torchs_checkpoint_functions_resume_bit_for_bit(name, alone):
    model = net()
    opt = MAKE[name](model)
    train(model, opt, 7)
    if alone:
        states = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, opt)))
    else:
        states = copy.deepcopy(get_state_dict(model, opt))
    other = net(seed=3)
    resumed = MAKE[name](other)
    if alone:
        other.load_state_dict(states[0])
        set_optimizer_state_dict(other, resumed, states[1])
    else:
        set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1])
    train(model, opt, 6)
    train(other, resumed, 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert opt.diagnostics == resumed.diagnostics


def test_a_fresh_optimizer_has_a_state_for_torchs_checkpoint_functions():
    model = net()
    assert set(get_optimizer_state_dict(model, natgrad.KFAC(model, CE))["state"]) == {
        n for n, _ in model.named_parameters()
    }
