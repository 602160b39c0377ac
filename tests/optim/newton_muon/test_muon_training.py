"""NewtonMuon in training loops: layers that come and go, bad values, copies, averages, low precision."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from muon_steps import LABELS, C, D, H, N, X, backward, perceptron, same, second_moment, step, weights
from oracles import close, f64, randn


class Branches(nn.Module):
    """One of two hidden layers at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, C)
        self.which = "a"

    def forward(self, x):
        return self.head(getattr(self, self.which)(self.first(x).tanh()).tanh())


class TestWhatHappensInTraining:
    def test_a_layer_that_is_not_used_stays_and_is_whitened_once_it_is(self):
        model = Branches().to(f64)
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=2)
        b = model.b.weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model.b.weight, b)
        assert "b.weight" not in {unit.weight for unit in opt._matrices.inputs.moments}
        model.which = "b"
        for _ in range(4):
            step(model, opt)
        assert opt.routing()["b.weight"].step == "whitened"
        assert "b.weight" in {unit.weight for unit in opt._matrices.inputs.moments}
        assert not torch.equal(model.b.weight, b)

    def test_frozen_layers_stay_and_may_be_trained_later(self):
        model = perceptron()
        model[0].requires_grad_(False)
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=2)
        before = model[0].weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[0].weight, before)
        model[0].requires_grad_(True)
        for _ in range(3):
            step(model, opt)
        assert not torch.equal(model[0].weight, before)
        assert opt.routing()["0.weight"].step == "whitened"
        model[2].requires_grad_(False)
        opt.zero_grad()
        frozen = model[2].weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[2].weight, frozen)

    def test_a_group_is_added(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, params=lambda n: not n.startswith("0."))
        for _ in range(3):
            step(model, opt)
        opt.add_param_group({"params": ["0.weight", "0.bias"], "lr": 0.01})
        before = model[0].weight.detach().clone()
        step(model, opt)
        assert opt.routing()["0.weight"].step == "whitened"
        assert not torch.equal(model[0].weight, before)

    def test_forwards_in_evaluation_or_without_gradients_do_not_count(self):
        model, twin = perceptron(), perceptron()
        opt, other = (natgrad.NewtonMuon(m, lr=0.05, refresh_every=1) for m in (model, twin))
        for i in range(5):
            opt.zero_grad()
            loss = F.cross_entropy(model(X), LABELS)
            model.eval()
            model(1e6 * randn(N, D, seed=i))
            model.train()
            with torch.no_grad():
                model(1e6 * X)
            loss.backward()
            opt.step()
            step(twin, other)
        assert same(model, twin)

    def test_a_gradient_that_is_not_finite_changes_nothing_and_warns(self):
        model = nn.Sequential(nn.Linear(D, H, dtype=f64), nn.BatchNorm1d(H, dtype=f64), nn.Linear(H, C, dtype=f64))
        opt = natgrad.NewtonMuon(model, lr=0.05)
        step(model, opt)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        x = X.clone()
        x[0, 0] = math.nan
        with pytest.warns(RuntimeWarning, match="NewtonMuon rejected step 1: the gradient is not finite"):
            step(model, opt, x)
        assert str(before[1]) == str(opt.state_dict()["state"])
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
        assert not opt.diagnostics["accepted"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                assert math.isfinite(step(model, opt))

    def test_inputs_that_are_not_finite_leave_the_averages_as_they_are(self):
        class Guarded(nn.Module):
            """Its gradient is finite where its input is not."""

            def __init__(self):
                super().__init__()
                self.hidden, self.head = nn.Linear(D, H, dtype=f64), nn.Linear(H, C, dtype=f64)
                self.gate = False

            def forward(self, x):
                out = self.head(self.hidden(x).tanh())
                if self.gate:
                    spoiled = self.hidden(torch.full_like(x, math.inf))
                    out = out + torch.zeros_like(out).where(torch.tensor(True), spoiled[:, :C])
                return out

        model = Guarded()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        A = opt._matrices.inputs.moments.copy()
        model.gate = True
        opt.zero_grad()
        backward(model)
        for p in model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        with pytest.warns(RuntimeWarning, match=r"the inputs of 'hidden\.weight' were not finite at step 1"):
            opt.step()
        assert all(opt._matrices.inputs.moments[unit] is m for unit, m in A.items())
        model.gate = False
        for _ in range(3):
            assert math.isfinite(step(model, opt))

    def test_inputs_that_are_all_zero(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        for _ in range(3):
            step(model, opt, torch.zeros_like(X))
        assert all(torch.isfinite(p).all() for p in model.parameters())

    def test_a_forward_that_raises(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        with pytest.raises(RuntimeError):
            model(X[:, 1:])
        twin = perceptron()
        other = natgrad.NewtonMuon(twin, lr=0.05)
        for _ in range(3):
            assert step(model, opt) == step(twin, other)

    def test_an_empty_batch(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        before = weights(model)
        opt.zero_grad()
        F.cross_entropy(model(X[:0]), LABELS[:0], reduction="sum").backward()
        opt.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert before.keys() == weights(model).keys()

    def test_a_step_without_gradients(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        step(model, opt)
        before = weights(model)
        opt.zero_grad()
        opt.step()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    def test_without_a_forward_it_says_what_is_missing(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"step\(\) came before any forward of the model in training mode"):
            opt.step()

    def test_sparse_gradients_are_refused_by_name(self):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        opt = natgrad.NewtonMuon(model)
        model(torch.arange(5)).sum().backward()
        with pytest.raises(ValueError, match=r"the gradient of '0\.weight' is sparse"):
            opt.step()

    def test_another_parameter_in_the_models_place(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, refresh_every=1)
        step(model, opt)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        with pytest.raises(RuntimeError, match=r"the model's '0\.weight' is another tensor"):
            step(model, opt)

    def test_a_copy_of_the_model_takes_no_part(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        twin = copy.deepcopy(model)
        opt.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        twin(1e6 * X)
        loss.backward()
        opt.step()
        A = next(m.A for unit, m in opt._matrices.inputs.moments.items() if unit.weight == "0.weight")
        close(A, second_moment(X))

    def test_averages(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, average=0.5)
        average = model[0].weight.detach().clone()
        for t in range(1, 15):
            step(model, opt)
            average = torch.lerp(average, model[0].weight.detach(), max(0.5, 10 / (9 + t)))
        last = model[0].weight.detach().clone()
        with opt.averaged():
            close(model[0].weight.detach(), average)
        assert torch.equal(model[0].weight, last)
        with (
            pytest.raises(RuntimeError, match=r"NewtonMuon\(..., average=0.98\)"),
            natgrad.NewtonMuon(model).averaged(),
        ):
            pass


class TestPrecision:
    def test_half_precision_parameters_have_their_averages_in_float32(self):
        model = perceptron(dtype=torch.bfloat16)
        opt = natgrad.NewtonMuon(model, lr=0.05)
        losses = [step(model, opt, X.bfloat16()) for _ in range(100)]
        assert losses[-1] < 0.7 * losses[0]
        assert {t.dtype for its in opt.state.values() for t in its.values() if isinstance(t, torch.Tensor)} == {
            torch.float32
        }
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    def test_under_autocast(self):
        model = perceptron(dtype=torch.float32)
        opt = natgrad.NewtonMuon(model, lr=0.05)
        losses = []
        for _ in range(100):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(X.float()), LABELS)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert opt.routing()["2.weight"].step == "whitened"

    def test_a_step_within_autocast_sums_the_inputs_in_float32(self):
        model, twin = perceptron(dtype=torch.float32), perceptron(dtype=torch.float32)
        opts = [natgrad.NewtonMuon(m, lr=0.05, refresh_every=1) for m in (model, twin)]
        step(model, opts[0], X.float())
        with torch.autocast("cpu", torch.bfloat16):
            step(twin, opts[1], X.float())
        A, other = (
            next(m.A for unit, m in o._matrices.inputs.moments.items() if unit.weight == "0.weight") for o in opts
        )
        close(other, second_moment(X.float()), 1e-6)
        close(other, A, 1e-6)
