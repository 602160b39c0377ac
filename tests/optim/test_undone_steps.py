"""Batches that spoil a step, and steps that are undone or shortened: weights, damping and diagnostics afterwards."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import LABELS, C, D, N, X, made, step
from oracles import net, parameter_vector, rejected

FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


class TestUndone:
    @pytest.fixture(params=[{}, FIXED], ids=["adaptive", "fixed"])
    def trained(self, request):
        model, opt = made(statistics_every=1, **request.param)
        for _ in range(3):
            step(model, opt)
        return model, opt

    def test_a_nan_in_the_batch(self, trained):
        model, opt = trained
        before, curvature, damping = parameter_vector(model), opt.curvature().to_dense(), opt.diagnostics["damping"]
        bad = X.clone()
        bad[3, 1] = math.nan
        step(model, opt, bad)
        rejected(opt, "the loss is not finite")
        assert torch.equal(parameter_vector(model), before)
        assert torch.equal(opt.curvature().to_dense(), curvature)
        assert not opt.diagnostics["accepted"]
        assert "not finite" in opt.diagnostics["reason"]
        assert opt.diagnostics["damping"] == damping  # the batch is to blame, not the step
        step(model, opt)
        assert opt.diagnostics["accepted"]
        assert torch.isfinite(parameter_vector(model)).all()
        assert not torch.equal(parameter_vector(model), before)

    def test_a_nan_in_a_gradient(self, trained):
        model, opt = trained
        before = parameter_vector(model)
        opt.loss(model(X), LABELS).backward()
        model[0].weight.grad[1, 2] = math.nan
        opt.step()
        rejected(opt, "the gradient is not finite")
        assert torch.equal(parameter_vector(model), before)

    def test_squares_of_inputs_that_overflow(self):
        model = net(D, 4, C).float()
        nn.init.zeros_(model[0].weight)  # so that loss and gradient are finite
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        before = parameter_vector(model)
        step(model, opt, 1e25 * X.float())
        rejected(opt, "the statistics are not finite")
        assert torch.equal(parameter_vector(model), before)

    def test_a_nan_in_the_first_batch(self):
        model, opt = made()
        before = parameter_vector(model)
        step(model, opt, torch.full_like(X, math.nan))
        rejected(opt)
        assert torch.equal(parameter_vector(model), before)
        step(model, opt)
        assert opt.diagnostics["accepted"]

    def test_a_loss_that_rises_by_half_is_undone(self, monkeypatch):
        model, opt = made(adapt_every=1)
        step(model, opt)
        before, damping = parameter_vector(model), opt.diagnostics["damping"]
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        step(model, opt)
        rejected(opt, r"the loss would have risen from .* to 100")
        assert torch.equal(parameter_vector(model), before)
        assert opt.diagnostics["damping"] == 4 * damping

    def test_where_the_whole_step_would_raise_the_loss_a_part_of_it_is_taken(self, monkeypatch):
        model, opt = made(adapt_every=1)
        step(model, opt)
        twin, other = copy.deepcopy(model), opt.state_dict()
        again = natgrad.KFAC(twin, nn.CrossEntropyLoss(), adapt_every=1)
        again.load_state_dict(copy.deepcopy(other))
        before, damping = parameter_vector(model), opt.diagnostics["damping"]
        values = iter([100.0, 50.0, 0.0])  # of the whole, of a quarter, of a sixteenth
        with monkeypatch.context() as patched:
            patched.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: next(values))
            step(model, opt)
        step(twin, again)
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["shortened"] == 1 / 16
        assert opt.diagnostics["faults"] == {"shortened": 1}
        assert opt.diagnostics["damping"] == 4 * damping
        assert torch.allclose(
            parameter_vector(model) - before, (parameter_vector(twin) - before) / 16, rtol=1e-6, atol=1e-12
        )

    def test_a_given_step_size_is_not_shortened(self, monkeypatch):
        model, opt = made(lr=0.1, momentum=0.0, adapt_every=1)
        step(model, opt)
        before = parameter_vector(model)
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        step(model, opt)
        rejected(opt, "would have risen")
        assert torch.equal(parameter_vector(model), before)

    def test_a_step_that_made_the_loss_infinite_is_taken_back(self):
        torch.manual_seed(0)
        model = net(D, 4, C, activation=nn.ReLU)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        step(model, opt)
        before = parameter_vector(model)
        opt.param_groups[0]["lr"] = 1e200
        step(model, opt)
        opt.param_groups[0]["lr"] = 1e-3
        step(model, opt)
        rejected(opt, "not finite after the last step, which is undone")
        assert torch.isfinite(step(model, opt))
        assert parameter_vector(model).abs().max() < 10 * before.abs().max()

    def test_rejections_in_a_row_raise_the_damping_ever_faster_and_are_told_seldom(self, monkeypatch, recwarn):
        model, opt = made(adapt_every=1)
        step(model, opt)
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        dampings = [opt.diagnostics["damping"]]
        for _ in range(4):
            step(model, opt)
            rejected(opt, "would have risen")
            dampings.append(opt.diagnostics["damping"])
        assert dampings[1] == pytest.approx(4 * dampings[0])
        assert dampings[2] == pytest.approx(16 * dampings[1])
        assert dampings[3] == dampings[4] < 64 * dampings[2]  # a thousand times the curvature
        told = [str(w.message) for w in recwarn if "rejected" in str(w.message)]
        assert [("2 in a row" in m, "4 in a row" in m) for m in told] == [(True, False), (False, True)]

    @pytest.mark.parametrize("count", [1, 3, 8])
    @pytest.mark.parametrize("spoil", ["inputs", "gradient"])
    def test_bad_batches_in_a_row_leave_the_damping(self, count, spoil):
        model, opt = made()
        step(model, opt)
        damping = opt.diagnostics["damping"]
        for _ in range(count):
            loss = opt.loss(model(X * (math.nan if spoil == "inputs" else 1)), LABELS)
            opt.zero_grad()
            loss.backward()
            if spoil == "gradient":
                model[0].weight.grad[1, 2] = math.inf
            opt.step()
            rejected(opt, "not finite")
        assert opt.diagnostics["damping"] == damping

    def test_a_loss_that_is_scaled_by_nothing(self):
        model, opt = made()
        (0.0 * opt.loss(model(X), LABELS)).backward()
        opt.step()
        rejected(opt, r"scaled by 0")

    @pytest.mark.parametrize("centered", [True, False])
    def test_no_nan_on_inputs_that_are_constant_or_huge(self, centered):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, C))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), centered=centered)
        x = torch.zeros(N, D)
        x[:, 0] = 1e4 * X[:, 0].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(30):
                loss = step(model, opt, x)
        assert torch.isfinite(loss)
        assert torch.isfinite(parameter_vector(model)).all()


class TestAStepTooFar:
    """Between measurements a step may raise the loss; the next batch shows it."""

    def one_more(self, model, opt, y=None):
        loss = opt.loss(model(X), LABELS if y is None else y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    def after_some_steps(self):
        model, opt = made()
        for _ in range(3):
            before = self.one_more(model, opt)
        return model, opt, before

    def test_is_undone_where_the_loss_without_it_is_lower(self):
        model, opt, before = self.after_some_steps()
        for p in model.parameters():  # as if the last step had gone the other way, and far
            p.data += (far := 100 * torch.randn_like(p))
            opt.state[p]["delta"] = opt.state[p]["delta"] + far
        damping = opt.diagnostics["damping"]
        previous = [p.detach() - opt.state[p]["delta"] for p in model.parameters()]
        assert self.one_more(model, opt) > 2 * before
        rejected(opt, "risen to .* by the last step, which is undone")
        assert not opt.diagnostics["accepted"]
        assert opt.diagnostics["damping"] > damping
        for p, q in zip(model.parameters(), previous, strict=True):
            torch.testing.assert_close(p.detach(), q)

    def test_is_kept_where_the_batch_is_to_blame(self):
        model, opt, before = self.after_some_steps()
        wrong = (model(X).argmin(1)).detach()
        assert self.one_more(model, opt, wrong) > 1.5 * before
        assert opt.diagnostics["accepted"]
