"""How the damping moves, and its first value."""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from natgrad.optim.rules.damping import HIGHEST, Eager, LevenbergMarquardt, calibrate
from oracles import net, randn

RULE = LevenbergMarquardt(factor=0.5, floor=0.01)
positive = st.floats(1e-12, 1e12)


def test_it_falls_where_the_model_predicts_well_and_rises_where_it_does_not():
    assert RULE.adapt(1.0, 0.9, 1.0) == 0.5
    assert RULE.adapt(1.0, 1.7, 1.0) == 0.5
    assert RULE.adapt(1.0, 0.1, 1.0) == 2.0
    assert RULE.adapt(1.0, -3.0, 1.0) == 2.0
    for ratio in (0.25, 0.5, 0.75):
        assert RULE.adapt(1.0, ratio, 1.0) == 1.0


def test_a_fall_stops_at_the_floor():
    assert RULE.adapt(0.015, 1.0, 1.0) == 0.01
    assert RULE.adapt(0.01, 1.0, 1.0) == 0.01
    damping = 1.0
    for _ in range(50):
        damping = RULE.adapt(damping, 1.0, 3.0)
    assert damping == 0.03


@given(damping=positive, scale=positive, ratio=st.floats(0.76, 1e6))
def test_a_good_prediction_never_raises_it_nor_takes_it_through_the_floor(damping, scale, ratio):
    new = RULE.adapt(damping, ratio, scale)
    assert new <= damping
    assert new >= min(damping, RULE.floor * scale)


def test_a_ratio_that_is_not_a_number_leaves_it():
    assert RULE.adapt(1.0, math.nan, 1.0) == 1.0


def test_rejections_in_a_row_raise_it_ever_faster_and_not_to_infinity():
    assert [RULE.after_rejection(1.0, k, 1.0) for k in (1, 2, 3)] == [4.0, 16.0, 64.0]
    damping = 1.0
    for k in range(1, 300):
        damping = RULE.after_rejection(damping, k, 2.0)
    assert damping == 1e3 * 2
    assert RULE.after_rejection(1e35, 1, 1.0) == 1e35


def test_the_eager_rule_doubles_after_rejections_up_to_its_limit():
    rule = Eager(factor=0.5, floor=0.01)
    assert [rule.after_rejection(3.0, k, 1.0) for k in (1, 2, 3)] == [6.0, 12.0, 24.0]
    assert rule.after_rejection(3.0, 100, 2.0) == HIGHEST * 2.0
    assert rule.after_rejection(1e35, 1, 1.0) == 1e35  # above the limit, it stays


@given(scale=positive, ratio=st.floats(0.25, 1e6))
def test_from_above_the_ceiling_it_falls_unless_the_model_predicts_badly(scale, ratio):
    damping = RULE.after_rejection(scale, 50, scale)
    for _ in range(60):
        damping = RULE.adapt(damping, ratio, scale)
    assert damping <= 10 * scale * (1 + 1e-9)


@pytest.mark.parametrize("count", [511, 512, 2000])
def test_a_long_row_of_rejections_is_no_error(count):
    assert RULE.after_rejection(1.0, count, 0.0) == 1e30


def test_it_rises_where_a_bound_leaves_little_of_the_step():
    assert RULE.adapt(1.0, 0.9, 1.0, share=0.5) == 2.0
    assert RULE.adapt(1.0, 0.9, 1.0, share=0.8) == 0.5
    damping = 1.0
    for _ in range(60):
        damping = RULE.adapt(damping, 0.9, 3.0, share=0.1)
    assert damping == 1e3 * 3


class TestCalibrate:
    @pytest.mark.parametrize("best", [1e3, 10.0, 1.0, 1e-3, 1e-6])
    @pytest.mark.parametrize("scale", [1e-5, 1.0, 300.0])
    def test_it_picks_the_best_of_its_grid(self, best, scale):
        assert calibrate(scale, lambda d: abs(math.log(d / (scale * best)))) == pytest.approx(scale * best)

    def test_infinite_losses_are_no_choice(self):
        # From the safe end on: finite, then infinite.
        assert calibrate(1.0, lambda d: d if d >= 1 else math.inf) == pytest.approx(1.0)
        assert calibrate(1.0, lambda d: math.inf) == 1e3

    def test_one_worse_value_in_between_does_not_end_the_search(self):
        tried = {1000.0: 5.0, 100.0: 4.0, 10.0: 4.5, 1.0: 3.0, 0.1: 3.5, 0.01: 3.6, 0.001: 0.0}

        def loss_after(damping):
            return tried[min(tried, key=lambda d: abs(d - damping))]

        assert calibrate(1.0, loss_after) == pytest.approx(1.0)

    def test_it_stops_after_two_that_were_no_better(self):
        tried = []
        calibrate(1.0, lambda d: tried.append(d) or -d)
        assert len(tried) == 3
        assert tried == sorted(tried, reverse=True)


class TestTheLeastDamping:
    def new_points(self, opt, model, seed):
        x = randn(6, 3, seed=seed)
        opt.zero_grad()
        opt.loss(model(x), x[:, :2].sin()).backward()
        opt.step()
        return opt.diagnostics

    def test_it_comes_down_to_it_and_stays(self):
        model = net(3, 12, 2)
        opt = natgrad.NaturalGradient(model, nn.MSELoss(), min_damping=1e-4)
        seen = [self.new_points(opt, model, seed) for seed in range(25)]
        dampings = [its["damping"] for its in seen]
        assert min(dampings) == dampings[-1] == 1e-4 < dampings[0]
        assert "reduction_ratio" in seen[0]
        assert "reduction_ratio" not in seen[-1]  # nothing to adapt, and so nothing is measured
        resumed = natgrad.NaturalGradient(copy.deepcopy(model), nn.MSELoss(), min_damping=1e-4)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert not resumed.recipe.damping.adaptive

    def test_without_it_the_damping_falls_further(self):
        model = net(3, 12, 2)
        opt = natgrad.NaturalGradient(model, nn.MSELoss())
        assert min(self.new_points(opt, model, seed)["damping"] for seed in range(25)) < 1e-4

    def test_it_is_refused_beside_a_damping_that_stays(self):
        with pytest.raises(ValueError, match=r"min_damping=0\.1 .*damping=0\.2"):
            natgrad.NaturalGradient(net(3, 4, 2), nn.MSELoss(), damping=0.2, min_damping=0.1)

    def test_a_run_that_leaves_it_far_behind_is_called_back(self):
        model = net(3, 12, 2)
        opt = natgrad.NaturalGradient(model, nn.MSELoss(), min_damping=1e-4)
        for seed in range(25):
            self.new_points(opt, model, seed)
        for p in model.parameters():  # as if the last step had gone far away
            far = 10 * randn(*p.shape, seed=7)
            p.data += far
            opt.state[p]["delta"] = opt.state[p]["delta"] + far
        undone = self.new_points(opt, model, 25)
        assert "undone" in undone["reason"]
        assert undone["damping"] > 1e-4
        assert max(p.abs().max() for p in model.parameters()) < 8
        assert self.new_points(opt, model, 26)["accepted"]
