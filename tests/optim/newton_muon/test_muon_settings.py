"""NewtonMuon's settings: in groups, while training, and where a state is loaded."""

import pytest
import torch
import torch.nn.functional as F

import natgrad
from muon_steps import C, X, perceptron, step, weights
from oracles import close, f64


class TestSettings:
    def test_a_rate_for_the_rest_holds_in_all_groups(self):
        model = perceptron()
        groups = [{"params": [model[0].bias], "lr": 0.002}, {"params": [model[2].bias]}]
        opt = natgrad.NewtonMuon(model, lr=0.02, params=groups, rest_lr=0.004, weight_decay=0.0)
        before = weights(model)
        step(model, opt)
        for n in ("0.bias", "2.bias"):
            close((model.get_parameter(n) - before[n]).abs().max(), torch.tensor(0.004, dtype=f64), 1e-5)

    def test_it_may_be_changed_while_training(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, weight_decay=0.0)
        opt.param_groups[0]["rest_lr"] = 0.1
        before = model[0].bias.detach().clone()
        step(model, opt)
        close((model[0].bias - before).abs().max(), torch.tensor(0.1, dtype=f64), 1e-5)

    @pytest.mark.parametrize(("one", "other"), [("none", "input"), ("input", "both"), ("both", "none")])
    def test_a_state_of_other_sides_is_refused(self, one, other):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, sides=one)
        step(model, opt)
        with pytest.raises(ValueError, match=f"sides='{one}', and this optimizer has '{other}'"):
            natgrad.NewtonMuon(model, sides=other).load_state_dict(opt.state_dict())

    @pytest.mark.parametrize(
        ("before", "after", "expected"),
        [(None, "adamw", "adamw"), (None, "orthogonal", "orthogonal"), ("adamw", None, "whitened")],
    )
    def test_other_steps_hold_after_a_state_is_loaded(self, before, after, expected):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, steps=None if before is None else {"2.weight": before})
        step(model, opt)
        other = natgrad.NewtonMuon(model, steps=None if after is None else {"2.weight": after})
        other.load_state_dict(opt.state_dict())
        for _ in range(2):
            step(model, other)
        assert other.routing()["2.weight"].step == expected
        assert other.routing()["0.weight"].step == "whitened"

    @pytest.mark.parametrize("scale", [1e30, 1e-30])
    def test_large_gradients_are_whitened_on_both_sides(self, scale):
        models = [perceptron(dtype=torch.float32) for _ in range(2)]
        for model, its in zip(models, (1.0, scale), strict=True):
            opt = natgrad.NewtonMuon(model, sides="both", weight_decay=0.0)
            opt.zero_grad()
            (its * F.cross_entropy(model(X.float()), torch.arange(len(X)) % C)).backward()
            opt.step()
        close(models[0][2].weight.detach(), models[1][2].weight.detach(), 1e-3)
