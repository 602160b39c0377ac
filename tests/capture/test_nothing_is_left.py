"""After `fisher`, no function mode is active and the model has no hooks."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.overrides import _get_current_function_mode

import natgrad
from oracles import Power, f64, randn
from traced import LABELS, D, Modules, N, Scaled, Stumbling, torch_state_is_clean


class TestAfterwards:
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_no_mode_and_no_hook_stay(self, structure):
        model = Modules()
        natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure).to_dense()
        assert torch_state_is_clean(model)

    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    @pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")], ids=repr)
    def test_no_mode_and_no_hook_stay_after_an_exception_in_the_forward(self, structure, error):
        model = Stumbling(error)
        with pytest.raises(type(error), match="half-way"):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure) @ torch.zeros(35, dtype=f64)
        assert torch_state_is_clean(model)

    def test_no_mode_and_no_hook_stay_after_a_parameter_was_refused(self):
        model = Scaled(Power(D))
        with pytest.raises(NotImplementedError):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        assert torch_state_is_clean(model)

    def test_a_function_mode_of_the_user_stays_active(self):
        class Count(torch.overrides.TorchFunctionMode):
            calls = 0

            def __torch_function__(self, func, types, args=(), kwargs=None):
                self.calls += func is F.linear
                return func(*args, **(kwargs or {}))

        with Count() as mode:
            natgrad.fisher(Modules(), nn.CrossEntropyLoss(), (randn(N, D), LABELS))
            assert _get_current_function_mode() is mode
        assert mode.calls >= 2
