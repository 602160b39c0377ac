"""What users of torch's optimizers expect: groups, schedulers, decay, clipping, scalers."""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from natgrad.losses import Likelihood
from oracles import close, f64, net, randn

N, D, C = 24, 5, 3
X, LABELS = randn(N, D), torch.arange(N) % C
PLAIN = {"structure": "identity"}
FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


def model_of(*widths, seed=0, dtype=f64):
    torch.manual_seed(seed)
    return net(*widths).to(dtype)


def step(model, opt, x=X, y=LABELS):
    loss = opt.loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.detach()


def plain_step(model, opt, x=X, y=LABELS):
    loss = nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def same(model, twin):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


class TestIsSGD:
    @pytest.mark.parametrize("dtype", [torch.float32, f64])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    def test_without_preconditioning_to_the_last_bit(self, dtype, momentum, weight_decay):
        model, twin = model_of(D, 8, C, dtype=dtype), model_of(D, 8, C, dtype=dtype)
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), lr=0.1, momentum=momentum, weight_decay=weight_decay, **PLAIN
        )  # fmt: skip
        sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
        for schedule_of in (opt, sgd):
            schedule_of.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(schedule_of, 20)
        for i in range(20):
            x = randn(N, D, seed=i).to(dtype)
            step(model, opt, x)
            plain_step(twin, sgd, x)
            opt.schedule.step()
            sgd.schedule.step()
            assert same(model, twin), i

    def test_in_groups_with_settings_of_their_own(self):
        model, twin = model_of(D, 8, C), model_of(D, 8, C)

        def groups(m):
            return [
                {"params": [m[0].weight, m[2].weight], "lr": 0.2, "weight_decay": 0.1},
                {"params": [m[0].bias, m[2].bias], "momentum": 0.8},
            ]

        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=groups(model), lr=0.05, momentum=0.5, **PLAIN)
        sgd = torch.optim.SGD(groups(twin), lr=0.05, momentum=0.5)
        for _ in range(6):
            step(model, opt)
            plain_step(twin, sgd)
        assert same(model, twin)

    def test_accumulated_and_clipped(self):
        model, twin = model_of(D, 8, C), model_of(D, 8, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), lr=0.3, momentum=0.9, **PLAIN)
        sgd = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
        for _ in range(5):
            for m, o, loss_of in ((model, opt, opt.loss), (twin, sgd, nn.functional.cross_entropy)):
                o.zero_grad()
                for half in (slice(0, N // 2), slice(N // 2, N)):
                    (loss_of(m(X[half]), LABELS[half]) / 2).backward()
                nn.utils.clip_grad_norm_(m.parameters(), 0.05)
                o.step()
        assert same(model, twin)

    def test_decoupled_weight_decay_is_adamws(self):
        model = model_of(D, C)
        before = [p.detach().clone() for p in model.parameters()]
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), lr=0.1, momentum=0.0, weight_decay=0.2, decoupled_weight_decay=True, **PLAIN
        )  # fmt: skip
        step(model, opt)
        for p, b in zip(model.parameters(), before, strict=True):
            close(p.detach(), (1 - 0.1 * 0.2) * b - 0.1 * p.grad)


class TestDecoupledDecay:
    def test_multiplies_by_the_adaptive_step_size_too(self):
        model, twin = model_of(D, C), model_of(D, C)
        decays = {"weight_decay": 0.01, "decoupled_weight_decay": True}
        with_decay = natgrad.KFAC(model, nn.CrossEntropyLoss(), damping=0.1, **decays)
        without = natgrad.KFAC(twin, nn.CrossEntropyLoss(), damping=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        step(model, with_decay)
        step(twin, without)
        shrunk = with_decay.diagnostics["lr"] * 0.01
        for p, q, b in zip(model.parameters(), twin.parameters(), before, strict=True):
            close(p.detach(), q.detach() - shrunk * b)

    def test_in_one_group_of_two_the_objective_has_the_decay_of_the_other(self):
        model = model_of(D, C)
        groups = [{"params": ["0.weight"], "weight_decay": 0.1}, {"params": ["0.bias"]}]
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), params=groups, estimator="exact", damping=0.05, momentum=0.0, centered=False
        )  # fmt: skip
        W, b = (p.detach().clone() for p in model.parameters())
        step(model, opt)
        F = natgrad.fisher(twin := model_of(D, C), nn.CrossEntropyLoss(), (X, LABELS), structure="dense").to_dense()
        del twin
        eta = torch.cat([torch.full((W.numel(),), 0.1, dtype=f64), torch.zeros(b.numel(), dtype=f64)])
        g = torch.cat([p.grad.flatten() for p in model.parameters()]) + eta * torch.cat([W.flatten(), b])
        moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), (W, b), strict=True)])
        # Along the direction that was taken, its length minimizes the model with each parameter's own decay.
        Q = F + torch.diag(eta) + 0.05 * torch.eye(len(g), dtype=f64)
        close(moved @ Q @ moved, -(g @ moved))


class TestGroups:
    def test_names_a_predicate_or_tensors_choose_what_is_trained(self):
        for params in (["2.weight", "2.bias"], lambda n: n.startswith("2."), "tensors"):
            model = model_of(D, 8, C)
            chosen = list(model[2].parameters()) if params == "tensors" else params
            opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=chosen)
            before = copy.deepcopy(model.state_dict())
            step(model, opt)
            for n, p in model.named_parameters():
                assert torch.equal(p, before[n]) == n.startswith("0.")

    def test_a_step_size_of_zero_leaves_a_group_in_place(self):
        model = model_of(D, 8, C)
        groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=groups, lr=0.1, momentum=0.9, damping=0.1)
        before = copy.deepcopy(model.state_dict())
        step(model, opt)
        assert torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[2].weight, before["2.weight"])

    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_an_unfrozen_layer_is_added(self, options):
        model = model_of(D, 8, C)
        model[0].requires_grad_(False)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options, statistics_every=1)
        step(model, opt)
        model[0].requires_grad_(True)
        opt.add_param_group({"params": model[0].parameters()})
        before = copy.deepcopy(model.state_dict())
        step(model, opt)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_bad_groups_are_named(self):
        model = model_of(D, 8, C)
        loss = nn.CrossEntropyLoss()
        for params, message in (
            ([], "params is empty"),
            ([torch.zeros(3)], r"a tensor of shape \(3,\) that is not a parameter of the model"),
            (["nose"], "params names 'nose', which is not a trainable parameter"),
            ([{"lr": 0.1}], "a group has 'lr' and no 'params'"),
            ([3], "params has an int; expected parameters of the model"),
            ([{"params": ["0.weight"], "lr": 0.1}, {"params": ["0.bias"]}], "lr is None, which means adaptive, in one"),
            ([{"params": ["0.weight"], "lr": -1.0}], "lr=-1.0 is not usable"),
        ):
            with pytest.raises(ValueError, match=message):
                natgrad.KFAC(model, loss, params=params)

    def test_a_refused_group_leaves_the_optimizer_as_it_was(self):
        model = model_of(D, 8, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=["2.weight", "2.bias"], **FIXED)
        with pytest.raises(ValueError, match="momentum=-1"):
            opt.add_param_group({"params": ["0.weight"], "momentum": -1.0})
        assert len(opt.param_groups) == 1
        step(model, opt)


class TestGradScaler:
    def scaler(self, **options):
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, **options)

    @pytest.mark.parametrize("by_hand", [False, True])
    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_the_steps_are_those_without_it(self, options, by_hand):
        model, twin = model_of(D, 8, C), model_of(D, 8, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options, weight_decay=0.01)
        bare = natgrad.KFAC(twin, nn.CrossEntropyLoss(), **options, weight_decay=0.01)
        scaler = self.scaler(growth_interval=2)
        for _ in range(6):
            opt.zero_grad()
            scaler.scale(opt.loss(model(X), LABELS)).backward()
            if by_hand:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(opt)
            scaler.update()
            step(twin, bare)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p, q)

    def test_an_overflow_skips_the_step_and_lowers_the_scale(self, recwarn):
        model = model_of(D, 8, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        scaler = self.scaler()
        step(model, opt)
        before, damping = copy.deepcopy(model.state_dict()), opt.diagnostics["damping"]
        opt.zero_grad()
        scaler.scale(opt.loss(model(X), LABELS)).backward()
        model[0].weight.grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert scaler.get_scale() < 2.0**10
        assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
        step(model, opt)
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["damping"] <= damping

    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_the_skipped_batch_is_forgotten_with_its_gradients_whoever_sets_them_to_none(self, options):
        model, twin = model_of(D, 8, C), model_of(D, 8, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), estimator="exact", **options)
        bare = natgrad.KFAC(twin, nn.CrossEntropyLoss(), estimator="exact", **options)
        scaler = self.scaler()
        for i in range(4):
            scaler.scale(opt.loss(model(X if i != 1 else 1e3 * X), LABELS)).backward()
            if i == 1:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
            model.zero_grad()
            if i != 1:
                step(twin, bare)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p, q)


def test_a_closure_that_makes_no_loss_makes_no_step():
    model = model_of(D, 8, C)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    step(model, opt)
    before, steps = copy.deepcopy(model.state_dict()), opt.diagnostics["step"]
    opt.zero_grad()
    assert opt.step(lambda: None) is None
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    step(model, opt)
    assert opt.diagnostics["step"] == steps + 1


def test_a_loss_within_the_models_own_forward_says_for_what_to_make_the_optimizer():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model_of(D, C)

        def forward(self, opt):
            return opt.loss(self.net(X), LABELS)

    step = Step()
    with pytest.raises(RuntimeError, match=r"before the model's forward returned.*: KFAC\(self\.net, \.\.\.\)"):
        step(natgrad.KFAC(step, nn.CrossEntropyLoss()))
    assert step(natgrad.KFAC(step.net, nn.CrossEntropyLoss())).requires_grad


class TestKlBound:
    @pytest.mark.parametrize("options", [{}, {"lr": 1.0, "momentum": 0.0, "damping": 1e-8}], ids=["adaptive", "fixed"])
    def test_the_predicted_divergence_stays_within(self, options):
        # One affine layer and one example: the Fisher matrix is a Kronecker product.
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, C)).to(f64)
        loss = Likelihood(lambda f: torch.distributions.Independent(torch.distributions.Normal(f, 0.1), 1))
        x, y = X[:1], 5 + randn(1, C)
        opt = natgrad.KFAC(model, loss, max_kl=1e-3, estimator="exact", centered=False, **options)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        F = natgrad.fisher(model, loss, (x, y), structure="dense").to_dense()
        step(model, opt, x, y)
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        assert float(0.5 * moved @ F @ moved) == pytest.approx(1e-3, rel=1e-3)

    def test_a_bound_that_is_not_reached_changes_nothing(self):
        model, twin = model_of(D, 8, C), model_of(D, 8, C)
        one = natgrad.KFAC(model, nn.CrossEntropyLoss(), max_kl=1e6)
        two = natgrad.KFAC(twin, nn.CrossEntropyLoss())
        for _ in range(5):
            step(model, one)
            step(twin, two)
        assert same(model, twin)


def test_a_state_goes_through_a_file():
    model, twin = model_of(D, 8, C), model_of(D, 8, C, seed=1)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
    for _ in range(3):
        step(model, opt)
    import io

    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    resumed = natgrad.KFAC(twin, nn.CrossEntropyLoss(), **FIXED)
    resumed.load_state_dict(state)
    step(model, opt)
    step(twin, resumed)
    assert same(model, twin)


def test_averaged_weights_by_torchs_own():
    model = model_of(D, 8, C)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(5):
        step(model, opt)
        averaged.update_parameters(model)
    assert torch.isfinite(nn.functional.cross_entropy(averaged(X), LABELS))


class TestAverages:
    def test_they_weigh_recent_iterates_most_and_are_in_the_model_within_the_context(self):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), average=0.5, **FIXED)
        average = model[0].weight.detach().clone()
        for t in range(1, 20):
            step(model, opt)
            average.lerp_(model[0].weight.detach(), max(0.5, 10 / (9 + t)))
        last = model[0].weight.detach().clone()
        with opt.averaged():
            close(model[0].weight.detach(), average)
        assert torch.equal(model[0].weight, last)

    def test_an_error_within_leaves_the_last_iterate(self):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), average=0.9)
        for _ in range(3):
            step(model, opt)
        last = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyError), opt.averaged():
            raise KeyError
        assert all(torch.equal(p, last[n]) for n, p in model.named_parameters())

    def test_they_resume(self):
        model, twin = model_of(D, C), model_of(D, C)
        opt, resumed = (natgrad.KFAC(m, nn.CrossEntropyLoss(), average=0.9, **FIXED) for m in (model, twin))
        for _ in range(3):
            step(model, opt)
        twin.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        step(model, opt)
        step(twin, resumed)
        with opt.averaged(), resumed.averaged():
            assert same(model, twin)

    def test_without_them_it_says_so(self):
        opt = natgrad.KFAC(model_of(D, C), nn.CrossEntropyLoss())
        with pytest.raises(
            RuntimeError, match=r"there are no averages; make the optimizer with KFAC\(..., average=0.98\)"
        ):
            opt.averaged()
        with pytest.raises(ValueError, match=r"average=1\.0 is not usable"):
            natgrad.KFAC(model_of(D, C), nn.CrossEntropyLoss(), average=1.0)
