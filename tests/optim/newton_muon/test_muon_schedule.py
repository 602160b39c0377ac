"""Which forwards NewtonMuon looks at."""

import pytest
import torch
from torch import nn

import natgrad
from muon_steps import C, D, H, perceptron, step
from natgrad.optim.muon.schedule import Schedule
from oracles import randn


class Towers(nn.Module):
    def __init__(self, n):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.which = nn.Linear(D, H).double(), 0
        self.towers = nn.ModuleList(nn.Linear(H, H).double() for _ in range(n))
        self.out = nn.Linear(H, C).double()

    def forward(self, x):
        return self.out(torch.tanh(self.towers[self.which](torch.tanh(self.trunk(x)))))


class TestSchedule:
    @pytest.mark.parametrize("n", [2, 3, 4, 8, 13])
    def test_towers_in_turn(self, n):
        """Each is whitened from its second use on at the latest, and its inputs are never older than two rounds."""
        model = Towers(n)
        opt = natgrad.NewtonMuon(model)
        for i in range(12 * n):
            model.which = i % n
            step(model, opt, randn(24, D, seed=i))
            if i >= 2 * n:
                assert opt.routing()[f"towers.{i % n}.weight"].step == "whitened"
            if i >= 5 * n:
                last = {k: opt._schedule._looked_at[f"towers.{k}.weight"] for k in range(n)}
                assert all(i - at <= 8 + 2 * n for at in last.values()), (i, last)

    def test_one_that_is_used_now_and_then(self):
        """Every other use is recorded."""
        model = Towers(2)
        opt = natgrad.NewtonMuon(model)
        for i in range(200):
            model.which = int(i % 50 == 10)
            step(model, opt)
            if i >= 60:
                assert i - opt._schedule._looked_at["towers.1.weight"] <= 100

    def test_one_that_is_never_used_again_costs_nothing(self):
        model, recorded = Towers(2), 0
        opt = natgrad.NewtonMuon(model)
        for i in range(80):
            model.which = int(i == 0)
            recorded += opt._forwards.watch.recording
            step(model, opt)
        assert recorded <= 20

    def test_the_turns_of_a_model_that_uses_all_are_those_of_the_interval(self):
        model, turns = perceptron(), []
        opt = natgrad.NewtonMuon(model)
        for i in range(40):
            step(model, opt)
            if opt.diagnostics["refreshed"]:
                turns.append(i)
        assert turns == [0, 1, 3, 7, 15, 23, 31, 39]

    def test_a_state_goes_on_in_its_turns(self):
        model = Towers(3)
        opt = natgrad.NewtonMuon(model)
        for i in range(10):
            model.which = i % 3
            step(model, opt)
        other = Schedule(8)
        other.load(opt._schedule.state())
        names = opt._matrices.looked_at()
        assert [other.asks(names, s) for s in range(10, 30)] == [opt._schedule.asks(names, s) for s in range(10, 30)]

    def test_a_layer_that_is_thawed_is_looked_at_in_the_next_step(self):
        model = perceptron()
        model[0].requires_grad_(False)
        opt = natgrad.NewtonMuon(model)
        for _ in range(10):
            step(model, opt)
        model[0].requires_grad_(True)
        step(model, opt)
        step(model, opt)
        assert opt.routing()["0.weight"].step == "whitened"
