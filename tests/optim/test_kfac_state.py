"""KFAC's saved state: what is refused, what resumes bit for bit, and copies of the model."""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import ADAPTIVE, FIXED, C, D, X, made, model_of, step
from oracles import f64, parameter_vector, rejected


class TestState:
    def test_the_state_of_a_model_of_other_widths_is_refused(self):
        model, opt = made()
        step(model, opt)
        other = natgrad.KFAC(model_of(D, 6, C), nn.CrossEntropyLoss())
        with pytest.raises(ValueError):  # noqa: PT011
            other.load_state_dict(opt.state_dict())

    def test_the_state_of_a_smaller_model_is_refused(self):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(model, opt)
        with pytest.raises(ValueError, match="of 2 parameters and this optimizer of 4"):
            made()[1].load_state_dict(opt.state_dict())

    def test_layers_may_have_any_name(self):
        model = nn.ModuleDict({"kind": nn.Linear(D, C, dtype=f64)})
        model.forward = lambda x: model["kind"](x)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        step(model, opt)
        again = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        again.load_state_dict(opt.state_dict())
        step(model, again)
        assert again.diagnostics["accepted"]

    @pytest.mark.parametrize(
        "options",
        [{"bias_update": "simple"}, {"weight_decay": 0.1}, {"estimator": "empirical"}, {**FIXED, "centered": False}],
        ids=str,
    )
    def test_it_resumes_bit_for_bit_across_a_rejection(self, options):
        model, opt = made(**options)
        for _ in range(7):
            step(model, opt)
        step(model, opt, X * math.nan)
        rejected(opt)
        other = copy.deepcopy(model)
        torch.manual_seed(9)
        resumed = natgrad.KFAC(other, nn.CrossEntropyLoss(), **options)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        for _ in range(6):
            step(model, opt)
            step(other, resumed)
            assert torch.equal(parameter_vector(model), parameter_vector(other))
        assert opt.diagnostics == resumed.diagnostics

    def test_a_copy_of_the_model_takes_no_part(self):
        one, two = made(), made()
        for _ in range(2):
            twin = copy.deepcopy(one[0])
            step(*one)
            twin(X).sum().backward()
            twin.eval()(X)
            step(*two)
        assert torch.equal(parameter_vector(one[0]), parameter_vector(two[0]))

    def test_a_copy_of_model_and_optimizer_steps_alike_or_is_refused(self):
        model, opt = made(**ADAPTIVE)
        step(model, opt)
        try:
            other, copied = copy.deepcopy((model, opt))
        except (TypeError, RuntimeError, NotImplementedError):
            return
        step(model, opt)
        step(other, copied)
        assert torch.equal(parameter_vector(model), parameter_vector(other))

    def test_two_optimizers_of_one_model_do_not_disturb_each_other(self):
        model, opt = made(**ADAPTIVE)
        alone, reference = made(**ADAPTIVE)
        natgrad.KFAC(model, nn.CrossEntropyLoss())
        second = natgrad.KFAC(model, nn.CrossEntropyLoss(), **ADAPTIVE)
        for _ in range(3):
            step(model, opt)
            step(alone, reference)
        assert torch.equal(parameter_vector(model), parameter_vector(alone))
        step(model, second)
        assert second.diagnostics["accepted"]
