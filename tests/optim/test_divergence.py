"""A run with numbers of the user's own that goes astray says so, at the user's line, once."""

import copy
import warnings

import pytest
import torch
from torch import nn

import natgrad
from oracles import net, randn

LOSS = nn.CrossEntropyLoss()
RASH = {"lr": 1.0, "momentum": 0.95, "damping": 1e-8}


def train(opt, model, count):
    x, y = randn(30, 4), torch.arange(30) % 3
    for _ in range(count):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


def test_it_is_said_once_and_where_the_step_is_the_users():
    model = net(4, 16, 3)
    opt = natgrad.KFAC(model, LOSS, **RASH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(opt, model, 60)
    said = [w for w in caught if "diverges" in str(w.message)]
    assert len(said) == 1
    assert said[0].filename == __file__
    assert "max_kl=0.01" in str(said[0].message)


def test_what_cannot_be_inverted_then_is_put_down_to_it(monkeypatch):
    model = net(4, 16, 3)
    opt = natgrad.KFAC(model, LOSS, **RASH)
    with pytest.warns(RuntimeWarning, match="diverges"):
        train(opt, model, 60)

    def singular(*_):
        raise ValueError("factor A is singular")

    monkeypatch.setattr(opt.recipe.preconditioner, "prepare", singular)
    with pytest.raises(ValueError, match=r"diverged.*factor A is singular.*max_kl=0\.01"):
        train(opt, model, 1)


def test_beyond_return_the_run_ends():
    model = net(4, 16, 3)
    opt = natgrad.KFAC(model, LOSS, **RASH)
    with pytest.warns(RuntimeWarning, match="diverges"):
        train(opt, model, 60)
    before = [p.clone() for p in model.parameters()]
    model.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan,))
    with (
        pytest.warns(RuntimeWarning, match="rejected"),
        pytest.raises(ValueError, match=r"has diverged.*8 of the last 16 steps were rejected.*max_kl=0\.01"),
    ):
        train(opt, model, 60)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"lr": 0.1, "momentum": 0.9, "damping": 0.1}, {}])
def test_a_run_that_goes_well_says_nothing(options):
    model = net(4, 16, 3)
    opt = natgrad.KFAC(model, LOSS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(opt, model, 20)


def test_the_first_loss_is_kept_over_a_resumption():
    model = net(4, 16, 3)
    opt = natgrad.KFAC(model, LOSS, lr=0.1, momentum=0.9, damping=0.1)
    train(opt, model, 3)
    fresh = natgrad.KFAC(model, LOSS, lr=0.1, momentum=0.9, damping=0.1)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert fresh.state_dict()["kfac"]["first_loss"] == opt.state_dict()["kfac"]["first_loss"] > 0
