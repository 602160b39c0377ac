"""`KFAC`: bad input, and options out of range."""

import math

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import LABELS, C, D, X, made, step
from oracles import Power, parameter_vector

FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


class TestBadInput:
    def test_a_step_before_any_loss(self):
        _, opt = made()
        with pytest.raises(RuntimeError, match=r"step\(\) came before any loss: expected loss = opt\.loss"):
            opt.step()

    def test_a_step_without_backward(self):
        model, opt = made()
        opt.loss(model(X), LABELS)
        with pytest.raises(RuntimeError, match=r"came before loss\.backward\(\)"):
            opt.step()

    def test_a_loss_in_evaluation_or_without_gradients(self):
        model, opt = made()
        with torch.no_grad():
            output = model(X)
        with pytest.raises(RuntimeError, match="training mode with gradients enabled"):
            opt.loss(output, LABELS)
        model.eval()
        with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
            opt.loss(model(X), LABELS)

    def test_a_loss_twice_counts_twice(self):
        (model, opt), (twin, once) = made(**FIXED), made(**FIXED)
        output = model(X)
        (0.5 * opt.loss(output, LABELS) + 0.5 * opt.loss(output, LABELS)).backward()
        once.loss(twin(X), LABELS).backward()
        opt.step()
        once.step()
        assert opt.diagnostics["loss"] == pytest.approx(once.diagnostics["loss"])

    def test_another_tensor_than_the_model_returned(self):
        model, opt = made()
        with pytest.raises(ValueError, match="not given a tensor that the model returned"):
            opt.loss(model(X) * 2, LABELS)

    def test_a_target_that_does_not_match(self):
        model, opt = made()
        with pytest.raises(ValueError, match=r"output has shape \(24, 3\) and target \(7,\)"):
            opt.loss(model(X), LABELS[:7])

    def test_an_empty_batch(self):
        model, opt = made()
        with pytest.raises(ValueError, match=r"the batch is empty: the output has shape \(0, 3\)"):
            opt.loss(model(X[:0]), LABELS[:0])

    def test_no_damping_on_a_singular_factor(self):
        model, opt = made(**{**FIXED, "damping": 0.0})
        before = parameter_vector(model)
        with pytest.raises(ValueError, match=r"layer '[02]': .*pass a larger damping"):
            step(model, opt)
        assert torch.equal(parameter_vector(model), before)

    def test_a_parameter_that_no_kind_covers(self):
        model = nn.Sequential(nn.Linear(D, 4), Power(4), nn.Linear(4, C)).double()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        with pytest.raises(NotImplementedError, match=r"'1\.exponent'.*requires_grad_\(False\)"):
            step(model, opt)

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"lr": math.nan},
            {"momentum": -0.1},
            {"damping": -1e-3},
            {"weight_decay": -1.0},
            {"bias_update": "both"},
            {"damping_style": "some"},
            {"estimator": "all"},
            {"sharing": "none"},
            {"statistics_every": 0},
            {"inverses_every": 0},
            {"adapt_every": 0},
            {"decay": 1.0},
            {"damping_decay": 0.0},
            {"damping_floor": -1.0},
        ],
        ids=str,
    )
    def test_an_option_out_of_range(self, options):
        ((name, _),) = options.items()
        with pytest.raises(ValueError, match=name):
            made(**options)
