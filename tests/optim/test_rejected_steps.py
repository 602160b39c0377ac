"""KFAC rejects a step that is not finite or cannot be computed, and changes nothing."""

import math

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import ADAPTIVE, BOTH, FIXED, FRESH, LABELS, C, D, X, made, model_of, step
from natgrad.linalg import CenteredKronecker
from oracles import parameter_vector, rejected


def singular(self, *args, **kwargs):
    raise ValueError("the factor A is singular")


class TestRejection:
    def trained(self, options):
        model, opt = made(**{**options, **FRESH})
        for _ in range(3):
            step(model, opt)
        return model, opt

    @BOTH
    def test_one_bad_microbatch_rejects_the_step_and_leaves_the_moments(self, options):
        model, opt = self.trained(options)
        before, curvature = parameter_vector(model), opt.curvature().to_dense()
        opt.zero_grad()
        for x in (X, X.index_fill(0, torch.tensor(2), math.inf)):
            (opt.loss(model(x), LABELS) / 2).backward()
        opt.step()
        rejected(opt)
        assert torch.equal(parameter_vector(model), before)
        assert torch.equal(opt.curvature().to_dense(), curvature)
        step(model, opt)
        assert opt.diagnostics["accepted"]

    def test_the_next_step_has_new_inverses_though_none_are_due(self):
        model, opt = made(**{**FIXED, "statistics_every": 1, "inverses_every": 50})
        inverted = []
        for x in (X, X, X, X * math.nan, X, X):
            step(model, opt, x)
            inverted.append(opt.diagnostics["accepted"] and "inverses" in opt.diagnostics)
        assert inverted == [True, False, False, False, True, False]

    def test_a_factor_that_cannot_be_inverted(self, monkeypatch):
        model, opt = self.trained(ADAPTIVE)
        before, damping = parameter_vector(model), opt.diagnostics["damping"]
        opt.recipe.preconditioner.inverse = None  # with a last one it would be kept

        with monkeypatch.context() as patch:
            patch.setattr(CenteredKronecker, "inverse", singular)
            step(model, opt)
            rejected(opt, "a factor could not be inverted: layer '0'")
        assert torch.equal(parameter_vector(model), before)
        assert "could not be inverted" in opt.diagnostics["reason"]
        assert opt.diagnostics["damping"] == pytest.approx(4 * damping)
        loss = step(model, opt)
        assert opt.diagnostics["accepted"]
        assert nn.CrossEntropyLoss()(model(X), LABELS) < loss

    def test_without_any_invertible_factor_the_first_step_is_rejected_too(self, monkeypatch):
        model, opt = made()
        before = parameter_vector(model)

        with monkeypatch.context() as patch:
            patch.setattr(CenteredKronecker, "inverse", singular)
            step(model, opt)
            rejected(opt, "could not be inverted")
        assert torch.equal(parameter_vector(model), before)

    @BOTH
    def test_a_good_step_follows_a_gradient_of_nan(self, options):
        model, opt = self.trained(options)
        opt.zero_grad()
        opt.loss(model(X), LABELS).backward()
        model[2].bias.grad[0] = math.nan
        before = parameter_vector(model)
        opt.step()
        rejected(opt, "gradient is not finite")
        assert torch.equal(parameter_vector(model), before)
        loss = step(model, opt)
        assert opt.diagnostics["accepted"]
        assert nn.CrossEntropyLoss()(model(X), LABELS) < loss

    def test_at_an_exact_optimum_nothing_moves_and_nothing_is_rejected(self, recwarn):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.MSELoss(), **ADAPTIVE)
        before, y = parameter_vector(model), model(X).detach()
        for _ in range(3):
            step(model, opt, X, y)
        assert torch.equal(parameter_vector(model), before)
        assert opt.diagnostics["accepted"], opt.diagnostics
        assert not [w for w in recwarn if w.category is RuntimeWarning]
