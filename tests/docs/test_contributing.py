"""CONTRIBUTING.md: each extension that it names is one class here, of the library's own interfaces alone; and its files
are there."""

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature.diagonal import DiagonalStructure
from natgrad.curvature.structures import STRUCTURES
from natgrad.linalg import Diagonal
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.preconditioner.base import Preconditioner
from natgrad.optim.rules.damping import DampingRule
from oracles import Power, close, dense_curvature, f64, fit, flatten, net, randn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LOSS = nn.CrossEntropyLoss()
X, Y = randn(12, 4), torch.arange(12) % 3


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", PAGE))))
def test_a_file_that_it_names_is_there(path):
    roots = [ROOT, ROOT / "src" / "natgrad"]
    assert any((root / path).exists() for root in roots) or list((ROOT / "src").rglob(path))


class Steady(DampingRule):
    """A damping that falls by one factor whatever happens."""

    def adapt(self, damping, ratio, scale, share=1.0):
        return damping / 2

    def after_rejection(self, damping, count, scale):
        return 10 * damping


class Squares(Preconditioner):
    """`F = diag v`, with `v` the running mean of the squared gradients."""

    inverted = "the mean of the squared gradients"
    observes = False

    def __init__(self, parameters, decay=0.9):
        super().__init__(parameters)
        self.decay, self.sums, self.weight, self.inverse = decay, {}, 0.0, {}

    def take_in(self, objective, gradients, figures, step):
        return set()

    def see_gradient(self, g):
        self.weight = self.decay * self.weight + 1
        self.sums = {n: self.decay * self.sums.get(n, 0.0) + t.square() for n, t in g.items()}

    def refresh(self, damping, decay, figures):
        self.inverse = {n: 1 / (t / self.weight + damping + decay.of(n)) for n, t in self.sums.items()}

    def apply(self, v):
        return {n: self.inverse[n] * t for n, t in v.items()}

    def scale(self):
        return float(flatten(self.sums).mean()) / self.weight

    def state(self):
        return {"sums": self.sums, "weight": self.weight}

    def load(self, saved):
        self.sums, self.weight = saved["sums"], saved["weight"]


class Mine(CurvatureOptimizer):
    """An optimizer of both."""

    def __init__(self, model, loss, damping=None, **settings):
        super().__init__(model, loss, defaults=settings, damping=damping)
        self._assemble(Squares(self.parameters), Steady())


class Multiple(DiagonalStructure):
    """A multiple of the identity for each layer: the mean of the diagonal."""

    def build(self, is_mean):
        diagonals = super().build(is_mean).items()
        means = {layer: D.trace() / D.space.size for layer, D in diagonals}
        return {layer: Diagonal(tuple(torch.full_like(v, means[layer]) for v in D.values)) for layer, D in diagonals}


def test_a_preconditioner_with_numbers_given_takes_the_step_of_its_formula():
    model = net(4, 5, 3)
    opt = Mine(model, LOSS, lr=0.1, momentum=0.0, damping=0.3, weight_decay=0.05)
    theta, sums = flatten(tuple(model.parameters())), 0.0
    for k in range(3):
        g = flatten(torch.autograd.grad(LOSS(model(X), Y), list(model.parameters()))) + 0.05 * theta
        sums, weight = 0.9 * sums + g.square(), sum(0.9**i for i in range(k + 1))
        fit(opt, model, X, Y, 1)
        theta = theta - 0.1 * g / (sums / weight + 0.3 + 0.05)
        close(flatten(tuple(model.parameters())), theta, 1e-12)


def test_its_adaptive_step_resumes_bit_for_bit():
    model = net(4, 5, 3)
    opt = Mine(model, LOSS)
    first = fit(opt, model, X, Y, 4)
    again = copy.deepcopy(model)
    resumed = Mine(again, LOSS)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    last = fit(opt, model, X, Y, 4)
    assert fit(resumed, again, X, Y, 4) == last
    assert last[-1] < first[0]
    assert repr(opt).startswith("Mine(lr=adaptive")


def test_a_state_is_of_the_optimizer_that_saved_it():
    opt = natgrad.KFAC(net(4, 3), LOSS)
    with pytest.raises(ValueError, match="no 'Mine': it is not a Mine optimizer's"):
        Mine(net(4, 3), LOSS).load_state_dict(opt.state_dict())


def test_without_statistics_parameters_may_be_used_in_any_way():
    model = nn.Sequential(nn.Linear(4, 4, dtype=f64), Power(4), nn.Linear(4, 3, dtype=f64))
    losses = fit(Mine(model, LOSS), model, X, Y, 6)
    assert losses[-1] < losses[0]
    with pytest.raises(NotImplementedError, match="exponent"):
        fit(natgrad.KFAC(model, LOSS), model, X, Y, 1)


def test_a_preconditioner_that_is_to_observe_and_does_not_says_so():
    class Blind(Squares):
        observes = True

    class Other(CurvatureOptimizer):
        def __init__(self, model, loss):
            super().__init__(model, loss)
            self._assemble(Blind(self.parameters), Steady())

    model = net(4, 3)
    with pytest.raises(NotImplementedError, match=r"Blind has no method observe; expected one.*observes = False"):
        fit(Other(model, LOSS), model, X, Y, 1)


def test_a_damping_rule_moves_the_damping_of_an_optimizer():
    model = net(4, 3)
    opt = natgrad.KFAC(model, LOSS, adapt_every=1)
    opt.recipe.damping.rule = Steady()
    dampings = [fit(opt, model, X, Y, 1) and opt.recipe.damping.value for _ in range(4)]
    assert [b / a for a, b in pairwise(dampings)] == pytest.approx([0.5] * 3)


def test_a_structure_is_chosen_by_its_name(monkeypatch):
    monkeypatch.setitem(STRUCTURES, "multiple", lambda options: Multiple())
    model = net(4, 5, 3)
    dense = dense_curvature(model, LOSS, [(X, Y)]).diagonal()
    M = natgrad.fisher(model, LOSS, (X, Y), {"*": "multiple"})
    expected = torch.cat([d.mean().expand(len(d)) for d in dense.split([4 * 5 + 5, 5 * 3 + 3])])
    close(M.to_dense(), torch.diag(expected), 1e-12)
    close(M.solve(torch.ones_like(dense), 0.1), 1 / (expected + 0.1), 1e-12)
