"""The optimizers take the steps of the examples in plain PyTorch, which readers learn them from."""

import copy
import inspect
from collections import Counter

import pytest
import torch
from torch import nn

import natgrad
from examples import kfac_simple, natural_gradient_simple
from oracles import net

EVERY_STEP = {"statistics_every": 1, "inverses_every": 1, "adapt_every": 1, "statistics_share": 1.0}
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
NETS = {
    "classes": ((2, 20, 20, 3), nn.Tanh, CE, 100),
    "more classes than inputs": ((4, 16, 16, 16, 7), nn.Tanh, CE, 60),
    "rectified": ((4, 16, 16, 5), nn.ReLU, CE, 60),
    "linear": ((6, 3), nn.Tanh, CE, 200),
    "two outputs": ((3, 10, 2), nn.Tanh, MSE, 50),
    "one output": ((2, 30, 1), nn.Softplus, MSE, 80),
    "bottleneck": ((5, 12, 2, 12, 5), nn.Tanh, MSE, 64),
    "linear regression": ((4, 2), nn.Tanh, MSE, 40),
}


SEEDS = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])


def data_of(widths, loss, count):
    x = torch.randn(count, widths[0], dtype=torch.float64) + 1
    if isinstance(loss, nn.MSELoss):
        return x, (x @ torch.randn(widths[0], widths[-1]).double()).sin() + 0.1 * torch.randn(count, widths[-1])
    return x, ((1.5 * x.sum(1)).long() + torch.randint(2, (count,))) % widths[-1]


def distance(model, other):
    """How far the parameters are apart, in units of each tensor's largest entry."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


def step(opt, model, x, y):
    loss = opt.loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def hand_over(opt, model, simple, other):
    """The simple optimizer goes on from where the real one is, so that rounding does not add up over the steps."""
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    if simple.delta is not None:
        simple.delta = [opt.state[p]["delta"].clone() for p in model.parameters()]


class TestKfac:
    def both(self, widths, activation, loss, seed):
        torch.manual_seed(seed)
        model = net(*widths, activation=activation)
        other = copy.deepcopy(model)
        simple = kfac_simple.SimpleKFAC(other, loss, torch.Generator().manual_seed(seed))
        return model, natgrad.KFAC(model, loss, generator=torch.Generator().manual_seed(seed), **EVERY_STEP), simple

    @pytest.mark.parametrize("name", NETS)
    @SEEDS
    def test_takes_the_steps_of_the_simple_one(self, name, seed):
        widths, activation, loss, size = NETS[name]
        model, opt, simple = self.both(widths, activation, loss, seed)
        x, y = data_of(widths, loss, 5 * size)
        for _ in range(25):
            batch = torch.randint(len(x), (size,))
            before = simple.step(x[batch], y[batch])
            assert step(opt, model, x[batch], y[batch]) == pytest.approx(before, rel=1e-12)
            assert distance(model, simple.model) < 1e-8
            assert opt.diagnostics["damping"] == pytest.approx(simple.damping, rel=1e-8)
            hand_over(opt, model, simple, simple.model)

    def test_by_itself_the_simple_one_gets_to_the_same_parameters(self):
        model, opt, simple = self.both((3, 10, 2), nn.Tanh, MSE, 0)
        x, y = data_of((3, 10, 2), MSE, 250)
        for _ in range(100):
            batch = torch.randint(len(x), (50,))
            simple.step(x[batch], y[batch])
            step(opt, model, x[batch], y[batch])
            assert distance(model, simple.model) < 1e-8

    def test_where_steps_are_shortened_rejected_and_taken_back(self):
        """Small batches of a hard task: some steps would raise the loss, or have raised that of the next batch."""
        seen = Counter()
        for widths, loss, size in (((6, 2), CE, 30), ((2, 30, 1), MSE, 20)):
            for seed in range(2):
                model, opt, simple = self.both(widths, nn.Softplus, loss, seed)
                x = torch.randn(5 * size, widths[0], dtype=torch.float64) + 1
                y = (1.5 * x.sum(1)).long() % 2 if loss is CE else x.sin().sum(1, keepdim=True)
                for _ in range(50):
                    batch = torch.randint(len(x), (size,))
                    simple.step(x[batch], y[batch])
                    step(opt, model, x[batch], y[batch])
                    assert distance(model, simple.model) < 1e-8
                    assert opt.journal.rejections == simple.rejections
                    assert opt.diagnostics["damping"] == pytest.approx(simple.damping, rel=1e-8)
                    seen["shortened"] += "shortened" in opt.diagnostics
                    seen["taken back"] += "undone" in opt.diagnostics["reason"]
                    seen["rejected"] += "would have risen" in opt.diagnostics["reason"]
                    hand_over(opt, model, simple, simple.model)
        assert seen["shortened"] > 0, seen
        assert seen["taken back"] > 0, seen


class TestNaturalGradient:
    @pytest.mark.parametrize("name", NETS)
    @SEEDS
    def test_takes_the_steps_of_the_simple_one(self, name, seed):
        widths, activation, loss, size = NETS[name]
        widths = [min(width, 6) for width in widths]
        torch.manual_seed(seed)
        model = net(*widths, activation=activation)
        other = copy.deepcopy(model)
        simple = natural_gradient_simple.SimpleNaturalGradient(other, loss)
        opt = natgrad.NaturalGradient(model, loss)
        x, y = data_of(widths, loss, size)
        steps = 0
        while steps < 15:
            before = simple.step(x, y)
            assert step(opt, model, x, y) == pytest.approx(before, rel=1e-8)
            assert distance(model, other) < 1e-8
            if -opt.diagnostics["predicted_change"] < 1e-10 * before:
                break  # at the minimum, where the reduction ratio is rounding
            assert opt.diagnostics["damping"] == pytest.approx(simple.damping, rel=1e-8)
            steps += 1
            with torch.no_grad():  # go on from the same place, so that rounding does not add up over the steps
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    q.copy_(p)
            simple.delta = torch.cat([opt.state[p]["delta"].flatten() for p in model.parameters()])
        assert steps > 0


@pytest.mark.parametrize(("module", "most"), [(kfac_simple, 150), (natural_gradient_simple, 66)])
def test_they_are_short(module, most):
    assert len(inspect.getsource(module).splitlines()) <= most
