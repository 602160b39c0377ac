"""NewtonMuon used as torch's optimizers are: groups, schedulers, closures, `torch.compile`, saved state."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from muon_steps import LABELS, C, D, H, N, X, backward, perceptron, same, stay_alike, step, weights
from oracles import close, f64, net, randn


class TestAsTorchsOptimizers:
    def test_schedulers_change_both_rates(self):
        model, twin = perceptron(), perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, rest_lr=0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5**i)
        by_hand = natgrad.NewtonMuon(twin, lr=0.1, rest_lr=0.02)
        for i in range(4):
            by_hand.param_groups[0]["lr"] = 0.1 * 0.5**i
            step(model, opt)
            step(twin, by_hand)
            scheduler.step()
        assert same(model, twin)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.LinearLR(o, 1, 0)],
                [3],
            ),
        ],
    )
    def test_torchs_schedulers(self, schedule):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        scheduler = schedule(opt)
        losses = []
        for _ in range(8):
            losses.append(step(model, opt))
            scheduler.step()
        assert losses[-1] < losses[0]

    def test_groups_have_settings_of_their_own(self):
        model = perceptron()
        groups = [
            {"params": ["0.weight", "0.bias"], "lr": 0.0},
            {"params": ["2.weight"], "weight_decay": 0.0, "momentum": 0.5},
            {"params": lambda n: n.startswith("4."), "lr": 0.1, "rest_lr": 0.05},
        ]
        opt = natgrad.NewtonMuon(model, lr=0.1, params=groups)
        before = weights(model)
        step(model, opt)
        after = weights(model)
        assert all(torch.equal(before[n], after[n]) == n.startswith("0.") for n in ("0.weight", "0.bias", "4.bias"))
        close((before["4.bias"] - after["4.bias"]).abs(), torch.full((C,), 0.05, dtype=f64), 1e-2)
        assert torch.equal(before["2.bias"], after["2.bias"])  # in no group

    def test_by_default_adamws_rate_is_half_of_the_matrices(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.0)
        before = weights(model)
        step(model, opt)
        # The first step of AdamW is as long as its learning rate.
        close((before["4.bias"] - weights(model)["4.bias"]).abs(), torch.full((C,), 0.05, dtype=f64), 1e-2)

    def test_what_is_refused(self):
        model = perceptron()
        for options, message in (
            ({"lr": -1.0}, r"lr=-1\.0 is not usable: expected a number >= 0"),
            ({"rest_weight_decay": -1.0}, r"rest_weight_decay=-1\.0 is not usable"),
            ({"rest_lr": math.nan}, "rest_lr=nan is not usable"),
            ({"lr": 0.0, "rest_lr": 0.1}, "rest_lr=0.1 is not usable beside lr=0"),
            ({"momentum": 1.0}, r"momentum=1\.0 is not usable: expected a number in \[0, 1\)"),
            ({"betas": (0.9, 1.0)}, r"betas=1\.0 is not usable"),
            ({"sides": "output"}, r"sides='output' is unknown: expected one of 'none' \(.*'input' \(.*'both'"),
            ({"ridge": 0.0}, r"ridge=0\.0 is not usable"),
            ({"refresh_every": 0}, "refresh_every=0 is not usable"),
            ({"decay": 1.0}, r"decay=1\.0 is not usable"),
            ({"average": 1.0}, r"average=1\.0 is not usable"),
            ({"params": ["nose"]}, "params names 'nose', which is not a trainable parameter"),
            ({"params": [{"params": ["0.weight"], "momentun": 0.5}]}, "a group has 'momentun'; expected settings"),
        ):
            with pytest.raises(ValueError, match=message):
                natgrad.NewtonMuon(model, **options)

    def test_a_refused_group_leaves_the_optimizer_as_it_was(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, params=["0.weight"])
        with pytest.raises(ValueError, match="momentum=-1"):
            opt.add_param_group({"params": ["2.weight"], "momentum": -1.0})
        assert len(opt.param_groups) == 1
        step(model, opt)

    def test_accumulation_is_the_step_of_the_whole_batch(self):
        model, twin = perceptron(), perceptron()
        opt, whole = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))
        for i in range(12):
            x = randn(N, D, seed=i)
            opt.zero_grad()
            for part in (slice(0, 8), slice(8, N)):
                F.cross_entropy(model(x[part]), LABELS[part], reduction="sum").div(N).backward()
            opt.step()
            step(twin, whole, x)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                close(p.detach(), q.detach(), 1e-8)

    def test_a_closure(self):
        model, twin = perceptron(), perceptron()
        opt, other = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))

        def closure():
            opt.zero_grad()
            return backward(model)

        assert opt.step(closure).item() == step(twin, other)
        assert same(model, twin)

    def test_clipping_matters_to_adamws_steps_alone(self):
        model, twin = perceptron(), perceptron()
        opts = [natgrad.NewtonMuon(m, lr=0.05, momentum=0.0) for m in (model, twin)]
        for m, opt, clip in ((model, opts[0], 1e9), (twin, opts[1], 1e-3)):
            backward(m)
            nn.utils.clip_grad_norm_(m.parameters(), clip)
            opt.step()
        close(model[2].weight.detach(), twin[2].weight.detach(), 1e-8)

    def test_with_a_grad_scaler_the_steps_are_those_without(self):
        model, twin = perceptron(), perceptron()
        opt, bare = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for _ in range(8):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(X), LABELS)).backward()
            scaler.step(opt)
            scaler.update()
            step(twin, bare)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-6)

    def test_a_step_that_a_grad_scaler_skips(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for i in range(12):
            opt.zero_grad()
            loss = F.cross_entropy(model(X), LABELS)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            before = weights(model)
            if i == 3:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters()) == (i == 3)
        assert losses[-1] < losses[0]
        assert opt.diagnostics["step"] == 10

    def test_it_cannot_be_copied(self):
        with pytest.raises(TypeError, match="NewtonMuon optimizer cannot be copied or pickled"):
            copy.deepcopy(natgrad.NewtonMuon(perceptron()))

    def test_cautious_decay_leaves_what_the_step_moves_away_from_zero(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.5, cautious=True)
        twin = perceptron()
        plain = natgrad.NewtonMuon(twin, lr=0.1, weight_decay=0.0)
        before = weights(model)
        step(model, opt)
        step(twin, plain)
        for n in ("0.weight", "4.weight"):
            moved = model.get_parameter(n).detach() - twin.get_parameter(n).detach()
            rate = 0.1 if n == "0.weight" else 0.1 * opt.param_groups[0]["rest"]
            toward = (twin.get_parameter(n).detach() - before[n]) * before[n] < 0
            close(moved, torch.where(toward, -rate * 0.5 * before[n], 0.0))


class TestResuming:
    @pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16])
    @pytest.mark.parametrize("at", [1, 5, 13])
    def test_bit_for_bit_through_a_file(self, dtype, at):
        options = {"lr": 0.05, "average": 0.9, "refresh_every": 4, "sides": "both"}
        model, twin = perceptron(dtype=dtype), perceptron(seed=1, dtype=dtype)
        opt, resumed = (natgrad.NewtonMuon(m, **options) for m in (model, twin))
        for i in range(at):
            step(model, opt, randn(N, D, seed=i).to(dtype))
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        file.seek(0)
        values, state = torch.load(file, weights_only=True)
        twin.load_state_dict(values)
        resumed.load_state_dict(state)
        assert resumed.routing() == opt.routing()
        for i in range(at, at + 12):
            step(model, opt, randn(N, D, seed=i).to(dtype))
            step(twin, resumed, randn(N, D, seed=i).to(dtype))
            assert same(model, twin), i
        with opt.averaged(), resumed.averaged():
            assert same(model, twin)

    def test_a_state_before_the_first_step(self):
        model, twin = perceptron(), perceptron()
        opt, resumed = natgrad.NewtonMuon(model), natgrad.NewtonMuon(twin)
        resumed.load_state_dict(opt.state_dict())
        step(model, opt)
        step(twin, resumed)
        assert same(model, twin)

    def test_nothing_is_changed_where_a_state_is_refused(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        for _ in range(3):
            step(model, opt)
        good = opt.state_dict()

        def wrong(change):
            state = copy.deepcopy(good)
            change(state)
            return state

        wide = natgrad.NewtonMuon(other := net(D, H + 1, H, C), lr=0.05)
        step(other, wide)
        for state, message in (
            (torch.optim.AdamW(model.parameters()).state_dict(), "no 'newton_muon'"),
            (wrong(lambda s: s["newton_muon"].pop("moments")), "has no 'moments'"),
            (wrong(lambda s: s["param_groups"][0]["params"].pop()), r"groups of \[5\] parameters"),
            (wrong(lambda s: s["newton_muon"]["routes"].update(x={"step": "adamw", "why": ""})), "'x'"),
            (wide.state_dict(), r"'momentum_buffer' of '0\.weight' has shape \(7, 4\)"),
            (natgrad.KFAC(model, nn.CrossEntropyLoss()).state_dict(), "no 'newton_muon'"),
        ):
            before = copy.deepcopy(opt.state_dict())
            with pytest.raises(ValueError, match=message):
                opt.load_state_dict(state)
            after = opt.state_dict()
            assert str(before) == str(after)

    def test_rates_that_a_scheduler_has_set_are_resumed(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, rest_lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        step(model, opt)
        scheduler.step()
        other = natgrad.NewtonMuon(perceptron(), lr=1.0)
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["lr"] == 0.025
        assert other.param_groups[0]["rest"] == pytest.approx(0.4)


class TestCompiled:
    """With what `torch.compile` returns, with the model that it was given, and with one compiled in place."""

    @pytest.mark.parametrize("how", ["wrapped", "inner", "in place"])
    def test_the_steps_are_those_of_the_plain_model(self, how):
        torch.compiler.reset()
        model, twin = perceptron(), perceptron()
        called = model
        if how == "in place":
            model.compile(backend="eager")
        else:
            called = torch.compile(model, backend="eager")
        opt = natgrad.NewtonMuon(called if how == "wrapped" else model, lr=0.05, refresh_every=3)
        other = natgrad.NewtonMuon(twin, lr=0.05, refresh_every=3)
        stay_alike(called, opt, twin, other, 8, 1e-9)
        steps = sorted(route.step for route in opt.routing().values())
        assert steps == ["adamw"] * 4 + ["whitened"] * 2
